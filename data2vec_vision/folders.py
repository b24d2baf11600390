"""Images that are files of their own: those below a folder, and those that a list names."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data2vec_vision.errors import InputError, one_line
from data2vec_vision.images import image_suffixes
from data2vec_vision.index import Index, in_order

LIST_SUFFIXES = (".txt", ".list")  # of files that list images, one a line
TABLE_SUFFIXES = (".csv",)  # of those that do so in a column
COLUMNS = (
    "path",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "file",
    "image",
)  # the names that this column may have
LONGEST = 2**16  # bytes of a line of a list
SUFFIXES = 1000  # told apart among files that are no images
LOOKED_FOR = 100  # the first files of a list: when none of them exists, the list is taken to be wrong


class NoImages(InputError):
    """There is no image in a folder; `skipped` counts what there is by suffix."""

    def __init__(self, message: str, skipped: Counter[str]):
        super().__init__(message)
        self.skipped = skipped


class ImageFolder:
    """The images below a folder, at any depth, in the sorted order of their relative paths.

    Names have forward slashes on every system. Hidden files and folders are passed over; links are
    followed, each folder once. Raises InputError when there is no such folder or no image in it.
    """

    are_files = True  # each image is a file of its own, which a list can name

    def __init__(self, root: str | os.PathLike[str]):
        check_is_folder(root)
        self.root = os.path.abspath(root)
        self.skipped: Counter[str] = Counter()  # files that are no images, by their suffix
        self._index = Index.of(only_images(files_below(self.root), self.skipped))
        if len(self) == 0:
            other = self.skipped.total()
            found = f"{other:,} files in it, but none is an image" if other else "it is empty"
            raise NoImages(
                f"no images in {root}: {found}; images are files such as .jpg .png .tif .webp .bmp", self.skipped
            )

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """The path of image `index` relative to the folder, with forward slashes."""
        return os.fsdecode(self._index[index])

    def path(self, index: int) -> str:
        """The absolute path of image `index`; of one in an archive, that of the archive and its name there."""
        return os.path.join(self.root, self.name(index))

    def open(self, index: int) -> BinaryIO:
        """The file of image `index`, opened for reading; it can seek. Raises OSError when it cannot be read."""
        return open(self.path(index), "rb")

    def fingerprint(self) -> str:
        """A hash of all names: two sources with the same one hold the same images in the same order."""
        return self._index.hash()

    def would_take_in(self, path: str | os.PathLike[str]) -> bool:
        """Whether an image written to `path` would be one of these images the next time."""
        return Path(path).resolve().is_relative_to(Path(self.root).resolve())

    def places(self) -> list[str]:
        """The folders and files that all images lie in."""
        return [self.root]


class ImageList(ImageFolder):
    """The images that a file lists, absolute or relative to its folder: in its lines, or in a column of a .csv.

    The order is that of the sorted lines; `name` gives an image as the list has it, without a leading "./".
    Empty lines are passed over. A file that is missing is an image that cannot be read. Raises InputError for a
    file that is no such list, that has a line twice, or of whose first LOOKED_FOR files none exists.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.root = os.path.dirname(os.path.abspath(path))
        self.list = os.path.abspath(path)
        self.skipped = Counter()
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for without end
            raise InputError(f"{path} is a device or a pipe, not a list of images")
        try:
            self._index = Index.of(_checked(_sorted_lines(path), path))
        except OSError as error:
            raise InputError(f"the list {path} cannot be read: {error.strerror}") from error
        if len(self) == 0:
            raise InputError(f"the list {path} is empty; write the path of an image in each line")
        first = range(min(len(self), LOOKED_FOR))
        if not any(os.path.exists(self.path(index)) for index in first):
            raise InputError(
                f"of the first {len(first)} files that {path} lists none exists, such as {self.path(0)}; "
                f"paths in it must be absolute, or relative to {self.root}"
            )

    def open(self, index: int) -> BinaryIO:
        path = self.path(index)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe could be waited for without end
            raise OSError("this is a folder or a device, not a file")
        return open(path, "rb")

    def would_take_in(self, path: str | os.PathLike[str]) -> bool:
        return False

    def places(self) -> list[str]:
        return [self.list]


