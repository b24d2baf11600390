"""How good features are, told by labels that training never saw."""

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_classify(
    features: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018, section 3.4).

    features [N, D] and their labels [N] in [0, classes), queries [Q, D] -> (predicted labels [Q], indices of the
    k nearest features [Q, k], nearest first). A neighbour of similarity s votes with exp(s / temperature).
    Ties go to the lower label. `chunk` queries are compared at a time.
    """
    k = min(k, len(features))
    bank, classes = F.normalize(features.float(), dim=1), int(labels.max()) + 1
    predicted, neighbours = [], []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        similarity, index = (part @ bank.T).topk(k, dim=1)
        # Relative to the nearest, so that exp() cannot overflow; it scales all votes of a query alike.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, labels[index], weight)
        predicted.append(votes.argmax(dim=1))
        neighbours.append(index)
    return torch.cat(predicted), torch.cat(neighbours)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of labels [Q] that were predicted, in per cent."""
    return 100 * (predicted == labels).float().mean().item()
