"""How good features are, told by labels that training never saw: kNN, a linear probe, few-shot classification.

Pure functions of tensors. N features and Q queries, both [*, D]; they stay where they are, also in a memory-mapped
file, and are moved to `device` a chunk at a time, so that memory does not grow with their number.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_CHUNK, BANK_CHUNK = 1024, 16384  # rows: 64 MB of similarities


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


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of labels [Q] that were predicted, in per cent."""
    return 100 * (predicted == labels).float().mean().item()
