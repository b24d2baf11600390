"""Mean and deviation of each channel, by which images are normalised.

Shapes: C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data2vec_vision.errors import InputError, Unreadable
from data2vec_vision.sources import ImageFolder, opened_picture
from data2vec_vision.transforms import ImageTransform

MEASURED = 1000  # images, at most
SHOWN = 8  # channels whose figures are said


@dataclass(frozen=True)
class Normalization:
    mean: tuple[float, ...]
    std: tuple[float, ...]
    where_from: str  # in words
    note: str = ""

    def __str__(self) -> str:
        more = " ..." if len(self.mean) > SHOWN else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values[:SHOWN]) for values in (self.mean, self.std))
        return f"mean {mean}{more}, deviation {std}{more} ({self.where_from})"


def chosen(normalize: str, channels: int, of_weights: Mapping[str, Any], source: ImageFolder) -> Normalization:
    """What `--normalize` asks for; "auto" is what first weights were trained with, ImageNet's, or else measured."""
    if normalize == "auto" and of_weights and len(of_weights["mean"]) == channels:
        return Normalization(tuple(of_weights["mean"]), tuple(of_weights["std"]), "of the first weights")
    if normalize == "imagenet" or (normalize == "auto" and channels == 3):
        usual = ImageTransform.of_channels((1, 1), channels)
        return Normalization(usual.mean, usual.std, "ImageNet's")
    return measured(source, channels)


def measured(source: ImageFolder, channels: int) -> Normalization:
    """Of up to MEASURED images spread over the source, each weighing the same; of values in [0, 1] where bytes are.

    A channel that is constant keeps its deviation of 1. Raises InputError when none of the images can be read.
    """
    N, count = len(source), 0
    moments, reason = torch.zeros(2, channels, dtype=torch.float64), ""
    for index in torch.linspace(0, N - 1, min(MEASURED, N)).round().long().tolist():
        try:
            with opened_picture(source, index, channels) as picture:
                moments += moments_of(picture.glimpses())
        except Unreadable as error:
            reason = reason or str(error)
            continue
        count += 1
    if not count:
        raise InputError(f"none of the images looked at can be read, to measure their mean; the first: {reason}")
    mean, square = moments / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    constant = std <= 1e-6 * mean.abs()  # what is less is rounding
    std = torch.where(constant, 1.0, std)
    note = ""
    if bool(constant.any()):
        which = ", ".join(str(n + 1) for n in constant.nonzero().flatten().tolist())
        note = f"constant in these images, and left as it is: channel {which}"
    images = f"{count:,} image{'s' * (count != 1)}"
    return Normalization(tuple(mean.float().tolist()), tuple(std.float().tolist()), f"measured on {images}", note)


def moments_of(pixels: Tensor) -> Tensor:
    """The means of x and of x^2, [2, C], of an image [C, h, w], in [0, 1] where it is of bytes."""
    values = pixels.double().flatten(1)
    if pixels.dtype == torch.uint8:
        values = values / 255
    return torch.stack([values.mean(dim=1), values.square().mean(dim=1)])
