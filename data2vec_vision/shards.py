"""Images in archives: in one, or in many that together are one source, such as the shards of a WebDataset."""

import glob
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data2vec_vision import archives, tables
from data2vec_vision.cache import SUFFIXES, indexed, say_once
from data2vec_vision.errors import InputError
from data2vec_vision.folders import ImageFolder, files_below
from data2vec_vision.index import Index

KINDS = ", ".join(SUFFIXES)
PART = re.compile(r"(train|validation|val|test|unsupervised)[-_.]", re.IGNORECASE)  # how shards of one are named
NONE_SHOWN = 3  # archives named when they are not there


class Archives(ImageFolder):
    """The images in archives, in the sorted order of the archives' names and, within one, of the images' names.

    An image of a single archive bears its name there, as if the archive were a folder; one of many shards that of the
    shard before it: "000.tar/cat/1.jpg". Nothing is unpacked. Raises InputError for an archive that cannot be read, and
    where there is no image.
    """

    are_files = False

    def __init__(self, paths: Sequence[str], base: str | None = None, of_folder: bool = False):
        """base: what the names of shards are relative to; None: `paths` is a single archive, whose name is left out.

        of_folder: these are all archives below the folder `base`.
        """
        self.root = os.path.abspath(paths[0] if base is None else base)
        self._of_folder = of_folder
        self._shards = [""]  # the names of the archives, sorted
        if base is not None:
            names = {os.path.relpath(path, base).replace(os.sep, "/") for path in paths}
            self._shards = sorted(names, key=os.fsencode)
        self.skipped = Counter()
        parts = []
        self._stamps = []
        quiet = not sys.stderr.isatty() or len(self._shards) == 1
        shards = tqdm(range(len(self._shards)), "looking through", unit="archive", leave=False, delay=2, disable=quiet)
        for shard in shards:
            index, skipped, stamp = indexed(self._archive(shard))
            parts.append(index)
            self._stamps.append(stamp)
            self.skipped += skipped
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        self._index = parts[0] if len(parts) == 1 else Index.joined(parts)
        if len(self) == 0:
            shown = self.root if base is None else f"the {len(parts):,} archives in {self.root}"
            raise InputError(f"no images in {shown}: {self.skipped.total():,} files in it, but none is an image")

    def _archive(self, shard: int) -> str:
        return os.path.join(self.root, self._shards[shard]) if self._shards[shard] else self.root

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def name(self, index: int) -> str:
        """The name of image `index` in its archive, behind that of the archive where there are many."""
        shard = self._shards[self._shard(index)]
        return f"{shard}/{super().name(index)}" if shard else super().name(index)

    def inner_names(self) -> Iterator[str]:
        """The names of all images within their archives."""
        return map(os.fsdecode, self._index)

    def open(self, index: int) -> BinaryIO:
        shard = self._shard(index)
        path, stamp, member = self._archive(shard), self._stamps[shard], self._index.members[index]
        if member["kind"] == archives.ROW:
            return BytesIO(tables.read_row(path, stamp, int(member["offset"]), int(member["size"])))
        return BytesIO(archives.read(path, stamp, member))

    def fingerprint(self) -> str:
        if self._shards == [""]:
            return super().fingerprint()  # that of a folder with the same names
        return self._index.hash("\0".join(self._shards).encode("utf-8", "surrogateescape"), self._starts.tobytes())

    def would_take_in(self, path: str | os.PathLike[str]) -> bool:
        # A folder of archives with an image in it would be a folder of images.
        return self._of_folder and super().would_take_in(path)

    def places(self) -> list[str]:
        return [self.root] if self._of_folder else [self._archive(shard) for shard in range(len(self._shards))]


def is_archive(path: str | os.PathLike[str]) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def in_folder(folder: str) -> Archives:
    """The archives below a folder, which has some. Parts of a data set, by their names, are taken as one, and named."""
    names = [name for name in map(os.fsdecode, files_below(folder)) if is_archive(name)]
    found = {match[1].lower() for name in names if (match := PART.match(os.path.basename(name)))}
    if len(found) > 1:
        *first, last = sorted(found, key=lambda part: (part == "train", part))
        say_once(
            f"{folder} has the parts {', '.join(first)} and {last}, which are taken together; "
            f"a pattern gives one: '{os.path.join(folder, '**', f'{last}-*')}'"
        )
    return Archives([os.path.join(folder, name) for name in names], folder, of_folder=True)


def saved(folder: str) -> Archives | None:
    """The data set that Hugging Face's `save_to_disk` wrote to a folder, None for another folder."""
    if (found := tables.saved_files(folder)) is None:
        return None
    files, part = found
    if part:
        say_once(f"{folder} has several parts; the images are those of {part}.")
    _refuse_missing(files, folder)
    return Archives(files, folder, of_folder=True)


def is_pattern(path: str) -> bool:
    """Whether a path that is not there may stand for several, such as "shards/*.tar" or "shards-{000..012}.tar"."""
    return any(sign in path for sign in "*?[{") and not os.path.exists(path)


def base_of(pattern: str) -> str:
    """The folder that all paths which a pattern stands for lie in."""
    return os.path.dirname(re.split(r"[*?[{]", pattern, maxsplit=1)[0]) or "."


def matching(pattern: str) -> Archives:
    """The archives that a pattern stands for. Raises InputError for other files, and where one is missing."""
    paths = []
    for path in _expanded(pattern):
        paths += glob.glob(path, recursive=True) if glob.has_magic(path) else [path]
    if not paths:
        raise InputError(f"nothing is named like {pattern}; a pattern stands for archives, such as 'shards/*.tar'")
    _refuse_missing(paths, pattern)
    for path in paths:
        archives.refuse_compressed(path)
        if not is_archive(path) or os.path.isdir(path):
            raise InputError(
                f"{pattern} stands for {path} too, but a pattern is for archives ({KINDS}); give a folder as it is"
            )
    return Archives(paths, base_of(pattern))


def _refuse_missing(paths: Sequence[str], where: str) -> None:
    if missing := [path for path in paths if not os.path.exists(path)]:
        more = f" and {len(missing) - NONE_SHOWN:,} more" if len(missing) > NONE_SHOWN else ""
        raise InputError(f"{where}: there is no file {', '.join(missing[:NONE_SHOWN])}{more}")


def _expanded(pattern: str) -> list[str]:
    """The paths that ranges {000..012} and choices {a,b} in braces stand for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for number, part in enumerate(parts):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", part) if number % 2 else None
        if ends:
            padded = any(re.match(r"0\d", end) for end in ends.groups())
            width = max(map(len, ends.groups())) if padded else 0
            choices.append([f"{n:0{width}}" for n in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            choices.append(part.split(",") if number % 2 else [part])
    return ["".join(chosen) for chosen in itertools.product(*choices)]
