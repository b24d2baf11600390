"""Memory: what is kept for the backward pass, against sums by hand; blocks that compute again; what is free."""

import copy

import pytest
import torch
from test_methods import NAMES, batch, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from data2vec_vision.decoder import MaskedVisionTransformerDecoder
from data2vec_vision.device import device_memory, free_memory, set_grad_checkpointing
from data2vec_vision.live_bytes import LiveBytes
from data2vec_vision.targets import mean_of_blocks


@pytest.mark.parametrize("fake", [False, True])
def test_bytes_are_counted_once_a_storage_until_the_last_owner_is_gone(fake):
    with FakeTensorMode() if fake else torch.enable_grad():
        layer = nn.Linear(10, 20, bias=False)
        with LiveBytes(*layer.parameters()) as live:
            assert live.now == 800
            x = torch.ones(5, 10)
            y = F.gelu(layer(x))  # keeps its input, as the layer keeps x
            part = y[1:].flatten()  # a view
            assert live.now == 800 + 200 + 2 * 400
            del y, x
            assert live.now == 800 + 200 + 2 * 400
            part.sum().backward()
            del part
            assert live.now == 800 + 800 and live.peak > 1800  # the weight and its gradient
            layer.zero_grad()
            assert live.now == 800


def test_the_target_holds_no_copy_of_all_blocks():
    """Of L hidden states in half precision, a few are in fp32 at a time."""
    hidden = [torch.randn(2, 50, 64).bfloat16() for _ in range(12)]
    with torch.no_grad(), LiveBytes(*hidden) as live:
        before = live.now
        mean_of_blocks(hidden, "instance")
    assert live.peak - before < 6 * hidden[0].numel() * 4


def step(method, views, masks):
    """The loss and all gradients of a pass."""
    method.zero_grad()
    torch.manual_seed(7)
    loss = method(views, masks=masks).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("noise", [{}, {"proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}])
@pytest.mark.parametrize("name", NAMES)
def test_computing_again_changes_no_gradient(name, noise):
    method = make(name, encoder=noise.items())
    views, masks = batch(method)
    kept = step(copy.deepcopy(method), views, masks)
    set_grad_checkpointing(method, True)
    again = step(method, views, masks)
    assert kept.keys() == again.keys() and all(torch.equal(kept[n], again[n]) for n in kept)
    other = noise and step(method.eval().train(), [v + 1 for v in views], masks)
    assert not noise or not torch.equal(other["loss"], kept["loss"])


def test_a_decoder_that_drops_paths_computes_the_same_again():
    torch.manual_seed(0)
    decoder = MaskedVisionTransformerDecoder((4, 4), 16, 3, 2, drop_path=0.5).double().train()
    tokens, index = torch.randn(8, 16, 16, dtype=torch.float64), torch.arange(16).expand(8, -1)

    def gradients():
        decoder.zero_grad()
        torch.manual_seed(7)
        decoder(tokens, index, index[:, :3]).queries.square().sum().backward()
        return [p.grad.clone() for p in decoder.parameters()]

    kept = gradients()
    set_grad_checkpointing(decoder, True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), kept))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_train_are_computed_twice_and_a_teachers_once(name):
    method = make(name)
    views, masks = batch(method)
    calls = {}
    for key, module in method.named_modules():
        parent, _, number = key.rpartition(".")
        if number.isdigit() and parent.endswith(("blocks", "layers")):
            module.register_forward_pre_hook(lambda *_, key=key: calls.update({key: calls.get(key, 0) + 1}))
    step(method, views, masks)
    once, calls = calls.copy(), {}
    set_grad_checkpointing(method, True)
    step(method, views, masks)
    assert {key: calls[key] / once[key] for key in once} == {k: 1 if k.startswith("teacher") else 2 for k in once}
    assert any("decoder" in k or "predictor" in k for k in calls) == (name in ("data2vec2", "ijepa", "mae"))
    calls = {}
    method.eval()(images=views[0])
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_computing_again_takes_less_memory(name):
    peaks = []
    for recompute in (False, True):
        method = make(name, torch.float32, encoder={"depth": 6}.items())
        views, masks = batch(method, count=16)
        set_grad_checkpointing(method, recompute)
        method(views, masks=masks).loss.backward()
        method.zero_grad()
        with LiveBytes(*method.parameters(), *method.buffers(), *views, *masks.values()) as live:
            before = live.now
            method(views, masks=masks).loss.backward()
        peaks.append(live.peak - before)
    assert peaks[1] < 0.4 * peaks[0]


def test_free_memory_is_the_least_of_the_machines_and_the_containers(tmp_path):
    """As the kernel writes it; what lies in memory only because it was read from a file can be taken."""

    def system(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_of_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return free_memory(tmp_path)

    assert free_memory(tmp_path) == device_memory(torch.device("cpu")) // 2
    assert system(proc__meminfo="MemTotal: 9 kB\nMemAvailable:    8 kB\n") == 8 * 1024
    group = {"sys__fs__cgroup__memory_of_max": "max\n", "sys__fs__cgroup__memory_of_current": "5000\n"}
    assert system(**group) == 8 * 1024
    assert system(**group | {"sys__fs__cgroup__memory_of_max": "7000\n"}) == 2000
    assert system(sys__fs__cgroup__memory_of_stat="anon 3\ninactive_file 1500\nactive_file 7\n") == 3500
    old = {"limit_in_bytes": "4000\n", "usage_in_bytes": "3900\n", "stat": "cache 9\ntotal_inactive_file 30\n"}
    assert system(**{f"sys__fs__cgroup__memory__memory_of_{name}": text for name, text in old.items()}) == 130
