"""What a folder of images is like: each image looked at once, as training would see it, and what they add up to.

What has to be known of every single image is a row of fixed width in one array, so that ten million images
take half a gigabyte and not ten; all else is counted or summed.
"""

import hashlib
import os
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data2vec_vision.arrays import ArrayPicture
from data2vec_vision.duplicates import BANDS, look
from data2vec_vision.errors import why_unreadable
from data2vec_vision.images import AnyPicture, Picture
from data2vec_vision.sources import ImageFolder

LARGEST = 1024  # pixels a side of what is looked at of an image that is too large to be decoded whole
CHUNK = 16  # images that a worker looks at before it answers
ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 2 to 8 are turned or mirrored
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}
RECORD = np.dtype(
    [
        ("width", "u4"),  # pixels, upright; 0 for an image that cannot be read
        ("height", "u4"),
        ("content", "u8", (2,)),  # a hash of the file's bytes
        ("look", "u2", (BANDS,)),
        ("blank", "?"),  # all pixels have one colour
    ]
)


@dataclass
class Survey:
    """What is known of N images, or of the stretch of them that starts at `first`."""

    records: np.ndarray  # RECORD [N]
    first: int = 0
    bad: dict[int, str] = field(default_factory=dict)  # why images cannot be read, by index
    formats: Counter[str] = field(default_factory=Counter)  # JPEG, PNG ...
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's, as stored: RGB, L, P, CMYK, I;16 ...
    traits: Counter[str] = field(default_factory=Counter)  # what may surprise, in the words below
    moments: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))  # sums of each image's means of x and x^2
    bytes: int = 0  # of the files that can be read
    seconds: float = 0.0  # spent in reading and decoding, over all workers

    @classmethod
    def of(cls, n_images: int) -> "Survey":
        return cls(np.zeros(n_images, RECORD))

    def add(self, other: "Survey") -> None:
        self.records[other.first : other.first + len(other.records)] = other.records
        self.bad |= other.bad
        self.formats += other.formats
        self.modes += other.modes
        self.traits += other.traits
        self.moments += other.moments
        self.bytes += other.bytes
        self.seconds += other.seconds

    @property
    def readable(self) -> np.ndarray:
        """The indices of the images that can be read."""
        return np.flatnonzero(self.records["width"])

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of red, green and blue in [0, 1], over all pixels of all images, each image weighing the same."""
        mean, square = self.moments / max(1, len(self.readable))
        return mean, np.sqrt(np.maximum(square - mean**2, 0))


GREY_IN_COLOUR = "grey, stored in colour"
TURNED = "turned by EXIF"
TRANSPARENT = "with transparency, laid over white"
DEEP = "more than 8 bits a channel, reduced to 8"
ANIMATED = "several frames, the first is taken"


class Chunks(Dataset):
    """Number n -> the survey of images [n * CHUNK, (n + 1) * CHUNK)."""

    def __init__(self, source: ImageFolder):
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> Survey:
        indices = range(number * CHUNK, min((number + 1) * CHUNK, len(self.source)))
        survey = Survey(np.zeros(len(indices), RECORD), indices.start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as sources.decode does
            for row, index in enumerate(indices):
                examine_safely(self.source, index, survey, row)
        return survey


def examine_safely(source: ImageFolder, index: int, survey: Survey, row: int) -> None:
    """`examine`, but of an image that cannot be read the reason is noted."""
    try:
        examine(source, index, survey, row)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        survey.bad[index] = why_unreadable(error)


def examine(source: ImageFolder, index: int, survey: Survey, row: int) -> None:
    """Note image `index` of `source` in `row` and the sums of `survey`. Raises what decoders raise for a bad file."""
    start = time.perf_counter()
    with source.open(index) as file:
        picture = Picture.of(file)
        image = picture.as_stored if isinstance(picture, Picture) else None
        stored, deep = stored_as(picture)
        turned = image is not None and image.getexif().get(ORIENTATION) in range(2, 9)  # of a PNG this decodes it
        seen: Any = picture.image(LARGEST)
        survey.seconds += time.perf_counter() - start
        traits = {TURNED: turned, DEEP: deep}
        if image is not None:
            traits |= {TRANSPARENT: image.has_transparency_data, ANIMATED: is_animated(image)}
        size, content = file.seek(0, os.SEEK_END), hashed(file)
    # Of 256 brightnesses in each channel, how many pixels have each; far quicker than sums over the pixels.
    counts = np.array(seen.histogram(), np.float64).reshape(3, 256) / (seen.width * seen.height)
    levels = np.arange(256) / 255
    traits[GREY_IN_COLOUR] = stored.split(";")[0] not in GREY_MODES and is_grey(seen, counts)
    blank = bool((counts.max(axis=1) == 1).all())
    survey.records[row] = (*picture.size, content, look(seen), blank)
    survey.moments += counts @ levels, counts @ levels**2
    survey.formats[picture.format or "?"] += 1
    survey.modes[stored] += 1
    survey.traits.update(name for name, present in traits.items() if present)
    survey.bytes += size


def stored_as(picture: AnyPicture) -> tuple[str, bool]:
    """Pillow's mode of a picture, or its channels and the type of its numbers; and whether it has more than 8 bits."""
    if isinstance(picture, ArrayPicture):
        raster = picture.raster
        return f"{raster.channels} x {raster.dtype}", raster.dtype.itemsize > 1
    return picture.as_stored.mode, has_deep_channels(picture)


def hashed(file: BinaryIO) -> tuple[int, ...]:
    """A hash of all bytes of a file, as two numbers of 64 bits."""
    file.seek(0)
    content = hashlib.blake2b(digest_size=16)
    while block := file.read(1 << 20):
        content.update(block)
    return tuple(np.frombuffer(content.digest(), np.uint64).tolist())


def has_deep_channels(picture: Any) -> bool:
    """Whether a picture of Pillow's stores more than 8 bits a channel: Pillow may open 16-bit colour as 8-bit."""
    return picture.as_stored.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in picture.tiles)


def is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a later frame is damaged, and nobody reads it
        return True


def is_grey(image: Image.Image, counts: np.ndarray) -> bool:
    """Whether all pixels of an RGB image are grey; `counts` are its histograms, which differ for most that are not."""
    if (counts != counts[0]).any():
        return False
    red, green, blue = (np.asarray(band) for band in image.split())
    return bool((red == green).all() and (green == blue).all())
