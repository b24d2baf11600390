"""What a network is asked to predict: norms of a teacher's states, and whether a target still tells things apart.

Shapes: B batch, S patches, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data2vec_vision import distributed


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
    """(1 / L) sum of norm(h) over the hidden states of L blocks, each [B, S, D], in at least fp32.

    data2vec (Baevski et al. 2022, section 3.3) and data2vec 2.0; `norm` is "instance" or "layer". A `layer_norm`
    of it is their target.
    """
    total: Any = sum(NORMS[norm](at_least_fp32(h)) for h in hidden)  # one at a time: a stack would hold all L in fp32
    return total / len(hidden)


class PositionMean(nn.Module):
    """Takes from a target what its place alone tells: y - m, m [S, D] the running mean of y over images.

    A student can predict a teacher's state without looking at the image, from the place of a patch, and a teacher that
    follows such a student soon has nothing else to say: of data2vec 2.0's targets, 99 % of the variance came to be
    between places (benchmarks/RESULTS.md). DINO's centre (Caron et al. 2021, section 3.1), one for each place, closes
    that way out. `forward` uses the mean as it was before the step, so that slicing a step into passes or processes
    changes nothing; in the first step it is zero.
    """

    MOMENTUM = 0.9  # at first the plain mean of all steps

    mean: Tensor
    steps: Tensor
    total: Tensor
    passes: Tensor

    def __init__(self, n_patches: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_patches, width))
        self.register_buffer("steps", torch.zeros(()))
        # The sum of the means of this step's passes, which join `mean` after it, and their number: tensors, since a
        # compiled step would be compiled anew for each length of a list. A checkpoint lies between steps.
        self.register_buffer("total", torch.zeros(n_patches, width), persistent=False)
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """Targets of all places of some images, [B, S, D] -> the same shape."""
        if self.training:
            self.total += y.mean(dim=0)
            self.passes += 1
        return y - self.mean

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes up the means of the step's passes, over all processes."""
        new = distributed.mean(self.total / self.passes)
        self.total.zero_()
        self.passes.zero_()
        # A pass that was not finite must not spoil those to come; nor a step without any.
        finite = new.isfinite().all()
        share = torch.where(finite, (1 / (self.steps + 1)).clamp(min=1 - self.MOMENTUM), 0.0)
        self.mean += share * (new.nan_to_num() - self.mean)
        self.steps += finite


def target_health(target: Tensor, prediction: Tensor) -> dict[str, Tensor]:
    """For the log: the spread of targets and predictions [B, ..., D] as standard deviations, the mean over channels.

    `target_std` and `prediction_std` are over all tokens: a target with layer norm has unit variance whatever
    happens; what a collapse takes away is the spread over tokens. They are of the images that one
    process sees in a pass, and less where these are fewer; the verdict's figures are of all.
    """
    return {"target_std": spread(target.detach()), "prediction_std": spread(prediction.detach())}


def spread(x: Tensor) -> Tensor:
    """Mean over channels of the deviation over all tokens of [B, ..., D]; torch's std takes nine times longer."""
    flat = x.flatten(0, -2)
    return (flat - flat.mean(dim=0)).square_().mean(dim=0).sqrt().mean()
