"""From an array of numbers, or only parts of it, to the channels that were asked for.

Shapes: H x W pixels of a result, h x w of a part of the image, C channels as stored, N as asked for.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

from data2vec_vision.errors import OtherChannels, explained
from data2vec_vision.rasters import BAND_BYTES, ArrayRaster, Raster, refuse_too_large
from data2vec_vision.resampling import FINE, resized, resized_in_bands

Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the upright image
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: what red, green and blue are worth in grey
KEPT_BYTES = 2**26  # of an image as float32: up to that all of it is read and kept
GLIMPSES, GLIMPSE = 4, 256  # parts a side that the statistics of a larger image are taken of, pixels a side of each


class ArrayPicture:
    """An image of N channels, of which crops can be had: float32 tensors, of three channels uint8 as of any photo.

    Unsigned integers of 8 and 16 bits become shares of their range, all other numbers stay as they are, and what is
    not finite becomes 0. With three channels other numbers are stretched between the least and the greatest. One
    channel of an image in colour is its grey, three of a grey one are that; transparency is laid over white. Raises
    OtherChannels for an image with another number of channels; all methods raise Unreadable.
    """

    def __init__(self, raster: Raster, channels: int):
        C = raster.channels
        if not (channels == C or (channels in (1, 3) and (C in (1, 3) or raster.alpha))):
            raise OtherChannels(C, channels)
        self.raster, self.channels = raster, channels
        self.format = raster.format
        self.size = raster.width, raster.height
        self._kept: Tensor | None = None

    @classmethod
    def blank(cls, channels: int, side: int = 64) -> "ArrayPicture":
        """Nothing but zeros."""
        zeros = np.zeros((side, side, channels), np.float32)
        return cls(ArrayRaster("none", side, side, channels, zeros.dtype, load=lambda: zeros), channels)

    @property
    def is_large(self) -> bool:
        """Whether parts of it are read when they are needed, and never all of it."""
        return 4 * self.raster.height * self.raster.width * max(self.channels, self.raster.channels) > KEPT_BYTES

    def crops(self, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What is in each of the boxes, resized to (H, W) in `sizes` by bicubic interpolation: [N, H, W] each."""
        with explained():
            return [self._finished(self._part(box, size, True)) for box, size in zip(boxes, sizes, strict=True)]

    def resized(self, size: tuple[int, int]) -> Tensor:
        """All of it, resized to `size` by bilinear interpolation: [N, H, W]."""
        with explained():
            if self.channels == 3 and not self.is_large:  # as photos are, which have been bytes before
                return pil_to_tensor(resize(self.image(), list(size), InterpolationMode.BILINEAR))
            return self._finished(self._part((0, 0, self.raster.height, self.raster.width), size, False))

    def image(self, most: int | None = None) -> "Image.Image | Tensor":
        """All of it: a PIL image of three channels, else float32 [N, h, w]; a large one with `most` pixels a side."""
        with explained():
            h, w = self.raster.height, self.raster.width
            if most is not None and self.is_large:
                pixels = self.resized(within(h, w, most))
            else:
                refuse_too_large(h * w * self.channels * (1 if self.channels == 3 else 4))
                pixels = self._finished(self._whole())
            return to_pil_image(pixels) if self.channels == 3 else pixels

    def glimpses(self) -> Tensor:
        """What tells its statistics, as `image` has its values, [N, h, w]: all of it, or some parts side by side."""
        with explained():
            h, w = self.raster.height, self.raster.width
            if not self.is_large:
                return self._finished(self._whole())
            down, across = (np.linspace(0, max(0, side - GLIMPSE), GLIMPSES).astype(int).tolist() for side in (h, w))
            parts = [self._values(self.raster.window(y, x, GLIMPSE, GLIMPSE)) for y in down for x in across]
            return self._finished(torch.cat([part.flatten(0, 1) for part in parts]).T[:, None])

    def _finished(self, pixels: Tensor) -> Tensor:
        """As bytes, where those of a photo are wanted."""
        return (255 * pixels).round_().clamp_(0, 255).byte() if self.channels == 3 else pixels

    def _whole(self) -> Tensor:
        if self._kept is None:
            pixels = self._values(self.raster.window(0, 0, self.raster.height, self.raster.width))
            pixels = pixels.permute(2, 0, 1).contiguous()
            if self.is_large:
                return pixels
            self._kept = pixels
        return self._kept

    def _part(self, box: Box, size: tuple[int, int], cubic: bool) -> Tensor:
        """float32 [N, H, W], with no more read or decoded than has to be."""
        top, left, h, w = box
        if not self.is_large:
            return resized(self._whole()[:, top : top + h, left : left + w], size, cubic)
        raster = self.raster.fine_enough(min(h / size[0], w / size[1]) / FINE)
        if raster is not self.raster:
            down, across = raster.height / self.raster.height, raster.width / self.raster.width
            top, left = min(int(top * down), raster.height - 1), min(int(left * across), raster.width - 1)
            h, w = (max(1, round(side)) for side in (h * down, w * across))
            h, w = min(h, raster.height - top), min(w, raster.width - left)
        if 4 * h * w * max(self.channels, raster.channels) <= BAND_BYTES:
            return resized(self._values(raster.window(top, left, h, w)).permute(2, 0, 1), size, cubic)

        def read(start: int, stop: int) -> Tensor:
            return self._values(raster.window(top + start, left, stop - start, w))

        # The first band would end inside a row of tiles, each of which would be decoded twice.
        return resized_in_bands(read, (h, w), size, cubic, raster.rows, first=raster.rows - top % raster.rows)

    def _values(self, part: np.ndarray) -> Tensor:
        """Pixels as stored, [h, w, C], as the values asked for: float32 [h, w, N]."""
        values = torch.from_numpy(part.astype(np.float32, order="C"))
        if self.raster.bits is not None:
            values /= 2**self.raster.bits - 1
        else:
            values.nan_to_num_(0.0, 0.0, 0.0)
            if self.channels == 3:
                low, high = self._range
                values.sub_(low).div_(max(high - low, 1e-12))
        if self.raster.alpha and self.channels in (1, 3):
            values = values[..., :3] * values[..., 3:] + (1 - values[..., 3:])
        if self.channels == 1 and values.shape[2] == 3:
            return values @ torch.tensor(LUMA)[:, None]
        return values.expand(-1, -1, 3) if self.channels == 3 and values.shape[2] == 1 else values

    @cached_property
    def _range(self) -> tuple[float, float]:
        """The least and the greatest number."""
        low, high, raster = np.inf, -np.inf, self.raster
        for top in range(0, raster.height, raster.rows):
            rows = raster.window(top, 0, min(raster.rows, raster.height - top), raster.width).astype(np.float32)
            rows = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
            low, high = min(low, float(rows.min())), max(high, float(rows.max()))
        return low, high


def grey(colours: Tensor) -> Tensor:
    """[3, h, w] -> [1, h, w]."""
    red, green, blue = colours
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[None]


def within(height: int, width: int, most: int) -> tuple[int, int]:
    """(height, width) with the same proportions and at most so many pixels a side."""
    scale = min(1.0, most / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class GreyPicture:
    """The grey of a photo: the picture itself, 8-bit RGB, and what it gives as one channel, float32 in [0, 1]."""

    channels = 1

    def __init__(self, photo: Any):
        self.photo, self.size, self.format, self.as_stored = photo, photo.size, photo.format, photo.as_stored

    def crops(self, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [grey(crop / 255) for crop in self.photo.crops(boxes, sizes)]

    def resized(self, size: tuple[int, int]) -> Tensor:
        if self.photo.is_huge:
            return grey(self.photo.resized(size) / 255)
        return resized(self.image(), size, cubic=False)

    def image(self, most: int | None = None) -> Tensor:
        with explained():
            return grey(pil_to_tensor(self.photo.image(most)) / 255)

    def glimpses(self) -> Tensor:
        return grey(self.photo.glimpses() / 255)
