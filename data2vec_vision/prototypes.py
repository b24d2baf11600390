"""Clustering without labels: prototypes, the balanced assignment of samples to them, and their mean entropy.

Shapes: B samples of this process, K prototypes, D width. Cosines lie in [-1, 1]; probabilities are kept as logarithms,
in which a temperature of 0.025 neither overflows nor underflows. Statistics are those of all processes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data2vec_vision import distributed


class Prototypes(nn.Module):
    """K learned directions: projections [B, D] -> cosines with each, [B, K], in the precision of the projections."""

    def __init__(self, n_prototypes: int, dim: int):
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(n_prototypes, dim).uniform_(-bound, bound))

    def forward(self, projections: Tensor) -> Tensor:
        """Both sides are normalised here, so a gradient moves directions only (MSN)."""
        with torch.autocast(projections.device.type, enabled=False):
            return F.normalize(projections, dim=-1) @ F.normalize(self.weight, dim=-1).T

    def scores(self, units: Tensor) -> Tensor:
        """Scalar products of unit vectors [B, D] with the prototypes as they are stored: [B, K] (SwAV, section 3.1)."""
        with torch.autocast(units.device.type, enabled=False):
            return units @ self.weight.T

    def no_weight_decay(self) -> set[str]:
        """Only the direction of a prototype counts."""
        return {"weight"}

    @torch.no_grad()
    def renormalize(self) -> None:
        """Puts the stored prototypes back on the unit sphere, as SwAV does before each step."""
        self.weight.data = F.normalize(self.weight.data, dim=-1)


@torch.no_grad()
def sinkhorn(log_scores: Tensor, iterations: int = 3) -> Tensor:
    """Balanced assignments: log-scores [B, K] -> probabilities [B, K], each row a sample's, over all processes.

    Alternately gives every prototype the same share of all samples and every sample the weight one
    (Caron et al. 2020, SwAV, section 3.1; Cuturi 2013). It ends with the samples, so each row sums to
    one, and the prototypes' shares are equal up to what is left after `iterations`. Other log-scores:
    cosines / epsilon in SwAV, the logarithms of the sharpened probabilities in MSN.
    """
    log_q = log_scores.to(torch.promote_types(log_scores.dtype, torch.float32))
    for _ in range(iterations):
        log_q = log_q - distributed.logsumexp(log_q)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


def mean_entropy_gap(log_probabilities: Tensor) -> Tensor:
    """ln K - H(p), p the mean of the probabilities over the samples of all processes: [B, K] -> scalar >= 0.

    Zero when the samples spread evenly over the prototypes; it is what keeps MSN from collapse
    (Assran et al. 2022, section 3, where H is maximised).
    """
    p = distributed.mean_with_gradient(log_probabilities.exp().mean(dim=0))
    # The logarithm is clamped, because xlogy has no gradient where a prototype is so rare that p underflows.
    return math.log(len(p)) + torch.special.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum()


@torch.no_grad()
def prototype_use(targets: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """Whether the prototypes are alive, for the log, over all processes.

    `prototypes_used` of K are somebody's first choice among the targets [B, K], `target_max` is the mean of their
    largest probability. In units of ln K, in [0, 1], `target_entropy` is the mean of their entropies, and `entropy`
    that of the mean prediction, by its `mean_entropy_gap`.
    """
    first = torch.zeros(targets.shape[1], device=targets.device).index_fill_(0, targets.argmax(dim=1), 1.0)
    return {
        "prototypes_used": distributed.total(first).clamp(max=1).sum(),
        "target_max": targets.amax(dim=1).mean(),
        "target_entropy": torch.special.entr(targets).sum(dim=1).mean() / math.log(targets.shape[1]),
        "entropy": 1 - gap.detach() / math.log(targets.shape[1]),
    }
