"""What a network is asked to predict: norms of a teacher's states, and whether a target still tells things apart.

Shapes: B batch, S patches, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm(x: Tensor) -> Tensor:
    """Each token over its channels, without parameters: [B, S, D]."""
    return F.layer_norm(x, x.shape[-1:])


def instance_norm(x: Tensor) -> Tensor:
    """Each channel of an image over its patches, without parameters: [B, S, D]."""
    return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)


NORMS = {"instance": instance_norm, "layer": layer_norm}


def mean_of_blocks(hidden: Sequence[Tensor], norm: str) -> Tensor:
    """LN((1 / L) sum of norm(h)) over the hidden states of L blocks, each [B, S, D], in at least fp32.

    data2vec (Baevski et al. 2022, section 3.3) and data2vec 2.0; `norm` is "instance" or "layer".
    """
    total: Any = sum(NORMS[norm](at_least_fp32(h)) for h in hidden)  # one at a time: a stack would hold all L in fp32
    return layer_norm(total / len(hidden))


def target_health(target: Tensor, prediction: Tensor) -> dict[str, Tensor]:
    """For the log: the spread of targets and predictions [B, ..., D] as standard deviations, the mean over channels.

    `target_std` and `prediction_std` are over all tokens: a target with layer norm has unit variance whatever
    happens; what a collapse takes away is the spread over tokens.
    """
    return {"target_std": spread(target.detach()), "prediction_std": spread(prediction.detach())}


def spread(x: Tensor) -> Tensor:
    """Mean over channels of the deviation over all tokens of [B, ..., D]; torch's std takes nine times longer."""
    flat = x.flatten(0, -2)
    return (flat - flat.mean(dim=0)).square_().mean(dim=0).sqrt().mean()
