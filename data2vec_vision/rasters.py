"""Images as arrays of numbers, of which parts can be had: the array itself, and NumPy's .npy files.

Shapes: H x W pixels of the image, h x w of a part, C channels as stored.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

NUMPY = b"\x93NUMPY"  # how such a file begins
BAND_BYTES = 2**24  # of rows that are read together, where the format does not say


@dataclass
class Raster:
    """What is known of an image from its header; a subclass reads its pixels."""

    format: str  # NumPy, TIFF ...
    height: int
    width: int
    channels: int
    dtype: np.dtype
    bits: int | None = None  # of unsigned integers whose range means something; None: values are as they are
    alpha: bool = False  # whether the last of four channels is opacity
    rows: int = 0  # that are best read together; 0: as many as are BAND_BYTES
    smaller: Sequence["Raster"] = ()  # the same image with fewer pixels, from large to small

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.dtype)
        if self.dtype.kind not in "buif":
            raise ValueError(f"its values are of the type {self.dtype}, which is no number of an image")
        if not self.height * self.width * self.channels:
            raise ValueError(f"it is empty: {self.height} x {self.width} pixels of {self.channels} channels")
        self.bits = self.bits or kept_bits(self.dtype)
        self.rows = self.rows or max(1, BAND_BYTES // (self.width * self.channels * self.dtype.itemsize))

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels of a part, [h, w, C]."""
        raise NotImplementedError

    def fine_enough(self, shrink: float) -> "Raster":
        """The smallest that there is of this image, of which more than `shrink` pixels become one."""
        fit = [raster for raster in self.smaller if self.height / raster.height <= shrink]
        return min(fit, key=lambda raster: raster.height, default=self)


@dataclass
class ArrayRaster(Raster):
    """An image that is an array, or becomes one when a part of it is asked for; a mapped file stays on the disk."""

    load: Callable[[], np.ndarray] = lambda: np.empty(0)  # [H, W, C]
    mapped: bool = False
    _pixels: np.ndarray | None = None

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        if self.mapped:  # anew each time: pages of a map that stays count as memory of this process
            return self.load()[top : top + height, left : left + width]
        if self._pixels is None:
            refuse_too_large(self.height * self.width * self.channels * self.dtype.itemsize)
            self._pixels = self.load()
        return self._pixels[top : top + height, left : left + width]


def kept_bits(dtype: np.dtype) -> int | None:
    """The bits of values that become shares of their range: unsigned integers of up to 16, and truths."""
    if dtype.kind == "b":
        return 1
    return 8 * dtype.itemsize if dtype.kind == "u" and dtype.itemsize <= 2 else None


def refuse_too_large(size: int) -> None:
    """Raises DecompressionBombError for so many bytes in one piece; the limit is Pillow's of pixels, times three."""
    limit = 6 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if size > limit:
        raise Image.DecompressionBombError(f"{size:,} bytes are one piece for the decoder; the limit is {limit:,}")


def numpy_raster(file: BinaryIO) -> Raster:
    """A .npy file: H x W, H x W x C or C x H x W. The smaller of the first and the last axis is the channels.

    A file of the disk is mapped, so that only what is looked at is read.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("the array is structured, not of plain numbers")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {list(shape)} is no image: H x W, H x W x C or C x H x W")
    start = file.tell()
    on_disk = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)

    def load() -> np.ndarray:
        if on_disk:
            pixels: Any = np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")
        else:
            file.seek(start)
            pixels = np.ndarray(shape, dtype, file.read(), order="F" if fortran else "C")
        return channels_last(pixels)

    first = len(shape) == 3 and shape[0] < shape[2]
    height, width, channels = (*shape, 1) if len(shape) == 2 else (shape[1], shape[2], shape[0]) if first else shape
    return ArrayRaster("NumPy", height, width, channels, dtype, load=load, mapped=on_disk)


def channels_last(pixels: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] -> [H, W, C], without a copy."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    return pixels.transpose(1, 2, 0) if pixels.shape[0] < pixels.shape[2] else pixels
