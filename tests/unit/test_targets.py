"""Targets against naive code: every block counts alike, and a collapse shows in the spread over tokens."""

import pytest
import torch

from data2vec_vision.targets import (
    PositionMean,
    at_least_fp32,
    instance_norm,
    layer_norm,
    mean_of_blocks,
    spread,
    target_health,
)


def states(count=3, batch=2, patches=5, width=8):
    """Hidden states of blocks whose scales and offsets differ by orders of magnitude, as in a deep ViT."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(count, batch, patches, width, generator=generator, dtype=torch.float64)
    return [10.0**n * (h + n) for n, h in enumerate(draws)]


def normal(values):
    """A vector with mean zero and variance one (biased), number by number."""
    values = values.tolist()
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return torch.tensor([(v - mean) / (variance + 1e-5) ** 0.5 for v in values], dtype=torch.float64)


def naive_layer_norm(h):
    return torch.stack([torch.stack([normal(token) for token in image]) for image in h])


def naive_instance_norm(h):
    return torch.stack([torch.stack([normal(channel) for channel in image.T]).T for image in h])


NAIVE = {"layer": naive_layer_norm, "instance": naive_instance_norm}


def test_norms_equal_naive_code():
    for h in states():
        torch.testing.assert_close(layer_norm(h), naive_layer_norm(h), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(instance_norm(h), naive_instance_norm(h), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_mean_of_blocks_equals_naive_code(norm, count):
    blocks = states(count)
    mean = sum(NAIVE[norm](h) for h in blocks) / count
    torch.testing.assert_close(mean_of_blocks(blocks, norm), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_a_block_with_large_numbers_counts_no_more_than_the_others(norm):
    blocks = states()
    louder = [blocks[0], blocks[1], 1000 * blocks[2]]
    torch.testing.assert_close(mean_of_blocks(louder, norm), mean_of_blocks(blocks, norm), rtol=1e-4, atol=1e-4)


def test_images_are_normalised_one_by_one():
    blocks = states(batch=3)
    alone = [h[1:2] for h in blocks]
    for norm in ("instance", "layer"):
        torch.testing.assert_close(mean_of_blocks(blocks, norm)[1:2], mean_of_blocks(alone, norm))


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_half_precision_states_are_computed_in_fp32(norm, dtype):
    half = [(h / 10).to(dtype) for h in states()]
    target = mean_of_blocks(half, norm)
    assert target.dtype == torch.float32
    exact = mean_of_blocks([h.double() for h in half], norm)
    torch.testing.assert_close(target.double(), exact, rtol=1e-4, atol=1e-4)


def test_at_least_fp32_raises_and_never_lowers():
    given = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [at_least_fp32(torch.ones(2, dtype=dtype)).dtype for dtype in given] == [torch.float32] * 3 + [torch.float64]


def test_target_health_is_the_spread_over_all_tokens_of_the_batch():
    target, prediction = states(2)
    health = target_health(target, prediction.requires_grad_())
    for name, x in (("target_std", target), ("prediction_std", prediction)):
        spreads = []
        for channel in range(8):
            values = [token[channel].item() for image in x for token in image]
            mean = sum(values) / len(values)
            spreads.append((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
        assert health[name].item() == pytest.approx(sum(spreads) / 8)
        assert health[name].shape == () and not health[name].requires_grad


def test_target_health_sees_a_collapse_that_a_layer_norm_hides():
    """One vector for every token has unit variance over its channels, as any target with a layer norm."""
    torch.manual_seed(0)
    collapsed = layer_norm(torch.randn(1, 1, 64)).expand(4, 10, 64)
    assert collapsed.var(dim=-1, unbiased=False).min() > 0.99
    assert target_health(collapsed, collapsed)["target_std"] < 1e-6
    healthy = layer_norm(torch.randn(4, 10, 64))
    assert target_health(healthy, collapsed)["target_std"] > 0.8
    assert target_health(healthy.view(2, 2, 10, 64), collapsed)["target_std"] > 0.8


def test_the_spread_is_torchs_standard_deviation():
    x = 3 + 2 * torch.randn(4, 50, 16, generator=torch.Generator().manual_seed(0))
    expected = x.flatten(0, 1).std(dim=0, unbiased=False).mean()
    torch.testing.assert_close(spread(x), expected)
    assert target_health(x, 2 * x)["prediction_std"] == pytest.approx(2 * expected.item(), rel=1e-5)


def by_place(passes, places=5, width=8):
    """Targets that are one vector a place, and a little of each image."""
    generator = torch.Generator().manual_seed(1)
    of_place = torch.randn(places, width, generator=generator, dtype=torch.float64)
    return [of_place + 0.1 * torch.randn(4, places, width, generator=generator, dtype=torch.float64) for _ in passes]


def test_the_position_mean_is_a_running_mean_over_images():
    """The plain mean of the first ten steps, then a tenth of each new one; each step uses what was known before it."""
    centre, expected = PositionMean(5, 8).double(), torch.zeros(5, 8, dtype=torch.float64)
    for step, y in enumerate(by_place(range(30))):
        torch.testing.assert_close(centre(y), y - expected)
        share = max(1 / (step + 1), 0.1)
        expected = [[(1 - share) * expected[s][d] + share * y[:, s, d].sum() / 4 for d in range(8)] for s in range(5)]
        expected = torch.tensor(expected, dtype=torch.float64)
        centre.after_step()
    torch.testing.assert_close(centre.mean, expected)


def test_the_position_mean_leaves_nothing_of_what_is_the_same_in_all_images():
    centre = PositionMean(5, 8).double()
    steps = by_place(range(50))
    for y in steps:
        left = centre(y)
        centre.after_step()
    before, after = (x.mean(dim=0).square().mean() for x in (steps[-1], left))
    assert after < 0.02 * before
    assert left.var(dim=0).mean() == pytest.approx(steps[-1].var(dim=0).mean().item())  # and all of what is not


def test_passes_of_a_step_are_one_for_the_position_mean():
    whole, sliced = PositionMean(5, 8).double(), PositionMean(5, 8).double()
    for y in by_place(range(3)):
        expected = whole(y)
        whole.after_step()
        torch.testing.assert_close(torch.cat([sliced(part) for part in y.split(2)]), expected)
        sliced.after_step()
    torch.testing.assert_close(sliced.mean, whole.mean)


def test_the_position_mean_of_a_pass_that_is_not_finite_is_left_out():
    centre = PositionMean(5, 8).double()
    first, second = by_place(range(2))
    centre(first)
    centre.after_step()
    known = centre.mean.clone()
    centre(torch.full_like(first, torch.nan))
    centre.after_step()
    torch.testing.assert_close(centre.mean, known)
    centre(second)
    centre.after_step()
    torch.testing.assert_close(centre.mean, (first.mean(dim=0) + second.mean(dim=0)) / 2)


def test_the_position_mean_rests_in_eval_mode_and_travels_in_a_checkpoint():
    centre = PositionMean(5, 8).double()
    centre(by_place(range(1))[0])
    centre.after_step()
    copy = PositionMean(5, 8).double()
    copy.load_state_dict(centre.state_dict())
    copy.eval()(torch.ones(4, 5, 8, dtype=torch.float64))
    copy.after_step()
    torch.testing.assert_close(copy.mean, centre.mean)
    assert copy.steps == 1
