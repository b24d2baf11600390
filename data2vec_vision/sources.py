"""Where images come from: an index that stays small.

A source holds its names as one byte buffer and an array of offsets, not as Python strings, so that ten
million of them fit in memory once and are not copied when workers start.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from data2vec_vision.errors import InputError, OtherChannels, Unreadable, explained
from data2vec_vision.images import AnyPicture, Picture, image_suffixes

LIST_SUFFIXES = (".txt", ".list")  # of files that list images
FIRST = 20  # images whose channels are compared with those that were asked for
SUFFIXES = 1000  # told apart among files that are no images
LOOKED_FOR = 100  # the first files of a list: when none of them exists, the list is taken to be wrong


class ImageFolder:
    """The images below a folder, at any depth, in the sorted order of their relative paths.

    Names have forward slashes on every system. Hidden files and folders are passed over; links are
    followed, each folder once. Raises InputError when there is no such folder or no image in it.
    """

    def __init__(self, root: str | os.PathLike[str]):
        check_is_folder(root)
        self.root = os.path.abspath(root)
        self.skipped: Counter[str] = Counter()  # files that are no images, by their suffix
        self._hold(os.fsencode(name) for name in self._found())
        if len(self) == 0:
            other = self.skipped.total()
            found = f"{other:,} files in it, but none is an image" if other else "it is empty"
            raise InputError(f"no images in {root}: {found}; images are files such as .jpg .png .tif .webp .bmp")

    def _found(self) -> Iterator[str]:
        suffixes = image_suffixes()
        for name in _files(self.root, "", set()):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                yield name
            else:  # where dots do not set suffixes apart, there can be as many as files
                self.skipped[suffix if suffix in self.skipped or len(self.skipped) < SUFFIXES else "..."] += 1

    def _hold(self, names: Iterable[bytes]) -> None:
        together, ends = bytearray(), array("q", [0])
        for name in names:
            together += name
            ends.append(len(together))
        self._names = np.frombuffer(bytes(together), np.uint8)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        """The path of image `index` relative to the folder, with forward slashes."""
        return os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]].tobytes())

    def open(self, index: int) -> BinaryIO:
        """The file of image `index`, opened for reading."""
        return open(self._path(index), "rb")

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def fingerprint(self) -> str:
        """A hash of all names: two sources with the same one hold the same images in the same order."""
        return hashlib.blake2b(self._ends.tobytes() + self._names.tobytes(), digest_size=16).hexdigest()

    def would_take_in(self, path: str | os.PathLike[str]) -> bool:
        """Whether an image written to `path` would be one of these images the next time."""
        return Path(path).resolve().is_relative_to(Path(self.root).resolve())


class ImageList(ImageFolder):
    """The images that a text file lists, one path a line, absolute or relative to the folder of the list.

    The order is that of the sorted lines; `name` gives an image as the list has it, without a leading "./".
    Empty lines are passed over. A file that is missing is an image that cannot be read. Raises InputError for a
    file that is no such list, that has a line twice, or of whose first LOOKED_FOR files none exists.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.root = os.path.dirname(os.path.abspath(path))
        self.skipped = Counter()
        try:
            self._hold(_checked(_sorted_lines(path), path))
        except OSError as error:
            raise InputError(f"the list {path} cannot be read: {error.strerror}") from error
        if len(self) == 0:
            raise InputError(f"the list {path} is empty; write the path of an image in each line")
        first = range(min(len(self), LOOKED_FOR))
        if not any(os.path.exists(self._path(index)) for index in first):
            raise InputError(
                f"of the first {len(first)} files that {path} lists none exists, such as {self._path(0)}; "
                f"paths in it must be absolute, or relative to {self.root}"
            )

    def open(self, index: int) -> BinaryIO:
        path = self._path(index)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe could be waited for without end
            raise OSError("this is a folder or a device, not a file")
        return open(path, "rb")

    def would_take_in(self, path: str | os.PathLike[str]) -> bool:
        return False


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a list that are not empty, without their ends and a leading "./"."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # by which some editors mark UTF-8
            if b"\0" in line:
                raise InputError(
                    f"{path} is no list of paths: line {number + 1} holds a zero byte; save it as UTF-8 text"
                )
            if line := line.rstrip(b"\r\n").removeprefix(b"./"):
                yield line


def _sorted_lines(path: str | os.PathLike[str]) -> Iterable[bytes]:
    """The lines in sorted order; only those of a list that is not sorted are all held at once."""
    before = b""
    for line in _lines(path):
        if line < before:
            return sorted(_lines(path))
        before = line
    return _lines(path)


def _checked(lines: Iterable[bytes], path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The sorted lines. Raises InputError for one that comes twice."""
    before = b""
    for line in lines:
        if line == before:
            raise InputError(f"{path} has {os.fsdecode(line)!r} more than once; sort -u {path} leaves each line once")
        yield (before := line)


def check_is_folder(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless `path` is a folder that can be read."""
    if not os.path.exists(path):
        raise InputError(f"there is no folder {path}")
    if not os.path.isdir(path):
        raise InputError(
            f"{path} is a file, not a folder; give the folder that holds the images, or a list of them in a .txt file"
        )
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
    """The images at INPUT_PATH, a folder or a list. Raises InputError for a path that holds none."""
    if os.path.splitext(path)[1].lower() in LIST_SUFFIXES and not os.path.isdir(path):
        return ImageList(path)
    return ImageFolder(path)


@contextmanager
def opened_picture(source: ImageFolder, index: int, channels: int = 3) -> Iterator[AnyPicture]:
    """Image `index` with so many `channels`, its header read. Raises Unreadable, which has the reason in one line."""
    with explained():
        file = source.open(index)
    with file:
        yield Picture.of(file, channels)


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
