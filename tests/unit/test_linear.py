"""The linear probe against scikit-learn's logistic regression, its choice of the penalty, its memory."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Peer
from sklearn.preprocessing import StandardScaler
from test_probes import blobs

from data2vec_vision import linear, probes
from data2vec_vision.linear import LinearClassifier, LogisticRegression, linear_probe, standardisation
from data2vec_vision.probes import accuracy
from data2vec_vision.split import stratified_split


def uneven(count, seed=0):
    """Features of very different size and offset, some nearly the same, and one that does not vary."""
    features, labels = blobs(count, classes=4, dim=12, seed=seed)
    scale = torch.logspace(-3, 3, 12)
    features = torch.cat(
        [features * scale + 5 * scale, features[:, :1] * scale[:1] + 1e-4, torch.full((count, 1), 0.3)], 1
    )
    return features, labels


def peer(features, labels, strength, queries):
    scaler = StandardScaler().fit(features.double().numpy())
    x, q = (np.nan_to_num(scaler.transform(f.double().numpy())) for f in (features, queries))
    model = Peer(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000).fit(x, labels.numpy())
    return model.predict_proba(q), torch.from_numpy(model.predict(q))


@pytest.mark.parametrize("strength", [10.0, 0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype, precision", [(torch.float64, 1e-4), (torch.float32, 3e-2)])
def test_it_is_scikit_learns_at_every_penalty(strength, dtype, precision, monkeypatch):
    monkeypatch.setattr(probes, "CHUNK_VALUES", 14 * 100)  # several chunks
    features, labels = uneven(400)
    queries, _ = uneven(200, seed=1)
    model = LogisticRegression(features, labels, dtype=dtype).solve(strength)
    x = (queries.double() - model.mean) * model.scale
    probability = torch.softmax(x @ model.weight + model.bias, dim=1)
    expected, predicted = peer(features, labels, strength, queries)
    np.testing.assert_allclose(probability.numpy(), expected, atol=precision)
    assert (model.predict(queries) == predicted).float().mean() > 0.99
    assert accuracy(model.predict(queries), predicted) == 100 or dtype == torch.float32


def test_the_start_does_not_matter_and_two_classes_do(monkeypatch):
    features, labels = uneven(300)
    labels = (labels > 1).long() * 5 + 2  # classes need be neither four nor consecutive
    regression = LogisticRegression(features, labels)
    cold, warm = regression.solve(1e-3), regression.solve(1e-3, regression.solve(10.0))
    torch.testing.assert_close(cold.weight, warm.weight, rtol=1e-3, atol=1e-4)
    assert set(cold.predict(features).tolist()) == {2, 7}
    assert torch.equal(cold.predict(features), peer(features, labels, 1e-3 / 2, features)[1])  # see the docstring


def test_images_of_weight_zero_are_left_out_of_everything():
    features, labels = uneven(300)
    used = torch.zeros(300).index_fill_(0, torch.arange(200), 1.0)
    features[250] = 1e6
    some = LogisticRegression(features, labels, used).solve(1e-2)
    few = LogisticRegression(features[:200], labels[:200]).solve(1e-2)
    torch.testing.assert_close(some.mean, few.mean)
    torch.testing.assert_close(some.weight, few.weight, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_one_that_does_best_on_the_held_out_fifth():
    features, labels = blobs(300, dim=64, spread=3.0)
    model, tried = linear_probe(features, labels, seed=3)
    rest, held = (torch.from_numpy(part) for part in stratified_split(labels.numpy(), 0.2, 3))
    for strength, value in tried.items():
        by_peer = peer(features[rest], labels[rest], strength, features[held])[1]
        assert value == pytest.approx(accuracy(by_peer, labels[held]), abs=100 / len(held) + 1e-3)
    strengths = list(tried)
    assert strengths[0] == 10 and strengths == sorted(strengths, reverse=True)
    best = max(tried.values())
    assert model.strength == next(s for s in strengths if tried[s] == best)  # the strongest of the best
    first_counted = max(strengths.index(model.strength) + 1, linear.STRONGEST - linear.SURELY_WEAK)
    assert len(strengths) in (first_counted + linear.PATIENCE, linear.STRONGEST - linear.WEAKEST + 1)
    queries, truth = blobs(500, dim=64, spread=3.0, seed=1)
    by_peer = peer(features, labels, model.strength, queries)[1]
    assert accuracy(model.predict(queries), truth) == pytest.approx(accuracy(by_peer, truth), abs=0.1)


def test_of_equal_penalties_the_strongest_is_taken():
    features, labels = blobs(100, spread=0.1)  # which every penalty tells apart
    model, tried = linear_probe(features, labels, seed=0)
    perfect = [strength for strength, value in tried.items() if value == 100]
    assert model.strength == perfect[0] and list(tried)[-len(perfect) :] == perfect
    assert min(tried) == pytest.approx(10.0 ** (linear.SURELY_WEAK - linear.PATIENCE + 1))


def test_directions_that_hardly_vary_are_given_their_chance():
    """Where most of the variance is of no use, no strong penalty is better than another, and a weak one is."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    shared = torch.randn(600, 1, generator=g) @ torch.randn(1, 60, generator=g)
    weak = 1e-2 * torch.eye(3)[labels] @ torch.randn(3, 60, generator=g)
    model, tried = linear_probe(shared + weak, labels, seed=0)
    assert accuracy(model.predict(shared + weak), labels) > 95 and model.strength <= 0.1, tried


