"""What makes a CPU fast changes no result beyond rounding, and does what it says."""

import mmap
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data2vec_vision import cpu
from data2vec_vision.cpu import LinearAsConvolution, linear_as_convolution
from data2vec_vision.device import fast_products


class Operations(TorchDispatchMode):
    """The names of all operations within it."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if isinstance(args[0] if args else None, torch.Tensor):
            self.shapes.setdefault(self.names[-1], []).append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(300, 64), (4, 75, 64), (2, 5, 30, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_as_convolution_is_the_linear_map(shape, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).requires_grad_()
    weight = torch.randn(96, 64, generator=generator).requires_grad_()
    b = torch.randn(96, generator=generator).requires_grad_() if bias else None
    leaves = [t for t in (x, weight, b) if t is not None]
    gradient = torch.randn(*shape[:-1], 96, generator=generator)
    results = []
    for function, dtype in ((linear_as_convolution, torch.float32), (F.linear, torch.float64)):
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, b)]
        y = function(*inputs)
        y.backward(gradient.to(dtype))
        results.append([y.detach(), *(t.grad for t in inputs if t is not None)])
    assert results[0][0].shape == (*shape[:-1], 96) and len(results[0]) == len(leaves) + 1
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_tokens_in_any_order_of_memory_are_mapped():
    x = torch.randn(64, 75, 4).permute(2, 1, 0)
    weight = torch.randn(96, 64)
    torch.testing.assert_close(linear_as_convolution(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def operations(x, layer, autocast=False):
    with Operations() as seen, LinearAsConvolution(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x)
    return seen.names


def test_large_fp32_maps_become_convolutions_and_no_others():
    layer, x = nn.Linear(256, 1024), torch.randn(16, 16, 256)
    assert "convolution" in operations(x, layer)
    assert "convolution" not in operations(x, layer, autocast=True)
    assert "convolution" not in operations(x.double(), layer.double())
    layer.float()
    assert "convolution" not in operations(x[:, :1], layer)  # 16 rows
    assert "convolution" not in operations(x[..., :8], nn.Linear(8, 8))  # hardly a multiplication
    assert "convolution" not in operations(x[0, 0], layer)  # a vector
    with Operations() as seen:
        layer(x)
    assert "convolution" not in seen.names  # outside


@pytest.mark.parametrize("threads, taken", [(1, False), (2, True)])
def test_one_thread_does_not_make_a_small_batch_a_convolution(monkeypatch, threads, taken):
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: threads)
    layer = nn.Linear(256, 1024)
    for x in (torch.randn(4, 64, 256), torch.randn(256, 256)):
        assert ("convolution" in operations(x, layer)) is taken


def test_rows_without_a_batch_are_one_picture():
    with Operations() as seen:
        linear_as_convolution(torch.randn(300, 64), torch.randn(96, 64))
    assert seen.shapes["convolution"] == [(1, 64, 300, 1)]


def test_every_way_to_call_a_linear_map_goes_through():
    x, weight = torch.randn(16, 16, 256), torch.randn(1024, 256)
    with LinearAsConvolution():
        y = F.linear(x, weight=weight, bias=None)
        z = F.linear(x, weight[0])
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert z.shape == (16, 16)


def test_an_older_glibc_takes_what_it_can(monkeypatch):
    calls = []

    class Libc:
        def mallopt(self, what, value):
            calls.append((what, value))
            return int(value <= self.limit)

    libc = Libc()
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    for limit, expected in ((1 << 40, [1 << 30, -1]), (32 << 20, [1 << 30, 32 << 20, -1]), (-2, [1 << 30, 32 << 20])):
        libc.limit = limit
        calls.clear()
        cpu.keep_freed_memory()
        assert [value for _, value in calls] == expected


def test_it_is_for_fp32_on_a_processor_that_mkl_is_slow_on(monkeypatch):
    device = torch.device("cpu")
    for slow in (True, False):
        monkeypatch.setattr("data2vec_vision.device.mkl_is_slow", lambda slow=slow: slow)
        chosen = [fast_products(device, "fp32"), fast_products(device, "bf16")]
        assert [isinstance(c, LinearAsConvolution) for c in chosen] == [slow, False]
    monkeypatch.setattr("data2vec_vision.device.mkl_is_slow", lambda: True)
    assert not isinstance(fast_products(torch.device("cuda"), "fp32"), LinearAsConvolution)


@pytest.mark.parametrize("vendor, amd", [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_maker_of_the_processor_is_read(tmp_path, vendor, amd):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert cpu.is_amd(tmp_path / "cpuinfo") is amd
    assert not cpu.is_amd(tmp_path / "nothing")


FAULTS = """
import resource, sys, torch
from data2vec_vision.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use():
    torch.ones(64 << 20, dtype=torch.uint8)
for _ in range(10):  # until it has found its place
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    """Ten tensors of 64 MB one after the other: pages that the system has to bring."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    pages = 10 * (64 << 20) // mmap.PAGESIZE
    assert faults["keep"] < pages / 100 < faults["leave"]
