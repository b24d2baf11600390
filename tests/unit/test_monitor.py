"""The figures that tell whether a run learns, against naive code."""

import math

import pytest
import torch
from torch.nn import functional as F

from data2vec_vision.monitor import health, health_sums, on_host, rankme

B, Q, D, S = 64, 5, 8, 12


def read(*passes, n_patches=S):
    """The figures after forward passes of (embedding, extras)."""
    sums = {}
    for embedding, extras in passes:
        for name, value in health_sums(embedding, extras, n_patches).items():
            sums[name] = sums.get(name, 0) + value
    return health(on_host(sums))


def predicted(seed=0, noise=0.5, images=1.0, places=1.0, count=B):
    """Targets that depend on the place and on the image as strongly as is asked, and predictions of them."""
    g = torch.Generator().manual_seed(seed)
    query = torch.stack([torch.randperm(S, generator=g)[:Q] for _ in range(count)])
    of_place = torch.randn(S, D, generator=torch.Generator().manual_seed(99))
    target = places * of_place[query] + images * torch.randn(count, Q, D, generator=g)
    prediction = target + noise * torch.randn(count, Q, D, generator=g)
    return torch.randn(count, D, generator=g), {"prediction": prediction, "target": target, "query": query}


def test_rankme_equals_the_papers_definition():
    z = torch.randn(100, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 20)
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + 1e-7
    assert rankme(z.double().T @ z.double()) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)
    values = read((z, {}))
    assert values["rankme"] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-3)


def test_rankme_is_the_number_of_directions():
    directions = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    for count in (1, 5, 20):
        z = (torch.eye(20)[:count] @ directions).repeat(4, 1)
        assert read((z, {}))["rankme"] == pytest.approx(count, rel=0.02)


def test_feature_std_is_that_of_unit_features():
    z = torch.randn(500, D, generator=torch.Generator().manual_seed(0)) + 2
    unit = F.normalize(z, dim=1)
    expected = (unit - unit.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    assert read((z, {}))["feature_std"] == pytest.approx(expected.item(), abs=1e-4)
    assert read((10 * z, {}))["feature_std"] == pytest.approx(expected.item(), abs=1e-4)
    assert read((torch.ones(64, D), {}))["feature_std"] < 1e-3


def test_r2_and_variances_equal_naive_code():
    embedding, extras = predicted()
    target, error = extras["target"].flatten(0, 1), (extras["prediction"] - extras["target"]).flatten(0, 1)
    place = extras["query"].flatten()
    values = read((embedding, extras))
    over_tokens = target.var(dim=0, unbiased=False).mean()
    assert values["target_variance_tokens"] == pytest.approx(over_tokens.item(), rel=1e-4)
    assert values["r2_constant"] == pytest.approx(1 - (error.square().mean() / over_tokens).item(), rel=1e-4)
    left = sum(target[place == s].var(dim=0).mean() * (place == s).sum() for s in range(S)) / len(target)
    assert values["target_variance_images"] == pytest.approx(left.item(), rel=1e-4)
    assert values["r2_position"] == pytest.approx(1 - (error.square().mean() / left).item(), rel=1e-4)


def test_who_knows_the_place_only_explains_nothing_beyond_it():
    embedding, extras = predicted(count=4000)
    of_place = torch.stack([extras["target"][extras["query"] == s].mean(dim=0) for s in range(S)])
    values = read((embedding, extras | {"prediction": of_place[extras["query"]]}))
    assert values["r2_position"] == pytest.approx(0, abs=0.01) and values["r2_constant"] > 0.3
    mean = extras["target"].flatten(0, 1).mean(dim=0).expand_as(extras["target"])
    assert read((embedding, extras | {"prediction": mean}))["r2_constant"] == pytest.approx(0, abs=1e-4)
    assert read((embedding, extras | {"prediction": extras["target"]}))["r2_position"] == pytest.approx(1, abs=1e-6)


def test_a_few_images_do_not_look_predictable():
    """With a place's mean fitted to its own two or three tokens, the naive variance would be far too small."""
    passes = [predicted(seed, noise=1.0, count=8) for seed in range(200)]
    mean = sum(read(p)["target_variance_images"] for p in passes) / len(passes)
    assert mean == pytest.approx(1.0, rel=0.05)


def test_targets_without_images_in_them():
    values = read(predicted(images=0.0, noise=0.1, count=500))
    assert values["target_variance_images"] == pytest.approx(0, abs=1e-5) and values["target_variance_tokens"] > 0.5
    assert values["r2_constant"] > 0.9 and (values["r2_position"] is None or values["r2_position"] < 0)
    collapsed = read(predicted(images=0.0, places=0.0))
    assert collapsed["r2_constant"] is None and collapsed["target_variance_tokens"] == 0


def test_passes_add_up_to_what_one_pass_gives():
    first, second = predicted(0), predicted(1)
    together = torch.cat([first[0], second[0]]), {n: torch.cat([first[1][n], second[1][n]]) for n in first[1]}
    apart = read(first, second)
    assert apart == pytest.approx(read(together), rel=1e-4)


def test_several_masks_an_image_and_methods_without_tokens():
    embedding, extras = predicted()
    blocks = {name: value.unflatten(0, (16, 4)) for name, value in extras.items()}  # [B, M, Q, ...]
    assert read((embedding, blocks)) == pytest.approx(read((embedding, extras)), rel=1e-5)
    no_tokens = {"target": torch.rand(B, 100), "log_prediction": torch.rand(B, 100)}
    assert read((embedding, no_tokens)).keys() == {"feature_std", "rankme"}


def test_numbers_that_are_not_finite_are_none_and_not_an_error():
    embedding, _ = predicted()
    embedding[0, 0] = math.nan
    assert read((embedding, {})) == {"feature_std": None, "rankme": None}
