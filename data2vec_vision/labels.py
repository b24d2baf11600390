"""The labels of images, by their class folders or a csv file."""

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from data2vec_vision.errors import InputError, one_line
from data2vec_vision.shards import Archives
from data2vec_vision.sources import ImageFolder, ImageList, Several

UNLABELLED = -1
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # of a data set: no classes


@dataclass(frozen=True)
class Labels:
    """The classes, and of every image of a source which one it is."""

    classes: list[str]  # sorted; by value where all are whole numbers
    numbers: np.ndarray  # int64 [N]: an index into `classes`, or UNLABELLED
    unknown: list[str]  # classes that only other images have; their images count as unlabelled
    of_unknown: int  # how many images these are
    rows: int = 0  # of the labels file
    used_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # those that name an image

    def counts(self) -> np.ndarray:
        """int64 [classes]: images of each class."""
        return np.bincount(self.numbers[self.numbers != UNLABELLED], minlength=len(self.classes))


def labels_of(source: ImageFolder, labels_file: str | None = None, classes: list[str] | None = None) -> Labels:
    """The label of every image: the first folder of its path, or what the csv `labels_file` says.

    The file has a header with the columns path and label; paths are absolute or relative to the source's
    folder, with forward slashes. `classes` are those that count, by default all that are found. Raises
    InputError for a file that cannot be used, and where no image has a label.
    """
    rows = 0
    used: list[int] = []
    if labels_file is None:
        words = [_first_folder(name) for name in _below_what_they_share(source)]
        refuse_unlabelled(source, words)
    else:
        words, rows, used = _from_csv(source, labels_file)
    found = in_order({word for word in words if word is not None})
    classes = found if classes is None else classes
    number = {name: n for n, name in enumerate(classes)}
    numbers = np.fromiter((number.get(word, UNLABELLED) for word in words), np.int64, len(words))
    unknown = [name for name in found if name not in number]
    of_unknown = sum(word is not None for word in words) - int((numbers != UNLABELLED).sum())
    return Labels(classes, numbers, unknown, of_unknown, rows, np.array(used, np.int64))


def _names(source: ImageFolder) -> Iterator[str]:
    return (source.name(index) for index in range(len(source)))


def _below_what_they_share(source: ImageFolder) -> Iterator[str]:
    """The names of a folder; of a list, and within archives, without the folders that all of its images lie in."""
    if isinstance(source, Several):
        return chain.from_iterable(map(_below_what_they_share, source.sources))
    if isinstance(source, Archives):
        return _below_what_members_share(source)
    if not isinstance(source, ImageList):
        return _names(source)
    shared = os.path.commonpath([os.path.join(source.root, name) for name in _names(source)])
    shared = os.path.dirname(shared) if len(source) == 1 else shared
    return (os.path.relpath(os.path.join(source.root, name), shared).replace(os.sep, "/") for name in _names(source))


def _below_what_members_share(source: Archives) -> Iterator[str]:
    folders = {os.path.dirname(name) for name in source.inner_names()}
    shared = os.path.commonpath(folders)
    shared = os.path.dirname(shared) if len(folders) == 1 else shared  # of one class only
    return (name[len(shared) :].lstrip("/") for name in source.inner_names())


def _first_folder(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return folder if slash else None


def refuse_unlabelled(source: ImageFolder, folders: list[str | None]) -> None:
    """Raises InputError where no image lies in a folder, or the folders are the parts of a data set."""
    names = {folder for folder in folders if folder is not None}
    if not names:
        raise InputError(
            f"the images in {source.root} have no labels: put each class into a folder of its own, "
            "or give a csv with the columns path and label as --labels"
        )
    if {name.lower() for name in names} <= PARTS and len(names) > 1:
        shown = " and ".join(sorted(names)[:2])
        raise InputError(
            f"the folders in {source.root} are {shown}, which are no classes; give the folder of the training "
            "images as INPUT_PATH and that of the test images as --test-path"
        )


def in_order(names: Iterable[str]) -> list[str]:
    """Class names sorted, by value where all are whole numbers."""
    names = list(names)
    whole = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if whole else None)


def _from_csv(source: ImageFolder, labels_file: str) -> tuple[list[str | None], int, list[int]]:
    """Of every image the label in the file, or None; how many rows the file has, and which of them name an image."""
    position = {os.path.normpath(source.path(index)): index for index in range(len(source))}
    words: list[str | None] = [None] * len(source)
    used: list[int] = []
    row, first = -1, ""
    for row, (line, path, label) in enumerate(read_csv(labels_file)):
        first = first or path
        index = position.get(_absolute(path, source.root), position.get(_absolute(path.strip(), source.root)))
        if index is None:
            continue
        if words[index] not in (None, label):
            raise InputError(f"{labels_file}, line {line}: {path} is {label!r} here and {words[index]!r} further up")
        words[index] = label
        used.append(row)
    if row < 0:
        raise InputError(f"{labels_file} has a header but no rows")
    if not used:
        raise InputError(
            f"none of the {row + 1:,} paths in {labels_file} is an image of {source.root}: the file has {first!r}, "
            f"the folder {source.name(0)!r}; paths must be relative to the folder, or absolute, and in UTF-8"
        )
    words = [word or None for word in words]
    if not any(words):
        raise InputError(f"no image of {source.root} has a label in {labels_file}: the column label is empty there")
    return words, row + 1, used


def _absolute(path: str, root: str) -> str:
    """The path of an image, whether it was written relative to `root` or not."""
    return os.path.normpath(os.path.join(root, path))


def read_csv(path: str) -> Iterator[tuple[int, str, str]]:
    """(line, path, label) of every row. Raises InputError for a file that is no such table."""
    if not Path(path).is_file():
        raise InputError(
            f"{path} is a folder; give a csv as --labels" if Path(path).is_dir() else f"there is no file {path}"
        )
    try:
        # Names of files need not be Unicode; the byte order mark is what Excel writes.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            table = csv.reader(file)
            header = [name.strip().lower() for name in next(table, [])]
            if not {"path", "label"} <= set(header):
                shown = ascii(",".join(header)[:60])
                wanted = "a first line that names the columns path and label, separated by commas"
                raise InputError(f"{path} needs {wanted}; it has {shown}")
            at_path, at_label = header.index("path"), header.index("label")
            for row in filter(None, table):
                if len(row) <= max(at_path, at_label):
                    raise InputError(f"{path}, line {table.line_num}: {len(row)} columns, the header has {len(header)}")
                yield table.line_num, row[at_path], row[at_label].strip()
    except (OSError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as csv: {one_line(error)}") from error
