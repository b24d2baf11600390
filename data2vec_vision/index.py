"""Names in one buffer, and where an archive keeps what bears them: an index that is small and shared by processes.

Letters: N names. They are bytes, because names of files need not be Unicode, and not Python's objects, so that ten
million of them fit in memory once, and are not copied when workers start: a forked one finds the pages as they are,
and one that is started anew maps a file.
"""

import contextlib
import heapq
import json
import mmap
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice, pairwise
from multiprocessing.context import get_spawning_popen
from typing import Any, BinaryIO

import numpy as np

RUN = 1_000_000  # names sorted at a time: more of them wait in buffers
BLOCK = 4096  # names made into Python's objects at a time
MAPPED = (
    4_000_000  # bytes of an index from which on its file is mapped; smaller ones are read, which keeps no file open
)
LONGEST_HEADER = 1 << 20
MEMBER = np.dtype(
    [
        ("offset", "<i8"),  # in the archive
        ("stored", "<i8"),  # bytes there
        ("size", "<i8"),  # bytes of the file
        ("crc", "<u4"),
        ("kind", "u1"),  # how it is stored, one of archives' kinds
    ]
)


class Index:
    """N names in one buffer; `members` tells of the files in an archive where each lies, and is empty for a folder."""

    def __init__(self, ends: np.ndarray, names: np.ndarray, members: np.ndarray | None = None):
        """ends: int64 [N + 1], from 0 on. names: uint8. members: MEMBER [N], or None."""
        self.ends, self.names = ends, names
        self.members = np.zeros(0, MEMBER) if members is None else members
        self._file: tuple[str, int] | None = None  # one that holds all this, and its checksum

    @classmethod
    def of(cls, names: Iterable[bytes], members: np.ndarray | None = None) -> "Index":
        together, ends = bytearray(), array("q", [0])
        for name in names:
            together += name
            ends.append(len(together))
        return cls(np.frombuffer(ends, np.int64), np.frombuffer(together, np.uint8), members)

    @classmethod
    def joined(cls, parts: list["Index"]) -> "Index":
        """The names of all parts, one part after the other."""
        starts = np.cumsum([0, *(part.ends[-1] for part in parts)], dtype=np.int64)
        ends = np.concatenate([part.ends[:-1] + start for part, start in zip(parts, starts)] + [starts[-1:]])
        names = np.concatenate([part.names for part in parts])
        return cls(ends, names, np.concatenate([part.members for part in parts]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.names[self.ends[index] : self.ends[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), BLOCK):
            ends = self.ends[first : first + BLOCK + 1].tolist()
            block, start = self.names[ends[0] : ends[-1]].tobytes(), ends[0]
            for a, b in pairwise(ends):
                yield block[a - start : b - start]

    def hash(self, *more: bytes) -> str:
        """A hash of all names, and of `more`."""
        digest = blake2b(self.ends.data, digest_size=16)
        digest.update(self.names.data)
        for part in more:
            digest.update(part)
        return digest.hexdigest()

    def _arrays(self) -> list[np.ndarray]:
        return [np.ascontiguousarray(part).view(np.uint8) for part in (self.ends, self.members, self.names)]

    def write(self, file: BinaryIO, about: dict[str, Any]) -> int:
        """Write all to a file, `about` too, so that `read` gives it back. Returns the checksum."""
        crc = 0
        for part in self._arrays():
            crc = zlib.crc32(part.data, crc)
        sizes = {"names": len(self), "members": len(self.members), "bytes": len(self.names), "crc": crc}
        header = json.dumps({**about, **sizes}).encode()
        file.write(header + b" " * (-(len(header) + 1) % 64) + b"\n")  # so that what follows is aligned
        for part in self._arrays():
            file.write(part.data)
        return crc

    @classmethod
    def read(cls, path: str) -> tuple["Index", dict[str, Any]]:
        """What `write` wrote: the index and `about`. Raises OSError, or ValueError for a file that is damaged."""
        with open(path, "rb") as file:
            line = file.readline(LONGEST_HEADER)
            about = json.loads(line)
            if not isinstance(about, dict) or not line.endswith(b"\n"):
                raise ValueError("no header")
            try:
                n, n_members, n_bytes, crc = (int(about[key]) for key in ("names", "members", "bytes", "crc"))
            except (KeyError, TypeError) as error:
                raise ValueError("a part of the header is missing") from error
            ends, members = len(line) + 8 * (n + 1), len(line) + 8 * (n + 1) + MEMBER.itemsize * n_members
            size = os.fstat(file.fileno()).st_size
            if min(n, n_bytes) < 0 or n_members not in (0, n) or size != members + n_bytes:
                raise ValueError("of another size than its header says")
            file.seek(0)
            all: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size >= MAPPED else file.read()
        if zlib.crc32(memoryview(all)[len(line) :]) != crc:
            raise ValueError("the checksum differs")
        index = cls(
            np.frombuffer(all, "<i8", n + 1, len(line)).astype(np.int64, copy=False),
            np.frombuffer(all, np.uint8, n_bytes, members),
            np.frombuffer(all, MEMBER, n_members, ends),
        )
        if size >= MAPPED:
            index._file = path, crc
        return index, about

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that is being started a large index is a file to map, which all of them share."""
        if get_spawning_popen() is not None and self.ends.nbytes + self.names.nbytes + self.members.nbytes >= MAPPED:
            with contextlib.suppress(OSError):  # where no file can be written, each process gets a copy
                return _mapped, (self._shared_file(),)
        return Index, (self.ends, self.names, self.members)

    def _shared_file(self) -> str:
        if self._file is None or not _holds(*self._file):
            descriptor, path = tempfile.mkstemp(".index", "data2vec_vision-")
            weakref.finalize(self, _remove, path, os.getpid())
            with open(descriptor, "wb") as file:
                self.write(file, {})
            mapped, _ = Index.read(path)  # here too, so that this process need not keep a copy
            self.__dict__.update(mapped.__dict__)
        return self._file[0]


def _holds(path: str, crc: int) -> bool:
    """Whether the file still is what it was; a cache may be emptied, or made anew, at any time."""
    try:
        with open(path, "rb") as file:
            return bool(json.loads(file.readline(LONGEST_HEADER))["crc"] == crc)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked from it
        with contextlib.suppress(OSError):
            os.unlink(path)


def _mapped(path: str) -> Index:
    return Index.read(path)[0]


def in_order(names: Iterable[bytes]) -> Iterator[bytes]:
    """The names in sorted order. Only RUN of them at a time are Python's objects."""
    names, runs = iter(names), list[Iterable[bytes]]()
    while run := sorted(islice(names, RUN)):
        runs.append(run if len(run) < RUN and not runs else Index.of(run))
        del run
    return iter(runs[0]) if len(runs) == 1 else heapq.merge(*runs)
