"""The file formats of `extract`: each written from rows that are on the disk already, a piece at a time.

N images, D width, S patches; a row is [D], or [S, D] or [rows, columns, D] where it holds the patches of an image.
"""

import importlib.util
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.errors import InputError
from data2vec_vision.partial import NPY_HEADER, npy_header
from data2vec_vision.run import plural, say

BLOCK = 2**18  # bytes of features in memory at a time
ROW_GROUP = 2**24  # the same for parquet, which reads and skips in groups of rows
CHUNK = 65536  # paths written at a time


@dataclass
class Table:
    """Features on the disk with what goes along."""

    npy: Path  # float32 [N, *shape], its header NPY_HEADER bytes long
    shape: list[int]
    rows: int  # N
    names: Callable[[], Iterator[str]]  # gives the N paths from the first
    about: dict[str, Any]  # plain values: which checkpoint, method, pool, layer
    stop: Callable[[], None]  # raises when the user wants no more

    def chunks(self, n_bytes: int) -> Iterator[np.ndarray]:
        """All rows in order, float32 [n, *shape] of about `n_bytes`."""
        row = int(np.prod(self.shape))
        at_once = max(1, n_bytes // (4 * row))
        bar = tqdm(total=self.rows, unit="row", desc="writing", leave=False, disable=not sys.stderr.isatty())
        with open(self.npy, "rb") as file, bar:
            file.seek(NPY_HEADER)
            for start in range(0, self.rows, at_once):
                self.stop()
                count = min(at_once, self.rows - start)
                yield np.frombuffer(file.read(4 * row * count), "<f4").reshape(count, *self.shape)
                bar.update(count)


def write_npz(file: BinaryIO, table: Table) -> None:
    """`features`, `paths` [N], and `about`, one string of JSON."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            entry.write(npy_header("<f4", [table.rows, *table.shape]))
            for chunk in table.chunks(BLOCK):
                entry.write(chunk.data)
        with archive.open("paths.npy", "w", force_zip64=True) as entry:
            longest = max(map(len, table.names()))
            entry.write(npy_header(f"<U{longest}", [table.rows]))
            names = table.names()
            while some := list(itertools.islice(names, CHUNK)):
                entry.write(np.array(some, f"<U{longest}").tobytes())
        with archive.open("about.npy", "w") as entry:
            np.save(entry, np.array(json.dumps(table.about)))


def utf8_names(table: Table) -> Iterator[str]:
    """The names for a format that is UTF-8 throughout: bytes that are not are written as \\xNN, which is said."""

    def clean(name: str) -> str:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    if count := sum(clean(name) != name for name in table.names()):
        say(f"note: of {plural(count, 'name that is', 'names that are')} not UTF-8, odd bytes are written as \\xNN")
    return map(clean, table.names())


def write_csv(file: BinaryIO, table: Table) -> None:
    """A line an image: its path, and D numbers of 9 digits, which are enough to give back the very float32."""
    width = table.shape[0]
    numbers = ",%.9g" * width + "\n"
    file.write(("path" + "".join(f",f{n}" for n in range(width)) + "\n").encode())
    names = utf8_names(table)
    for chunk in table.chunks(BLOCK):
        for row, name in zip(chunk.tolist(), names):
            file.write((quoted(name) + numbers % tuple(row)).encode())


def quoted(text: str) -> str:
    """A field of a csv file (RFC 4180)."""
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def write_parquet(file: BinaryIO, table: Table) -> None:
    """Columns `path` and `features`, flat; the shape of a row and `about` are in the schema's metadata."""
    import pyarrow
    from pyarrow import parquet

    width = int(np.prod(table.shape))
    schema = pyarrow.schema(
        [("path", pyarrow.string()), ("features", pyarrow.list_(pyarrow.float32(), width))],
        metadata={"shape": json.dumps(table.shape), "about": json.dumps(table.about)},
    )
    names = utf8_names(table)
    # Floats of features hardly repeat: dictionaries and statistics of them only cost.
    with parquet.ParquetWriter(file, schema, use_dictionary=False, write_statistics=["path"]) as writer:
        for chunk in table.chunks(ROW_GROUP):
            paths = pyarrow.array(list(itertools.islice(names, len(chunk))), pyarrow.string())
            features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.ravel()), width)
            writer.write_table(pyarrow.Table.from_arrays([paths, features], schema=schema))