def is_table(path: str | os.PathLike[str]) -> bool:
    return os.path.splitext(path)[1].lower() in TABLE_SUFFIXES


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a list that are not empty, without their ends and a leading "./"."""
    if is_table(path):
        yield from _cells(path)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b"")):
            if len(line) == LONGEST:
                raise InputError(f"{path} is no list of paths: line {number + 1} has {LONGEST:,} bytes or more")
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # by which some editors mark UTF-8
            if b"\0" in line:
                raise InputError(
                    f"{path} is no list of paths: line {number + 1} holds a zero byte; save it as UTF-8 text"
                )
            if line := line.rstrip(b"\r\n").removeprefix(b"./"):
                yield line


def _cells(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The paths in a .csv: of the column with one of the names COLUMNS, or, without such a header, the first."""
    column = 0
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            table = csv.reader(file)
            for row in filter(None, table):
                if table.line_num == 1:
                    titles = [cell.strip().lower() for cell in row]
                    if named := [title for title in COLUMNS if title in titles]:
                        column = titles.index(named[0])
                        continue
                if len(row) <= column:
                    raise InputError(
                        f"{path}, line {table.line_num}: there is no column {column + 1}, where the paths are"
                    )
                if any("\0" in cell for cell in row):
                    raise InputError(f"{path} is no table of paths: it holds a zero byte; save it as UTF-8 text")
                if name := os.fsencode(row[column].removeprefix("./")):
                    yield name
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as csv: {one_line(error)}") from error


def _sorted_lines(path: str | os.PathLike[str]) -> Iterable[bytes]:
    """The lines in sorted order; those of a list that is not sorted are sorted by parts."""
    before = b""
    for line in _lines(path):
        if line < before:
            return in_order(_lines(path))
        before = line
    return _lines(path)


def _checked(lines: Iterable[bytes], path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The sorted lines. Raises InputError for one that comes twice."""
    before = b""
    for line in lines:
        if line == before:
            remedy = "leave one of them" if is_table(path) else f"sort -u {path} leaves each line once"
            raise InputError(f"{path} has {os.fsdecode(line)!r} more than once; {remedy}")
        yield (before := line)


def check_is_folder(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless `path` is a folder that can be read."""
    if not os.path.exists(path):
        raise InputError(f"there is no folder {path}")
    if not os.path.isdir(path):
        raise InputError(
            f"{path} is a file, not a folder; give the folder that holds the images, a list of them in a .txt or .csv "
            "file, or a .zip or .tar of them"
        )
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"the folder {path} cannot be read; check its permissions")


def only_images(names: Iterable[bytes], skipped: Counter[str]) -> Iterator[bytes]:
    """The names with the suffix of an image; the others are counted in `skipped`."""
    suffixes = frozenset(suffix.encode() for suffix in image_suffixes())
    return (name for name in names if is_image(name, suffixes, skipped))


def is_image(name: bytes, suffixes: frozenset[bytes], skipped: Counter[str]) -> bool:
    """Whether a name has one of the suffixes of images; if not, it is counted in `skipped`."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in suffixes:
        return True
    count(skipped, os.fsdecode(suffix))
    return False


def count(skipped: Counter[str], suffix: str) -> None:
    """Note a file that is no image."""
    # Where dots do not set suffixes apart, there can be as many as files.
    skipped[suffix if suffix in skipped or len(skipped) < SUFFIXES else "..."] += 1


def files_below(root: str) -> Iterator[bytes]:
    """The relative paths of the visible files below a folder, sorted. Raises InputError for one that cannot be read."""
    return _files(os.fsencode(root), b"", set())


def _files(root: bytes, below: bytes, seen: set[tuple[int, int]]) -> Iterator[bytes]:
    # "a/x" sorts behind "a-b/x": a folder takes its place by its name with the slash that follows.
    for name in in_order(_visible(os.path.join(root, below), seen)):
        if name.endswith(b"/"):
            yield from _files(root, below + name, seen)
        else:
            yield below + name


def _visible(here: bytes, seen: set[tuple[int, int]]) -> Iterator[bytes]:
    """The names of the visible files in a folder, and of its folders with a slash; none if it was seen before."""
    try:
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if not entry.name.startswith(b".") and not _is_special(entry):
                    yield entry.name + b"/" if _is_folder(entry) else entry.name
    except OSError as error:
        raise InputError(f"cannot look into the folder {os.fsdecode(here)}: {error.strerror}") from error


def _is_special(entry: os.DirEntry[bytes]) -> bool:
    """Whether this is a pipe, a socket or a device, which could be waited for without end."""
    return not _is_folder(entry) and not _is_file(entry) and os.path.exists(entry.path)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether this is a folder or a link to one; a link that leads to itself is neither, and no reason to stop."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
