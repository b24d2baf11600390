"""Is it learning? Figures that need no labels, from what a training step computes anyway.

Shapes: B images, S patches, D width, T predicted tokens. Everything is a sum over images or tokens, so micro-batches
and processes only add up.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 2048  # images that a reading is taken over


@torch.no_grad()
def health_sums(embedding: Tensor, extras: Mapping[str, Tensor], n_patches: int) -> dict[str, Tensor]:
    """The sums that `health` reads, of one forward pass.

    embedding [B, D]: one vector an image, of what the student saw of it; without one there are no sums. Where `extras`
    has `prediction` and `target` [..., D] at the patches `query` [...], in [0, S), what a method predicts is followed
    too, place by place.
    """
    z = embedding.detach()
    if z.dim() != 2:  # of a method of somebody's own
        return {}
    z = z.float() if z.device.type == "mps" else z.double()  # singular values near zero get lost in a fp32 Gram matrix
    sums = {"images": z.new_full((), len(z)), "directions": F.normalize(z, dim=1).sum(dim=0), "gram": z.T @ z}
    query = extras.get("query")
    if query is None or not {"prediction", "target"} <= extras.keys() or extras["target"].shape[:-1] != query.shape:
        return sums
    place = query.flatten()
    target = extras["target"].detach().float().flatten(0, -2)
    error = extras["prediction"].detach().float().flatten(0, -2) - target

    def by_place(values: Tensor) -> Tensor:
        return values.new_zeros(n_patches, *values.shape[1:]).index_add_(0, place, values)

    return sums | {
        "tokens": by_place(torch.ones_like(target[:, 0])),
        "target": by_place(target),
        "target_square": by_place(target.square().sum(dim=1)),
        "error_square": by_place(error.square().sum(dim=1)),
    }


def on_host(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums in float64 on the CPU, in a single copy."""
    flat = torch.cat([value.flatten() for value in sums.values()]).cpu().double()
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts)}


def health(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """What `health_sums`, added up over WINDOW images or so and `on_host`, say; None for what is not defined.

    feature_std: standard deviation of the unit embeddings, in [0, 1]; 0 when those of all views point one way.
    rankme: effective rank of the embeddings, in [1, D] (Garrido et al. 2023, equation 1).
    target_variance_tokens: variance of the targets a channel, over all tokens; target_variance_images: the part of it
    that is left between images at one place.
    r2_constant: share of the first variance that the predictions explain, 1 when perfect and 0 for a model that
    always says the mean; r2_position: share of the second, 0 for a model that knows the place and not the image.
    """
    values: dict[str, float | None] = {}
    mean_direction = sums["directions"] / sums["images"]
    values["feature_std"] = (1 - mean_direction.square().sum()).clamp(min=0).sqrt().item()
    values["rankme"] = rankme(sums["gram"])
    if "tokens" in sums:
        values |= token_health(sums)
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def token_health(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """The part of `health` about what is predicted, place by place."""
    n = sums["tokens"]
    D, total = sums["target"].shape[1], n.sum()
    mean = sums["target"].sum(dim=0) / total
    tokens = (sums["target_square"].sum() / total - mean.square().sum()) / D
    # Each place's own mean takes one degree of freedom of its tokens.
    seen = n > 1
    n, error = n[seen], sums["error_square"][seen].sum()
    of_place = sums["target_square"][seen] - sums["target"][seen].square().sum(dim=1) / n
    left = (of_place * n / (n - 1)).sum()
    images = left / n.sum() / D
    return {
        "target_variance_tokens": tokens.clamp(min=0).item(),
        "target_variance_images": images.clamp(min=0).item(),
        "r2_constant": explained(sums["error_square"].sum(), tokens * total * D),
        "r2_position": explained(error, left),
    }


def explained(error: Tensor, variation: Tensor) -> float | None:
    """1 - error / variation, or None where there is no variation to speak of."""
    return (1 - error / variation).item() if variation > 1e-9 else None


def rankme(gram: Tensor) -> float | None:
    """exp of the entropy of the singular values of Z [N, D], from its Gram matrix Z^T Z [D, D]."""
    if not gram.isfinite().all():
        return None
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()
