"""How good features are, told by labels that training never saw: nearest neighbours and nearest class means.

Pure functions of tensors. N features and Q queries, both [*, D]; they stay where they are, also in a memory-mapped
file, and are moved to `device` a chunk at a time, so that memory does not grow with their number.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from data2vec_vision.seeding import generator

QUERY_CHUNK, BANK_CHUNK = 1024, 16384  # rows: 64 MB of similarities
CHUNK_VALUES = 2**24  # of features that are looked at at a time: 64 MB
DRAWS = 20  # of the labelled images of few-shot classification


def nothing() -> None:
    """What happens after a chunk unless told otherwise."""


def knn_classify(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = QUERY_CHUNK,
    bank_chunk: int = BANK_CHUNK,
    device: torch.device | None = None,
    tick: Callable[[], None] = nothing,
) -> tuple[Tensor, Tensor]:
    """Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018, section 3.4).

    features [N, D] and their labels [N] in [0, classes), queries [Q, D] -> (predicted labels [Q], indices of the
    k nearest features [Q, k], nearest first), on the device of the labels. A neighbour of similarity s votes with
    exp(s / temperature). Ties go to the lower label. `chunk` queries are compared with `bank_chunk` features at a
    time, on `device` (by default where the features are); `tick` is called after every chunk and may raise.
    """
    device, classes = device or features.device, int(labels.max()) + 1
    labels_there = labels.to(device)
    predicted, neighbours = [], []
    for part in queries.split(chunk):
        part = F.normalize(part.to(device).float(), dim=1)
        similarity, index = nearest(part, features, k, bank_chunk)
        # Relative to the nearest, so that exp() cannot overflow; it scales all votes of a query alike.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, labels_there[index], weight)
        predicted.append(votes.argmax(dim=1).to(labels.device))
        neighbours.append(index.to(labels.device))
        tick()
    return torch.cat(predicted), torch.cat(neighbours)


def nearest(queries: Tensor, features: Tensor, k: int, bank_chunk: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity and index of the k features nearest to each normalised query, [Q, k] each, nearest first."""
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(features), bank_chunk):
        bank = F.normalize(features[start : start + bank_chunk].to(queries.device).float(), dim=1)
        similarity, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
        best, where = torch.cat([best, similarity], dim=1), torch.cat([where, index + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where


def chunks(features: Tensor, columns: int = 1) -> Iterator[slice]:
    """Slices of the rows with at most CHUNK_VALUES values each, of features or of `columns` computed of a row."""
    step = max(1, CHUNK_VALUES // max(columns, features[0].numel()))
    return (slice(start, start + step) for start in range(0, len(features), step))


def mean_of(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean [D] of features [N, D], weighted by `weights` [N] where given; float64, on the CPU."""
    weights = torch.ones(len(features), device=features.device) if weights is None else weights
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in chunks(features):
        total += weights[part].double() @ features[part].double()
    return (total / weights.double().sum()).cpu()


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of labels [Q] that were predicted, in per cent."""
    return 100 * int((predicted == labels).sum()) / len(labels)  # a mean in fp32 would make 51.7499 of 51.75


@torch.no_grad()
def few_shot(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    shots: int,
    seed: int,
    draws: int = DRAWS,
    device: torch.device | None = None,
    tick: Callable[[], None] = nothing,
) -> list[float]:
    """Accuracy in per cent of the nearest class mean with `shots` labelled images a class, for each of `draws` draws.

    SimpleShot with CL2N (Wang et al. 2019): all features [N, D] and queries [Q, D] are centred on the mean of the
    features and scaled to length 1; a class is the mean of its images; the nearest by cosine wins. The images are
    drawn under `seed`; with more shots the same ones and more. Raises ValueError where a class has fewer images.
    """
    device, classes = device or features.device, labels.unique()
    if int(labels.bincount()[classes].min()) < shots:
        raise ValueError(f"a class has fewer than {shots} images")
    centre = mean_of(features).to(device).float()

    def placed(rows: Tensor) -> Tensor:
        return F.normalize(rows.to(device).float() - centre, dim=1)

    means = []
    for draw in range(draws):
        chosen = first_of_each_class(labels, shots, generator(seed, "shots", draw))  # [C, shots]
        rows = placed(features[chosen.flatten()]).view(len(classes), shots, -1)
        means.append(F.normalize(rows.mean(dim=1), dim=1))
    right = torch.zeros(draws)
    for part in chunks(queries, len(classes)):
        query, truth = placed(queries[part]), query_labels[part]
        for draw, mean in enumerate(means):
            predicted = classes[(query @ mean.T).argmax(dim=1).to(classes.device)]
            right[draw] += (predicted == truth).sum().cpu()
        tick()
    return (100 * right / len(queries)).tolist()


def first_of_each_class(labels: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices [C, count] of images of each class in `labels` [N], the first `count` of a random order."""
    order = torch.randperm(len(labels), generator=random)
    order = order[labels[order].sort(stable=True).indices]
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[counts > 0]
    return order[starts.unsqueeze(1) + torch.arange(count)]
