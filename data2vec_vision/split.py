"""Which images teach classes and which test what was learned: a folder for each, or a stratified share of one."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO

import numpy as np
import torch

from data2vec_vision.errors import InputError
from data2vec_vision.labels import UNLABELLED, Labels, labels_of
from data2vec_vision.run import plural
from data2vec_vision.seeding import generator
from data2vec_vision.sources import ImageFolder, open_source


class Selected(ImageFolder):
    """Some images of a source, in the order of `indices`, as a source of their own."""

    def __init__(self, source: ImageFolder, indices: Sequence[int] | np.ndarray):
        self.source, self.indices, self.root = source, np.asarray(indices, np.int64), source.root

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def path(self, index: int) -> str:
        return self.source.path(int(self.indices[index]))

    def open(self, index: int) -> BinaryIO:
        return self.source.open(int(self.indices[index]))

    def fingerprint(self) -> str:
        return blake2b(self.source.fingerprint().encode() + self.indices.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Part:
    """Images with their classes."""

    images: Selected
    numbers: np.ndarray  # int64 [N], none of them UNLABELLED

    def without(self, bad: Collection[int]) -> "Part":
        """All but the images at these indices."""
        keep = np.setdiff1d(np.arange(len(self.images)), list(bad))
        return Part(Selected(self.images.source, self.images.indices[keep]), self.numbers[keep])

    def reasons(self, bad: Mapping[int, str]) -> dict[str, str]:
        """`bad` by path instead of index."""
        return {self.images.path(index): reason for index, reason in bad.items()}


@dataclass(frozen=True)
class LabelledImages:
    """The images that teach classes and those that test them, and what is to be said about both."""

    classes: list[str]
    train: Part
    test: Part
    split: str  # how they were told apart, in words
    notes: list[str]  # what was left out, in sentences

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.train, self.test


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


def labelled_images(
    input_path: str, labels_file: str | None, test_path: str | None, test_share: float, seed: int
) -> LabelledImages:
    """The images below `input_path` teach, those below `test_path`, or else a stratified share of the first, test.

    Raises InputError where there are no two classes, or nothing to test with.
    """
    if not 0 < test_share < 1:
        raise InputError(f"--test-pct {test_share:g} must be in (0, 1): the share of the images that test")
    source = open_source(input_path)
    found = labels_of(source, labels_file)
    if len(found.classes) == 1:
        raise InputError(f"all images in {input_path} are of one class, {found.classes[0]!r}; two at least are needed")
    if test_path is not None:
        return by_folder(source, found, input_path, labels_file, test_path)
    rows = stratified_split(found.numbers, test_share, seed)
    if len(rows[1]) == 0:
        raise InputError(
            f"every class in {input_path} has one image only, so none is left to test with; use --test-path"
        )
    train, test = (Part(Selected(source, part), found.numbers[part]) for part in rows)
    notes = left_out(found, input_path)
    if single := [name for name, n in zip(found.classes, found.counts()) if n == 1]:
        notes.append(f"Of {listed(single)} there is one image only, which trains: their accuracy cannot be told.")
    if unused := found.rows - len(found.used_rows):
        notes.append(unused_rows(unused, labels_file))
    split = f"the test images are {test_share:.0%} of each class, drawn under seed {seed}".replace("%", " %")
    return LabelledImages(found.classes, train, test, split, notes)


def by_folder(
    source: ImageFolder, found: Labels, input_path: str, labels_file: str | None, test_path: str
) -> LabelledImages:
    """The images of `source`, with the labels `found`, teach, those below `test_path` test."""
    here, there = os.path.realpath(input_path), os.path.realpath(test_path)
    if os.path.commonpath([here, there]) in (here, there):
        raise InputError(
            f"{test_path} and {input_path} lie in one another, so that images would be tested by themselves; "
            "give two separate folders, or leave out --test-path for a split"
        )
    test_source = open_source(test_path)
    others = labels_of(test_source, labels_file, found.classes)
    if len(np.intersect1d(found.used_rows, others.used_rows)):
        raise InputError(
            f"a path in {labels_file} fits an image in {input_path} and one in {test_path}; write absolute paths"
        )
    parts = []
    for where, labels in ((source, found), (test_source, others)):
        rows = np.flatnonzero(labels.numbers != UNLABELLED)
        parts.append(Part(Selected(where, rows), labels.numbers[rows]))
    if len(parts[1].images) == 0:
        names = f"there {listed(others.unknown)}, here {listed(found.classes)}"
        raise InputError(f"no image in {test_path} is of a class that {input_path} has: {names}")
    refuse_shared_files(parts, input_path, test_path)
    notes = left_out(found, input_path) + left_out(others, test_path)
    if unused := found.rows - len(found.used_rows) - len(others.used_rows):
        notes.append(unused_rows(unused, labels_file))
    return LabelledImages(found.classes, parts[0], parts[1], f"the test images are those in {test_path}", notes)


def refuse_shared_files(parts: Sequence[Part], input_path: str, test_path: str) -> None:
    """Raises InputError where a file, by whatever link, is both in the training and in the test images."""
    train, test = ({os.path.realpath(part.images.path(i)) for i in range(len(part.images))} for part in parts)
    if shared := train & test:
        raise InputError(
            f"{plural(len(shared), 'image', 'images')} of {test_path} are training images of {input_path} too, such as "
            f"{listed([min(shared)])}; test on others, or leave out --test-path for a split"
        )


def refuse_few(train: Part, k: int, path: str) -> None:
    """Raises InputError where there are fewer training images than k, or only one class of them."""
    count = len(train.images)
    if count < k:
        raise InputError(
            f"{path} has {plural(count, 'training image', 'training images')}, fewer than --k {k}; "
            f"use --k {max(1, count // 2)} or less"
        )
    if len(np.unique(train.numbers)) == 1:
        raise InputError(f"the readable training images in {path} are of one class; two at least are needed")


def left_out(labels: Labels, path: str) -> list[str]:
    """Sentences about the images of a folder that take no part."""
    notes = []
    count = int((labels.numbers == UNLABELLED).sum()) - labels.of_unknown
    if count:
        notes.append(f"{plural(count, 'image', 'images')} in {path} without a label left out.")
    if labels.unknown:
        of = f"of classes that do not train, {listed(labels.unknown)}"
        notes.append(f"{plural(labels.of_unknown, 'image', 'images')} in {path} {of}, left out.")
    return notes


def unused_rows(count: int, labels_file: str | None) -> str:
    return f"{plural(count, 'row', 'rows')} of {labels_file} that name no image passed over."


def listed(names: Sequence[str], count: int = 5) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(ascii(name)[1:-1] if not name.isprintable() else name for name in names[:count]) + more