def test_features_that_depend_on_each_other_in_all_but_rounding_are_solved():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(400, 2, generator=g) @ torch.randn(2, 300, generator=g)
    features += 1e-4 * torch.randn(400, 300, generator=g)
    labels = (features[:, 0] > 0).long()
    model, _ = linear_probe(features, labels, seed=0)
    assert accuracy(model.predict(features), labels) > 90


def test_with_one_image_a_class_nothing_is_chosen():
    features, labels = torch.eye(3), torch.arange(3)
    model, tried = linear_probe(features, labels, seed=0)
    assert tried == {} and model.strength == linear.UNCHOSEN and model.predict(features).tolist() == [0, 1, 2]


def test_constant_features_stay_zero_and_identical_ones_do_no_harm():
    features, labels = torch.full((40, 3), 0.1), torch.arange(40) % 2
    assert standardisation(features)[1].tolist() == [0, 0, 0]
    model, _ = linear_probe(features, labels, seed=0)
    assert model.weight.abs().max() == 0 and model.weight.isfinite().all()


def test_predictions_are_the_formula(monkeypatch):
    monkeypatch.setattr(probes, "CHUNK_VALUES", 10)
    model = LinearClassifier(
        torch.tensor([4, 9]),
        torch.ones(2),
        torch.tensor([2.0, 0.0]),
        torch.tensor([[1.0, -1.0], [5.0, 0.0]]).double(),
        torch.tensor([0.0, 0.5]).double(),
        1.0,
    )
    assert model.predict(torch.tensor([[1.0, 9.0], [1.2, 0.0], [0.0, -100.0]] * 4)).tolist() == [9, 4, 9] * 4


def test_memory_is_bounded_by_chunks_and_not_by_the_images(monkeypatch):
    """Of 200,000 x 64 features no tensor as large is made when they are too many to keep; only chunks of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                largest = max(largest, result.numel() * result.element_size())
            return result

    monkeypatch.setattr(probes, "CHUNK_VALUES", 64 * 16384)
    monkeypatch.setattr(linear, "KEPT_BYTES", 10**6)
    monkeypatch.setattr(linear, "MAX_PASSES", 1)
    features, labels = torch.rand(200_000, 64), torch.arange(200_000) % 3
    queries = torch.randn(300, 64)
    with Largest():
        regression = LogisticRegression(features, labels)
        regression.solve(0.1).predict(features)
        probes.knn_classify(features, labels, queries, chunk=100, bank_chunk=16384)
        probes.few_shot(features, labels, queries, labels[:300], 5, seed=0, draws=2)
    assert 100 * 16384 * 4 <= largest <= 64 * 16384 * 8
    assert not regression.rows._kept
