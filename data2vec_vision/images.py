"""From an image file to pixels: the whole image in RGB, or only crops of it, which takes less time.

Shapes: H x W pixels of a crop that was asked for.
"""

import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize_image, to_pil_image

from data2vec_vision.errors import one_line

BICUBIC = InterpolationMode.BICUBIC
JPEG = b"\xff\xd8\xff"  # how such a file begins
ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 2 to 8 are turned or mirrored
REDUCE = 1.5  # times as fine as needed, at least, stays an image that the decoder makes smaller
Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the upright image

# Formats that Pillow recognises without being able to decode them by itself, and EPS, a program to be run.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_suffixes() -> frozenset[str]:
    """The lower-case file suffixes, with their dot, of all formats that Pillow can read here."""
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in UNDECODABLE
    )


def decode(file: BinaryIO) -> Image.Image:
    """The first frame of an image file as `as_seen` makes it. Raises as `opened` and `as_seen` do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that does not matter; what cannot be decoded raises
        return as_seen(opened(file))


def opened(file: BinaryIO) -> Image.Image:
    """An image file with its header read. Raises UnidentifiedImageError for one that Pillow cannot make out."""
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        why = "of no format that Pillow reads" if file.seek(0, os.SEEK_END) else "it is empty"
        raise UnidentifiedImageError(f"cannot identify image file: {why}") from error


def as_seen(image: Image.Image) -> Image.Image:
    """An opened image as every job of this tool sees it: upright, in RGB, 8 bits a channel.

    EXIF orientation is applied and transparency is laid over white. Greys of more than 8 bits are scaled,
    where Pillow's own conversion would clip them: 16 bits by their range of 65,536, 32 bits and floats by the
    image's own range, unless 32 bits hold values that fit into 16. Raises whatever Pillow raises for a file
    that is damaged, truncated or too large.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, np.uint16) >> 8)
    if image.mode == "I":
        pixels = np.asarray(image)
        low, high = int(pixels.min()), int(pixels.max())
        # Pillow has opened 16-bit PNGs in this mode too.
        return _grey(pixels >> 8) if low >= 0 and high < 65536 else _stretched(pixels)
    if image.mode == "F":
        return _stretched(np.nan_to_num(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _stretched(pixels: np.ndarray) -> Image.Image:
    low, high = float(pixels.min()), float(pixels.max())
    return _grey((pixels - low) * (255 / max(high - low, 1e-12)))


def _grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


class Unreadable(Exception):
    """An image that cannot be read; the text says why, in one line."""


@contextmanager
def explained() -> Iterator[None]:
    """Any error inside becomes Unreadable: damaged files make decoders raise nearly anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that does not matter; what cannot be decoded raises
            yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(why_unreadable(error)) from error


class Picture:
    """An image, upright, in RGB, 8 bits a channel, of which crops can be had; only its header is read at once.

    `image` is Pillow's, opened but not loaded, and `file` what it was opened from, where that is at hand. The
    pixels are those of `as_seen`, but for two short cuts, both of JPEGs: one that needs no turning is decoded by
    torchvision, which has the same decoder with less around it; and where all crops are much larger than what is made
    of them, the decoder itself makes the image smaller, by 2, 4 or 8, so that it stays at least REDUCE times as large
    as needed. All methods raise Unreadable. Not for use by two threads at once.
    """

    def __init__(self, image: Image.Image, file: BinaryIO | None = None):
        with explained():
            self._image, self._file = image, file
            self._is_jpeg = file is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            self._turn = image.getexif().get(ORIENTATION, 1)
            self._pixels: Tensor | None = None
            self.size = image.size[::-1] if self._turn in (5, 6, 7, 8) else image.size  # width and height, as seen

    @classmethod
    def of(cls, file: BinaryIO) -> "Picture":
        """The picture in a file that can seek and stays open as long as the picture is used."""
        with explained():
            start = file.read(len(JPEG))
            file.seek(0)
            if start == JPEG:  # the most frequent format, and Pillow would try others first
                file = io.BytesIO(file.read())
                return cls(Image.open(file, formats=["JPEG", "MPO"]), file)
            return cls(opened(file), file)

    @classmethod
    def decoded(cls, pixels: Tensor) -> "Picture":
        """The picture of pixels at hand: uint8 [3, height, width]."""
        picture = cls.__new__(cls)
        picture._pixels, picture._is_jpeg, picture.size = pixels, False, (pixels.shape[2], pixels.shape[1])
        return picture

    def image(self) -> Image.Image:
        """All of it."""
        with explained():
            return to_pil_image(self._pixels) if self._pixels is not None else as_seen(self._image)

    def pixels(self) -> Tensor:
        """All of it, as crops are made of: uint8 [3, height, width]."""
        with explained():
            if self._pixels is None:
                self._pixels = self._decoded()
            return self._pixels

    def crops(self, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What is in each of the boxes, resized to (H, W) in `sizes` by bicubic interpolation: uint8 [3, H, W] each."""
        if not boxes:
            return []
        with explained():
            if self._pixels is None and self._is_jpeg:
                shrink = min(min(box[2] / size[0], box[3] / size[1]) for box, size in zip(boxes, sizes, strict=True))
                if factor := next((k for k in (8, 4, 2) if k * REDUCE <= shrink), None):
                    return self._reduced_crops(factor, boxes, sizes)
            pixels = self.pixels()
            return [resized_crop(pixels, box, size) for box, size in zip(boxes, sizes)]

    def _decoded(self) -> Tensor:
        if self._is_jpeg and self._turn == 1 and torchvision_reads_jpeg():
            self._file.seek(0)
            return decode_jpeg(torch.frombuffer(bytearray(self._file.read()), dtype=torch.uint8), ImageReadMode.RGB)
        return pil_to_tensor(as_seen(self._image))

    def _reduced_crops(self, factor: int, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        self._file.seek(0)
        image = opened(self._file)
        image.draft(image.mode, (image.width // factor, image.height // factor))
        image = as_seen(image)
        # The last column and row may stand for fewer pixels than the others; turned, they come first.
        x = image.width - self.size[0] / factor if self._turn in (2, 3, 6, 7) else 0.0
        y = image.height - self.size[1] / factor if self._turn in (3, 4, 7, 8) else 0.0
        found = []
        for (top, left, height, width), (H, W) in zip(boxes, sizes):
            edges = (x + left / factor, y + top / factor, x + (left + width) / factor, y + (top + height) / factor)
            found.append(pil_to_tensor(image.resize((W, H), Image.Resampling.BICUBIC, box=edges)))
        return found


def resized_crop(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """What is in the box, resized to `size`: uint8 [3, height, width] -> [3, H, W]."""
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    # What lies in one piece, pixel by pixel, is resized fastest.
    return resize_image(part.contiguous(memory_format=torch.channels_last), list(size), BICUBIC)[0]


@functools.cache
def torchvision_reads_jpeg() -> bool:
    """Whether this torchvision was built with a JPEG decoder."""
    smallest = io.BytesIO()
    Image.new("RGB", (8, 8)).save(smallest, "JPEG")
    try:
        decode_jpeg(torch.frombuffer(bytearray(smallest.getvalue()), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as `train` and `extract` see it: upright, in RGB; see `decode`."""
    with open(path, "rb") as file:
        return decode(file)


def why_unreadable(error: Exception) -> str:
    """The reason in one line, without what the name of the file says already."""
    if isinstance(error, FileNotFoundError):
        return "no such file, or a link to one"
    if isinstance(error, OSError):  # the system's, whose text repeats the path, or Pillow's own
        return error.strerror or one_line(error).removeprefix("OSError: ").removeprefix("UnidentifiedImageError: ")
    return one_line(error)
