"""Where images come from: what an INPUT_PATH may be, several of them at once, and an image of a source."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import pairwise
from pathlib import PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from data2vec_vision import archives, shards
from data2vec_vision.errors import InputError, OtherChannels, Unreadable, explained
from data2vec_vision.folders import LIST_SUFFIXES, LOOKED_FOR, TABLE_SUFFIXES, ImageFolder, ImageList, NoImages
from data2vec_vision.images import AnyPicture, Picture

FIRST = 20  # images whose channels are compared with those that were asked for
Given = str | os.PathLike[str]  # an INPUT_PATH


def open_source(given: Given | Sequence[Given]) -> ImageFolder:
    """The images at one INPUT_PATH or at several. Raises InputError for a path that holds none.

    It may be a folder of images, a list of them (.txt, .list, .csv), an archive (.zip, .tar, .parquet, .arrow), a
    pattern such as 'shards/*.tar' or 'shards-{000..012}.tar', a folder of archives, or one that `save_to_disk` wrote.
    """
    if not isinstance(given, str | os.PathLike):
        return Several([os.fspath(path) for path in given]) if len(given) != 1 else open_source(given[0])
    path = os.fspath(given)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return saved_or_folder(path)
    if shards.is_pattern(path):
        return shards.matching(path)
    if suffix in LIST_SUFFIXES + TABLE_SUFFIXES:
        return ImageList(path)
    if os.path.exists(path):
        archives.refuse_compressed(path)
    if shards.is_archive(path):
        return shards.Archives([path])
    return ImageFolder(path)


def saved_or_folder(folder: str) -> ImageFolder:
    """A data set that was saved to a folder, the images below it, or else those in the archives below it."""
    if (source := shards.saved(folder)) is not None:
        return source
    try:
        return ImageFolder(folder)
    except NoImages as error:
        if not any(suffix in error.skipped for suffix in shards.SUFFIXES):
            raise
    return shards.in_folder(folder)


class Several(ImageFolder):
    """The images of several sources: one source after the other, in the sorted order of their paths as given.

    So the order of the arguments does not matter. A name is that of the image in its source behind the path of the
    source as it was given: "a/1.jpg" and "b.zip/1.jpg". Raises InputError when two sources lie in one another, or
    one of them is a list of images that are in another, by the first LOOKED_FOR of the list.
    """

    def __init__(self, given: Sequence[str]):
        pairs = sorted((self._prefix(path), path) for path in given)
        self._prefixes = [prefix for prefix, _ in pairs]
        self.sources = [open_source(path) for _, path in pairs]
        refuse_nested([(place, path) for (_, path), source in zip(pairs, self.sources) for place in source.places()])
        refuse_listed({path: source for (_, path), source in zip(pairs, self.sources)})
        self.root = os.getcwd()
        self.are_files = all(source.are_files for source in self.sources)
        self.skipped = sum((source.skipped for source in self.sources), Counter())
        self._starts = np.cumsum([0, *map(len, self.sources)], dtype=np.int64)

    @staticmethod
    def _prefix(path: str) -> str:
        path = shards.base_of(path) if shards.is_pattern(path) else path
        path = os.path.normpath(path).replace(os.sep, "/")
        return "" if path == "." else f"{path}/"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        """Which source image `index` is in, and its index there."""
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    def name(self, index: int) -> str:
        number, index = self._at(index)
        return f"{self._prefixes[number]}{self.sources[number].name(index)}"

    def path(self, index: int) -> str:
        number, index = self._at(index)
        return self.sources[number].path(index)

    def open(self, index: int) -> BinaryIO:
        number, index = self._at(index)
        return self.sources[number].open(index)

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for prefix, source in zip(self._prefixes, self.sources):
            digest.update(f"{prefix}\0{source.fingerprint()}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def would_take_in(self, path: Given) -> bool:
        return any(source.would_take_in(path) for source in self.sources)

    def places(self) -> list[str]:
        return [place for source in self.sources for place in source.places()]


def refuse_nested(places: Sequence[tuple[str, str]]) -> None:
    """Raises InputError when one of the places, each with the INPUT_PATH it is of, is or lies in another."""
    parts_of = sorted((PurePath(os.path.realpath(place)).parts, path) for place, path in places)
    for (parts, path), (next_parts, next_path) in pairwise(parts_of):
        if next_parts[: len(parts)] == parts:
            raise InputError(
                f"{path} and {next_path} are one, or one lies in the other, so that images would count twice; give one"
            )


def refuse_listed(sources: Mapping[str, ImageFolder]) -> None:
    """Raises InputError when a list among the sources names images of another, by its first LOOKED_FOR."""
    folders = {path: source for path, source in sources.items() if type(source) is ImageFolder}
    for listed, source in sources.items():
        if not isinstance(source, ImageList):
            continue
        for image in map(source.path, range(min(len(source), LOOKED_FOR))):
            if within := next((path for path, folder in folders.items() if folder.would_take_in(image)), None):
                raise InputError(
                    f"{listed} lists images of {within}, such as {image}, so that they would count twice; give one"
                )


@contextmanager
def opened_picture(source: ImageFolder, index: int, channels: int = 3) -> Iterator[AnyPicture]:
    """Image `index` with so many `channels`, its header read. Raises Unreadable, which has the reason in one line."""
    with explained():
        file = source.open(index)
    with file:
        yield Picture.of(file, channels)


def sizes_of_some(source: ImageFolder, count: int) -> list[tuple[int, int]]:
    """(width, height) of up to `count` images from all over the source, by their headers; not of unreadable ones."""
    found = []
    for index in range(0, len(source), -(-len(source) // count)):
        with suppress(Unreadable), opened_picture(source, index) as picture:
            found.append(picture.size)
    return found


def read_image(
    source: ImageFolder, index: int, channels: int = 3, most: int | None = None
) -> Image.Image | Tensor | str:
    """Image `index` in RGB, or, for a file that cannot be read, the reason in one line.

    With other than three `channels` it is float32 [C, H, W]. One that is too large to be read whole has `most` pixels
    a side, if given.
    """
    try:
        with opened_picture(source, index, channels) as picture:
            return picture.image(most)
    except Unreadable as error:
        return str(error)


def other_channels(source: ImageFolder, index: int, channels: int) -> int | None:
    """How many channels image `index` has, where it cannot be read for these; None for one that is damaged."""
    try:
        with opened_picture(source, index, channels):
            return channels
    except OtherChannels as error:
        return error.channels
    except Unreadable:
        return None


def check_channels(source: ImageFolder, channels: int) -> None:
    """Raises InputError when the first images, up to FIRST, all have one other number of channels.

    In a folder as it should be only its first image is opened.
    """
    if other_channels(source, 0, channels) == channels:
        return
    found = {theirs for index in range(min(len(source), FIRST)) if (theirs := other_channels(source, index, channels))}
    if len(found) == 1 and (theirs := found.pop()) != channels:
        raise InputError(
            f"the images have {theirs} channel{'s' * (theirs != 1)}, such as {source.name(0)}; "
            f"give --channels {theirs}, not {channels}"
        )