def write_pt(file: BinaryIO, table: Table) -> None:
    """{"features": tensor, "paths": list of N strings, "about": dict}, for torch.load."""
    table.stop()
    # Mapped, so that the system reads pages as torch writes them and may forget them again.
    features = np.memmap(table.npy, "<f4", "c", offset=NPY_HEADER, shape=(table.rows, *table.shape))
    content = {"features": torch.from_numpy(features), "paths": list(table.names()), "about": table.about}
    torch.save(content, file)


def write_safetensors(file: BinaryIO, table: Table) -> None:
    """The tensor `features`, with `about` as metadata of strings. By hand: the library wants all bytes at once."""
    shape = [table.rows, *table.shape]
    about = {name: value if isinstance(value, str) else json.dumps(value) for name, value in table.about.items()}
    features = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * int(np.prod(shape, dtype=np.int64))]}
    header = json.dumps({"__metadata__": about, "features": features}).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for chunk in table.chunks(BLOCK):
        file.write(chunk.data)


@dataclass(frozen=True)
class Format:
    """How a kind of file is written and read."""

    write: Callable[[BinaryIO, Table], None] | None  # None: the rows' own .npy becomes the output
    load: str  # Python that gives the features as an array or tensor [N, ...]
    room: float = 1  # bytes for each byte of features, beside the rows themselves
    holds_paths: bool = True  # otherwise they stand beside it in <name>.paths.txt


FORMATS = {
    ".npz": Format(write_npz, 'numpy.load({path})["features"]'),
    ".npy": Format(None, 'numpy.load({path}, mmap_mode="r")', room=0, holds_paths=False),
    ".parquet": Format(write_parquet, 'numpy.stack(pyarrow.parquet.read_table({path})["features"].to_numpy())'),
    ".csv": Format(write_csv, 'pandas.read_csv({path}, index_col="path")', room=4),
    ".pt": Format(write_pt, 'torch.load({path})["features"]'),
    ".safetensors": Format(write_safetensors, 'safetensors.torch.load_file({path})["features"]', holds_paths=False),
}


def load_line(path: Path, shape: list[int]) -> str:
    """Python that loads the features in a file that `extract` wrote, of rows of this shape."""
    line = FORMATS[path.suffix].load.format(path=json.dumps(str(path), ensure_ascii=False))
    return line + f".reshape(-1, {', '.join(map(str, shape))})" if path.suffix == ".parquet" and shape[1:] else line


def check_format(path: Path, pool: str | None) -> None:
    """Raises InputError for a suffix that no format has, and for one that cannot be written here, or with this pool."""
    if path.suffix not in FORMATS:  # numpy's own loader minds upper and lower case too
        *some, last = FORMATS
        raise InputError(f"--output {path} must end in {', '.join(some)} or {last}")
    if path.suffix == ".csv" and pool in ("patch", "grid"):
        others = ", ".join(suffix for suffix in FORMATS if suffix != ".csv")
        raise InputError(f"a line of a .csv is one vector, not the patches of --pool {pool}; take one of {others}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"--output {path} needs pyarrow: pip install pyarrow")


@contextmanager
def paths_file(target: Path, names: Iterator[str]) -> Iterator[None]:
    """<name>.paths.txt beside `target`, a path a line; a line feed in a path is written as \\n.

    It is written at once, and takes its name when what is done inside has gone well.
    """
    with atomic_write(target.with_suffix(".paths.txt")) as file:
        for name in names:
            file.write((name.replace("\n", "\\n") + "\n").encode("utf-8", "surrogateescape"))
        yield
