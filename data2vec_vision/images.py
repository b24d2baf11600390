"""From an image file to RGB pixels."""

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data2vec_vision.errors import one_line

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
