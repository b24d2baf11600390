"""Where images come from: an index that stays small, and the way from a file to RGB pixels.

A source holds its names as one byte buffer and an array of offsets, not as Python strings, so that ten
million of them fit in memory once and are not copied when workers start.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from data2vec_vision.errors import InputError, one_line

# Formats that Pillow recognises without being able to decode them by itself, and EPS, a program to be run.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_suffixes() -> frozenset[str]:
    """The lower-case file suffixes, with their dot, of all formats that Pillow can read here."""
    return frozenset(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in UNDECODABLE
    )


class ImageFolder:
    """The images below a folder, at any depth, in the sorted order of their relative paths.

    Names have forward slashes on every system. Hidden files and folders are passed over; links are
    followed, each folder once. Raises InputError when there is no such folder or no image in it.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.path.abspath(root)
        check_is_folder(root)
        names, ends, other = bytearray(), [0], 0
        suffixes = image_suffixes()
        for name in _files(self.root, "", set()):
            if os.path.splitext(name)[1].lower() in suffixes:
                names += os.fsencode(name)
                ends.append(len(names))
            else:
                other += 1
        if len(ends) == 1:
            found = f"{other:,} files in it, but none is an image" if other else "it is empty"
            raise InputError(f"no images in {root}: {found}; images are files such as .jpg .png .tif .webp .bmp")
        self._names = np.frombuffer(bytes(names), np.uint8)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """The path of image `index` relative to the folder, with forward slashes."""
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]].tobytes())

    def open(self, index: int) -> BinaryIO:
        """The file of image `index`, opened for reading."""
        return open(os.path.join(self.root, self.name(index)), "rb")

    def fingerprint(self) -> str:
        """A hash of all names: two sources with the same one hold the same images in the same order."""
        return hashlib.blake2b(self._ends.tobytes() + self._names.tobytes(), digest_size=16).hexdigest()


def check_is_folder(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless `path` is a folder that can be read."""
    if not os.path.exists(path):
        raise InputError(f"there is no folder {path}")
    if not os.path.isdir(path):
        raise InputError(f"{path} is a file, not a folder; give the folder that holds the images")
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"the folder {path} cannot be read; check its permissions")


def _files(root: str, below: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Relative paths of the visible files, in sorted order without sorting them all at once."""
    here = os.path.join(root, below)
    try:
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            visible = [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".") and not _is_special(e)]
    except OSError as error:
        raise InputError(f"cannot look into the folder {here}: {error.strerror}") from error
    # "a/x" sorts behind "a-b/x": a folder takes its place by its name with the slash that follows.
    for name, is_folder in sorted(visible, key=lambda e: os.fsencode(e[0] + "/" if e[1] else e[0])):
        if is_folder:
            yield from _files(root, below + name + "/", seen)
        else:
            yield below + name


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether this is a pipe, a socket or a device, which could be waited for without end."""
    return not entry.is_dir() and not entry.is_file() and os.path.exists(entry.path)


def open_source(path: str | os.PathLike[str]) -> ImageFolder:
    """The images at INPUT_PATH. Raises InputError for a path that holds none."""
    return ImageFolder(path)


def decode(file: BinaryIO) -> Image.Image:
    """The first frame of an image file, upright, in RGB, 8 bits a channel.

    EXIF orientation is applied and transparency is laid over white. Greys of more than 8 bits are scaled,
    where Pillow's own conversion would clip them: 16 bits by their range of 65,536, 32 bits and floats by the
    image's own range, unless 32 bits hold values that fit into 16. Raises whatever Pillow raises for a file
    that is damaged, truncated or too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that does not matter; what cannot be decoded raises
        image: Image.Image = Image.open(file)
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


def read_image(source: ImageFolder, index: int) -> Image.Image | str:
    """Image `index` in RGB, or, for a file that cannot be read, the reason in one line."""
    try:
        with source.open(index) as file:
            return decode(file)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        return one_line(error)
