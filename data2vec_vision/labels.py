"""The labels of images, by their class folders or a csv file, and the split into training and test images."""

import csv
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data2vec_vision.errors import InputError, one_line
from data2vec_vision.seeding import generator
from data2vec_vision.sources import ImageFolder

UNLABELLED = -1
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # of a data set: no classes


@dataclass(frozen=True)
class Labels:
    """The classes, and of every image of a source which one it is."""

    classes: list[str]  # sorted; by value where all are whole numbers
    numbers: np.ndarray  # int64 [N]: an index into `classes`, or UNLABELLED
    unknown: list[str]  # classes that only other images have; their images count as unlabelled
    matched: int = 0  # rows of the labels file that name an image of the source
    rows: int = 0  # rows of the labels file

    def counts(self) -> np.ndarray:
        """int64 [classes]: images of each class."""
        return np.bincount(self.numbers[self.numbers != UNLABELLED], minlength=len(self.classes))


def labels_of(source: ImageFolder, labels_file: str | None = None, classes: list[str] | None = None) -> Labels:
    """The label of every image: the first folder of its path, or what the csv `labels_file` says.

    The file has a header with the columns path and label; paths are absolute or relative to the source's
    folder, with forward slashes. `classes` are those that count, by default all that are found. Raises
    InputError for a file that cannot be used, and where no image has a label.
    """
    if labels_file is None:
        rows = matched = 0
        words = [folder if slash else None for folder, slash, _ in map(_parted, _names(source))]
        refuse_unlabelled(source, words)
    else:
        words, rows = _from_csv(source, labels_file)
        matched = sum(word is not None for word in words)
        words = [word or None for word in words]
        if not any(words):
            raise InputError(f"no image of {source.root} has a label in {labels_file}: the column label is empty there")
    found = in_order({word for word in words if word is not None})
    classes = found if classes is None else classes
    number = {name: n for n, name in enumerate(classes)}
    numbers = np.fromiter((number.get(word, UNLABELLED) for word in words), np.int64, len(words))
    return Labels(classes, numbers, [name for name in found if name not in number], matched, rows)


def _names(source: ImageFolder) -> Iterator[str]:
    return (source.name(index) for index in range(len(source)))


def _parted(name: str) -> tuple[str, str, str]:
    return name.partition("/")


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


def _from_csv(source: ImageFolder, labels_file: str) -> tuple[list[str | None], int]:
    """Of every image the label in the file, or None; and how many rows the file has."""
    position = {name: index for index, name in enumerate(_names(source))}
    words: list[str | None] = [None] * len(source)
    rows, first = 0, ""
    for line, path, label in read_csv(labels_file):
        rows, first = rows + 1, first or path
        index = position.get(_relative(path, source.root))
        if index is None:
            continue
        if words[index] not in (None, label):
            raise InputError(f"{labels_file}, line {line}: {path} is {label!r} here and {words[index]!r} further up")
        words[index] = label
    if rows == 0:
        raise InputError(f"{labels_file} has a header but no rows")
    if all(word is None for word in words):
        raise InputError(
            f"none of the {rows:,} paths in {labels_file} is an image of {source.root}: the file has {first!r}, "
            f"the folder {source.name(0)!r}; paths must be relative to the folder, or absolute"
        )
    return words, rows


def _relative(path: str, root: str) -> str:
    """The path of an image as a source names it."""
    if os.path.isabs(path):
        return os.path.relpath(path, root).replace(os.sep, "/")
    return posixpath.normpath(path)


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


def stratified_split(numbers: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that stay and of those that are held out, both sorted; unlabelled ones are in neither.

    numbers int64 [N]: class numbers or UNLABELLED. Of every class about `share` in (0, 1) is held out, at least
    one image stays and, where there are two, at least one is held out. A function of numbers, share and seed.
    """
    order = torch.randperm(len(numbers), generator=generator(seed, "split")).numpy()
    order = order[numbers[order] != UNLABELLED]
    order = order[np.argsort(numbers[order], kind="stable")]
    classes = numbers[order]
    counts = np.bincount(classes)
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[classes]  # of an image in its class
    n_held = np.where(counts > 1, np.clip(np.round(counts * share), 1, np.maximum(counts - 1, 1)), 0)
    held = rank < n_held[classes]
    return np.sort(order[~held]), np.sort(order[held])
