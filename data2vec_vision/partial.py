"""Rows of features on their way to the disk, which a run that was ended, however roughly, leaves usable.

Beside an output `f.npz` stand `.f.npz.partial`, an .npy of the rows so far, and `.f.npz.partial.json`, which says what
they are of and how many of them are surely on the disk. Both are gone once the output is complete.
"""

import contextlib
import glob
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data2vec_vision.checkpoint import atomic_write, sync_folder
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.run import lock, say, size

NPY_HEADER = 128  # bytes: room for any shape, so that the number of rows can be filled in at the end
SAVE_SECONDS = 10  # what a killed run loses at most


@dataclass
class Progress:
    """How far a run is: always a whole number of batches, so that a resumed one has the same batches."""

    images: int = 0  # seen, of all
    rows: int = 0  # written: one for each image that could be read
    bad: dict[int, str] = field(default_factory=dict)  # index of an image that could not be read -> the reason
    not_finite: int = 0  # rows that hold a number that is not finite
    first_not_finite: int | None = None  # the index of the first such image


class Partial:
    """The rows of features [N, *shape] for `target`, and how far they are.

    `settings` are the plain values that rows of one output must share; a name that starts with -- is an option,
    any other says what the value is a hash of.
    """

    def __init__(self, target: Path, shape: list[int], settings: dict[str, Any]):
        self.target, self.shape, self.settings = target, shape, settings
        self.path = target.with_name(f".{target.name}.partial")
        self.notes = target.with_name(f".{target.name}.partial.json")
        self.progress = Progress()
        self.file: BinaryIO
        self._complete = False
        self._saved = -math.inf

    def check_room(self, n_images: int, room: float) -> None:
        """Raises InputError unless the disk has room for the rows and `room` times as much for the output of them."""
        folder, rows = self.target.parent, self.n_bytes(n_images)
        there = self.path.stat().st_size if self.path.exists() else 0
        free, needed = shutil.disk_usage(folder).free + there, rows * (1 + room)
        if needed > free:
            while_written = f", and {size(needed)} while they are written" if room else ""
            raise InputError(f"the features take {size(rows)}{while_written}, but {folder} has only {size(free)} free")

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Inside, rows can be added: to those that are there already with `resume`, else from the start.

        Whatever ends the inside, the rows stay for another run, unless there are none or `complete` was called.
        Raises InputError when another process writes them, and when they cannot be gone on with.
        """
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as self.file:
            busy = f"another process is writing {self.target}; wait for it, or choose another --output"
            lockless = f"the file system of {self.target} has no locks; see that no other process writes there"
            lock(self.file, busy, lockless)
            for leftover in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.tmp"):  # of a killed write
                leftover.unlink(missing_ok=True)
            self._begin(resume)
            try:
                yield
            finally:
                if self.progress.rows and not self._complete:
                    with contextlib.suppress(OSError):  # a full disk: what was saved before still counts
                        self.save()
                else:
                    self._remove()

    def _begin(self, resume: bool) -> None:
        progress, settings = self._begun(resume)
        if resume and progress.rows:
            self._refuse_others(settings)
            self.progress = progress
        elif resume:
            say(f"There is nothing to resume for {self.target}; starting with the first image.")
        elif progress.rows:
            say(
                f"note: an earlier extraction to {self.target} stopped after {progress.images:,} images; "
                "--resume would have gone on from there, without it this one starts again"
            )
        self.file.truncate(self.n_bytes(self.progress.rows))
        self.file.seek(0, os.SEEK_END)

    def _begun(self, resume: bool) -> tuple[Progress, dict[str, Any]]:
        """The progress and settings of an earlier run. Raises InputError for damaged notes that are to be resumed."""
        if not self.notes.exists() or not os.path.getsize(self.path):
            return Progress(), {}
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
            settings = dict(notes.pop("settings"))
            progress = Progress(**notes)
            progress.bad = {int(index): reason for index, reason in progress.bad.items()}
            if progress.images != progress.rows + len(progress.bad):
                raise ValueError("its numbers do not add up")
            if settings == self.settings and os.path.getsize(self.path) < self.n_bytes(progress.rows):
                raise ValueError(f"{self.path} is shorter than it says")
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            if not resume:
                return Progress(), {}
            reason = f"{self.notes} is damaged: {one_line(error)}"
            raise InputError(f"{reason}; leave out --resume to start again") from error
        return progress, settings

    def _refuse_others(self, begun: dict[str, Any]) -> None:
        """Raises InputError when the rows there are of something else than this run's."""
        for name, value in self.settings.items():
            if begun.get(name) == value:
                continue
            if name.startswith("--"):
                then, now = (f"{name} {v}" if v is not None else f"no {name}" for v in (begun.get(name), value))
                difference = f"{then}, and this command has {now}; give the same"
            else:
                difference = f"other {name}; give the same"
            raise InputError(
                f"the extraction to {self.target} was begun with {difference}, or leave out --resume to start again"
            )

    def add(self, features: np.ndarray, unreadable: dict[int, str]) -> None:
        """Add the features [B, *shape] of a batch of images, of which some could not be read."""
        progress, count = self.progress, len(features) + len(unreadable)
        finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
        self.file.write(features.astype("<f4", copy=False).tobytes())
        if not finite.all():
            progress.not_finite += int((~finite).sum())
            if progress.first_not_finite is None:
                readable = [i for i in range(progress.images, progress.images + count) if i not in unreadable]
                progress.first_not_finite = readable[int(np.argmin(finite))]
        progress.bad |= unreadable
        progress.rows += len(features)
        progress.images += count
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Put the rows so far on the disk, and then a note that they are there."""
        self._flush()
        with atomic_write(self.notes) as file:
            file.write(json.dumps(asdict(self.progress) | {"settings": self.settings}).encode())
        self._saved = time.monotonic()

    def finish(self) -> None:
        """All rows are there: make the file a whole .npy, on the disk."""
        self.save()
        self.file.seek(0)
        self.file.write(npy_header("<f4", [self.progress.rows, *self.shape]))
        self._flush()

    def complete(self, rename: bool) -> None:
        """The output is complete, or with `rename` these rows become it; nothing is kept beside it."""
        self._complete = True
        if rename:
            self.file.close()
            os.replace(self.path, self.target)
            sync_folder(self.target.parent)

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def drop(self) -> None:
        """Keep nothing: the rows are of no use."""
        self._complete = True

    def n_bytes(self, rows: int) -> int:
        """The bytes of so many rows."""
        return NPY_HEADER + 4 * rows * int(np.prod(self.shape))

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self.file.close()
        self.notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def npy_header(kind: str, shape: list[int]) -> bytes:
    """The header of an .npy file (format 1.0), always NPY_HEADER bytes."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    magic = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    return magic + text.ljust(NPY_HEADER - 11).encode() + b"\n"
