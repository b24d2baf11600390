"""kNN and few-shot classification against scikit-learn and naive code."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from data2vec_vision.probes import accuracy, chunks, few_shot, knn_classify, mean_of


def blobs(count, classes=7, dim=16, seed=0, spread=1.5):
    """Features around a centre for each class, off the origin, and their labels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) + 0.5
    labels = torch.randint(classes, (count,), generator=g)
    return centres[labels] + spread * torch.randn(count, dim, generator=g), labels


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (20, 0.01)])
def test_knn_is_scikit_learns(k, temperature):
    features, labels = blobs(500)
    queries, _ = blobs(300, seed=1)
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / temperature), algorithm="brute")
    expected = peer.fit(features.double().numpy(), labels.numpy()).predict(queries.double().numpy())
    predicted, nearest = knn_classify(features, labels, queries, k, temperature)
    assert predicted.tolist() == expected.tolist()
    assert nearest.tolist() == peer.kneighbors(queries.double().numpy())[1].tolist()


@pytest.mark.parametrize("chunk, bank_chunk", [(1, 1000), (7, 13), (64, 1), (1000, 20), (1000, 10), (33, 499)])
def test_chunks_do_not_change_the_neighbours(chunk, bank_chunk):
    features, labels = blobs(500)
    queries, _ = blobs(50, seed=1)
    expected = knn_classify(features, labels, queries)
    predicted, nearest = knn_classify(features, labels, queries, chunk=chunk, bank_chunk=bank_chunk)
    assert torch.equal(nearest, expected[1]) and torch.equal(predicted, expected[0])


def test_as_many_neighbours_as_features_are_still_in_order():
    features, labels = blobs(20)
    queries, _ = blobs(5, seed=1)
    whole = knn_classify(features, labels, queries, k=20)[1]
    assert torch.equal(knn_classify(features, labels, queries, k=20, bank_chunk=10)[1], whole)
    assert torch.equal(knn_classify(features, labels, queries, k=50)[1], whole)


def test_tick_is_called_as_it_goes_and_may_stop_everything():
    features, labels = blobs(100)
    calls = []
    knn_classify(features, labels, features, chunk=10, tick=lambda: calls.append(1))
    assert len(calls) == 10

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        knn_classify(features, labels, features, tick=stop)


def naive_few_shot(features, labels, queries, query_labels, chosen):
    centre = features.mean(0)
    placed = [(f - centre) / (f - centre).norm() for f in features]
    right = 0
    for query, truth in zip(queries, query_labels):
        q = (query - centre) / (query - centre).norm()
        scores = {}
        for label, images in chosen.items():
            mean = sum(placed[i] for i in images) / len(images)
            scores[label] = float(q @ mean / mean.norm())
        right += max(scores, key=scores.get) == int(truth)
    return 100 * right / len(queries)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_equals_naive_code(monkeypatch, shots):
    from data2vec_vision import probes

    features, labels = blobs(120, classes=4)
    labels = labels * 3  # classes need not be consecutive
    queries, truth = blobs(60, classes=4, seed=1)
    drawn, original = [], probes.first_of_each_class

    def noted(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(probes, "first_of_each_class", noted)
    monkeypatch.setattr(probes, "CHUNK_VALUES", 16 * 25)  # several chunks
    found = few_shot(features, labels, queries, truth * 3, shots, seed=0, draws=4)
    assert len(found) == 4 and len({str(d.tolist()) for d in drawn}) == 4
    for value, images in zip(found, drawn):
        chosen = {int(labels[row[0]]): row.tolist() for row in images}
        assert sorted(chosen) == [0, 3, 6, 9]
        assert all(len(set(row)) == shots and set(labels[row].tolist()) == {c} for c, row in chosen.items())
        assert value == pytest.approx(naive_few_shot(features, labels, queries, truth * 3, chosen), abs=1e-4)


def test_few_shot_draws_depend_on_the_seed_and_more_shots_keep_the_first():
    labels = torch.arange(5).repeat(30)
    from data2vec_vision.probes import first_of_each_class, generator

    one, ten = (first_of_each_class(labels, n, generator(0, "shots", 0)) for n in (1, 10))
    assert torch.equal(ten[:, :1], one)
    features, queries = torch.randn(150, 8), torch.randn(40, 8)
    truth = labels[:40]
    assert few_shot(features, labels, queries, truth, 5, 0) == few_shot(features, labels, queries, truth, 5, 0)
    assert few_shot(features, labels, queries, truth, 5, 0) != few_shot(features, labels, queries, truth, 5, 1)
    with pytest.raises(ValueError, match="fewer than 31"):
        few_shot(features, labels, queries, truth, 31, 0)


def test_means_are_those_of_all_rows(monkeypatch):
    from data2vec_vision import probes

    monkeypatch.setattr(probes, "CHUNK_VALUES", 40)
    features = torch.randn(33, 8) + 1e4
    assert len(list(chunks(features))) == 7
    torch.testing.assert_close(mean_of(features), features.double().mean(0))
    weights = torch.rand(33)
    expected = (weights.double() @ features.double()) / weights.double().sum()
    torch.testing.assert_close(mean_of(features, weights), expected)


def test_accuracy_is_in_per_cent():
    assert accuracy(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 3, 4])) == 75.0
    right = torch.arange(2000) < 1035
    assert accuracy(right, torch.ones(2000, dtype=torch.bool)) == 51.75
