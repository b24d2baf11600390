"""Runs that begin with pixels: the target, the teacher meanwhile, and the change."""

import copy

import pytest
import torch
from torch import nn

from data2vec_vision import methods
from data2vec_vision.config import Facts
from data2vec_vision.errors import InputError
from data2vec_vision.methods.latent import PixelTarget
from data2vec_vision.patches import patchify
from data2vec_vision.vit import build_vit

NAMES = ["data2vec", "data2vec2", "ijepa"]


def make(name, dtype=torch.float64, **knobs):
    torch.manual_seed(0)
    vit = build_vit(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    tau = {"tau_initial": 0.9, "tau_end": 0.99, "tau_increase_pct": 0.5}
    return methods.find(name)(vit, **(tau | knobs)).to(dtype).train()


def images(seed, count=4):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(method, first, last, total=8):
    """Steps of a loop of one's own; returns [(loss, was the target pixels?, the tau that moved the teacher)]."""
    optimizer, seen = torch.optim.SGD(method.param_groups(0.0), 0.1), []
    for step in range(first, last):
        torch.manual_seed(100 + step)
        on_pixels, tau = method.on_pixels, method.scheduled((step + 1) / total)["tau"]
        loss = method(images(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step((step + 1) / total)
        seen.append((loss.item(), on_pixels, tau))
    return seen


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("width", [64, 48, 20])
def test_the_pixel_target_equals_naive_code(width):
    torch.manual_seed(0)
    target, x = PixelTarget(4, 48, width).double(), images(0, count=2)
    result = target(x)
    assert result.shape == (2, 16, width)
    for b in range(2):
        for s in range(16):
            row, column = divmod(s, 4)
            patch = [x[b, c, 4 * row + i, 4 * column + j].item() for c in range(3) for i in range(4) for j in range(4)]
            mean = sum(patch) / 48
            deviation = (sum((p - mean) ** 2 for p in patch) / 47 + 1e-6) ** 0.5
            for d in range(width):
                expected = sum(target.turn[d, n].item() * (patch[n] - mean) / deviation for n in range(48))
                assert result[b, s, d].item() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(target(patchify(x, 4)), result)


@pytest.mark.parametrize("width", [192, 48])
def test_the_squared_error_of_a_pixel_target_is_that_of_the_pixels(width):
    torch.manual_seed(0)
    target = PixelTarget(4, 48, width).double()
    a, b = (torch.randn(2, 5, 48, dtype=torch.float64) for _ in range(2))
    a, b = ((p - p.mean(-1, keepdim=True)) / (p.var(-1, keepdim=True) + 1e-6).sqrt() for p in (a, b))
    torch.testing.assert_close((target(a) - target(b)).square().mean(), (a - b).square().mean(), rtol=1e-5, atol=0)
    assert target(a).square().mean().item() == pytest.approx(47 / 48, abs=1e-3)


def test_narrow_pixel_targets_have_unit_variance_too():
    torch.manual_seed(0)
    target = PixelTarget(16, 768, 192)
    x = torch.randn(50, 10, 768)
    assert target(x).var().item() == pytest.approx(1, rel=0.02)
    assert target(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_run_begins_with_pixels_and_goes_on_with_a_teacher_that_has_seen_images(name):
    method = make(name, pixel_pct=0.25)
    untrained = copy.deepcopy(method.teacher)
    calls = []
    method.teacher.encode = lambda *a, encode=method.teacher.encode, **k: (calls.append(1), encode(*a, **k))[1]
    x = images(9)
    torch.testing.assert_close(method.target(x), method.pixels(x))
    first = steps(method, 0, 2)  # of 8: a quarter
    assert calls == [], "a pass of the teacher that nothing needs"
    assert same(method.teacher, method.student) and not same(method.teacher, untrained)
    assert not method.prediction_head.weight.any() and not method.prediction_head.bias.any()
    student, centre = copy.deepcopy(method.student), method.position_mean
    assert not (centre.steps or centre.mean.any())  # a mean of pixels is not the latents'
    later = steps(method, 2, 8)
    assert [on for _, on, _ in first + later] == [True] * 2 + [False] * 6
    assert method.prediction_head.weight.any() and method.prediction_head.out_features == 32
    assert len(calls) == centre.steps == 6
    assert not same(method.teacher, method.student) and not same(method.teacher, student)
    torch.testing.assert_close(method.target(x), method.latent(x))
    # tau stands at 0, then rises over what is left, of which the first half.
    expected = [0, 0] + [min(0.99, 0.9 + 0.09 * (n / 6) / 0.5) for n in range(1, 7)]
    assert [tau for _, _, tau in first + later] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_without_pixels_nothing_is_added(name):
    method = make(name)
    assert method.pixels is None and not method.on_pixels
    assert not any("pixels" in key for key in method.state_dict())
    assert [on for _, on, _ in steps(method, 0, 3)] == [False] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_saved_run_goes_on_exactly_before_at_and_after_the_change(name, stop):
    whole, broken = make(name, pixel_pct=0.3), make(name, pixel_pct=0.3)
    expected = steps(whole, 0, 6)
    first = steps(broken, 0, stop)
    resumed = make(name, pixel_pct=0.3)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    resumed.pixels.turn.zero_()
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    assert first + steps(resumed, stop, 6) == expected
    assert same(resumed, whole)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient_before_and_after_the_change(name):
    """Which several processes need: they wait for the gradient of each."""
    method = make(name, pixel_pct=0.5)
    for on_pixels in (True, False):
        assert method.on_pixels == on_pixels
        method.zero_grad()
        method(images(0)).loss.backward()
        trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
        without = [n for n, p in trained.items() if p.grad is None]
        assert without == [n for n in without if "cls_token" in n]  # data2vec's class token has no loss
        method.after_step(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_change_is_compiled_once_more_and_no_more(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    method, counter, counts = make(name, torch.float32, pixel_pct=0.5), CompileCounter(), []
    forward = torch.compile(method, backend=counter)
    for step in range(8):
        forward(images(step).float()).loss.backward()
        method.zero_grad()
        method.after_step((step + 1) / 8)
        counts.append(counter.frame_count)
    assert counts[3] == counts[1] and counts[7] == counts[5], counts


@pytest.mark.parametrize("name", NAMES)
def test_pixels_come_first_unless_the_encoder_is_trained(name):
    facts = dict(n_images=50_000, image_size=32, depth=6, recipe={}, device="cpu", native_bf16=True, cores=2)
    kind = methods.find(name)
    assert kind.derived(Facts(**facts))["pixel_pct"] == (0.125, "an untrained teacher says little")
    assert "pixel_pct" not in kind.derived(Facts(**facts, pretrained=True))
    assert "; pixels in the first 12.5 % of the run" in make(name, pixel_pct=0.125).describe()
    assert "pixels" not in make(name).describe()


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="pixel_pct"):
        make("data2vec", pixel_pct=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_alone_are_learned(name):
    """Smooth images, whose hidden patches follow from those seen."""
    method = make(name, torch.float32, pixel_pct=0.99, **({"n_masks": 2} if name == "data2vec2" else {}))
    coarse = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    x = nn.functional.interpolate(coarse, 16, mode="bicubic")
    masks = method.sample_masks(8, torch.device("cpu"))
    optimizer, losses = torch.optim.AdamW(method.param_groups(0.0), 3e-3), []
    for _ in range(150):
        loss = method(x, masks=masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.5)
        losses.append(loss.item())
    assert losses[-1] < (0.5 if name == "ijepa" else 0.3) * losses[0]  # its predictor is a transformer of small weights
