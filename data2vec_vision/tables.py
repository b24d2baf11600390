"""Images in tables: the .arrow files that Hugging Face's `save_to_disk` writes, and .parquet files.

A column holds the images, as structs with the bytes of a file each, or as plain bytes. In an .arrow file the bytes lie
as they are, so that an image is read like one in a tar. A .parquet file is compressed in groups of rows, so that an
image costs the reading of its group; each thread keeps its last one.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data2vec_vision.archives import EMPTY_ROW, NOTHING, RAW, ROW, check_unchanged, stamp
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.images import image_suffixes
from data2vec_vision.index import MEMBER, Index

SUFFIXES = (".parquet", ".arrow")
NAMES = ("image", "img", "jpg", "jpeg", "png", "bytes")  # of a column of plain bytes
LARGEST_GROUP = 2**28  # bytes of the images in a group of rows: each image read costs as much
_kept = threading.local()  # the last group of rows


def pyarrow(path: str) -> Any:
    """The library. Raises InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: a table needs pyarrow; pip install 'data2vec_vision[hf]'") from error
    return pyarrow


def rows(path: str) -> tuple[Index, Counter[str]]:
    """The rows of a table, named by their numbers, and nothing else. Raises InputError for one that cannot be read."""
    library = pyarrow(path)
    try:
        if os.path.splitext(path)[1].lower() == ".parquet":
            found = [*_in_parquet(library, path)]
        else:
            found = [*_in_arrow(library, path)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}; copy or make it again") from error
    except InputError:
        raise
    except Exception as error:  # damaged tables and what people write into their metadata raise nearly anything
        raise InputError(f"{path} is no table that can be read: {one_line(error)}; copy or make it again") from error
    names = (f"{number:08}{suffix}".encode() for number, suffix, _ in found)
    return Index.of(names, np.array([member for *_, member in found], MEMBER)), Counter()


def image_column(library: Any, schema: Any, path: str) -> tuple[str, bool]:
    """The name of the column that holds the images, and whether it is one of structs. Raises InputError without one."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
    said = [name for name, feature in about.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]
    kinds = library.types

    def is_bytes(kind: Any) -> bool:
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    structs = [
        field.name
        for field in schema
        if kinds.is_struct(field.type) and any(part.name == "bytes" and is_bytes(part.type) for part in field.type)
    ]
    plain = [field.name for field in schema if is_bytes(field.type) and field.name.lower() in NAMES]
    chosen = [name for name in said if name in structs] or structs or plain
    if not chosen:
        raise InputError(f"{path} has no column of images, whose type is binary; it has {', '.join(schema.names)}")
    first = next((name for name in chosen if name.lower() in NAMES), chosen[0])
    return first, first in structs


def _suffixes(paths: Any) -> Iterator[str]:
    """Of the paths in a column, the suffixes of images, without which a name of a row does not tell what it is."""
    known = image_suffixes()
    for path in paths:
        suffix = os.path.splitext(path or "")[1].lower()
        yield suffix if suffix in known else ""


def _in_arrow(library: Any, path: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(number, suffix, MEMBER) of every row. Raises InputError for a table that is compressed."""
    number, end = 0, os.path.getsize(path)
    with library.memory_map(path) as file:
        start = file.read_buffer(8)
        file.seek(0)
        of_file = start.to_pybytes().startswith(b"ARROW1")
        reader = library.ipc.open_file(file) if of_file else library.ipc.open_stream(file)
        name, in_struct = image_column(library, reader.schema, path)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if of_file else reader
        for batch in batches:
            column = batch.column(name)
            column.validate(full=True)  # places that a damaged file gives would be read wherever they are
            content = column.field("bytes") if in_struct else column
            has_path = in_struct and any(field.name == "path" for field in column.type)
            suffixes = _suffixes(column.field("path").to_pylist() if has_path else [None] * len(batch))
            wide = library.types.is_large_binary(content.type)
            _, ends, data = content.buffers()
            first = 0 if data is None else data.address - start.address  # None: no row of the batch has bytes
            if data is not None and not 0 <= first <= first + data.size <= end:
                raise InputError(f"{path} is compressed; write it without compression, as save_to_disk does")
            places = np.frombuffer(ends, np.int64 if wide else np.int32)[
                content.offset : content.offset + len(batch) + 1
            ]
            present = np.asarray(content.is_valid()) & np.asarray(column.is_valid())
            for suffix, here, a, b in zip(suffixes, present.tolist(), places.tolist(), places[1:].tolist()):
                yield number, suffix, (first + a, b - a, b - a, 0, RAW if here else NOTHING)
                number += 1


def _in_parquet(library: Any, path: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(number, suffix, MEMBER) of every row; its offset is the group of rows, its size the place in there."""
    number = 0
    with library.parquet.ParquetFile(path) as file:
        name, in_struct = image_column(library, file.schema_arrow, path)
        leaves = [file.schema.column(n).path for n in range(len(file.schema.names))]
        leaf, paths = leaves.index(f"{name}.bytes" if in_struct else name), f"{name}.path"
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if (size := about.column(leaf).total_uncompressed_size) > LARGEST_GROUP:
                raise InputError(
                    f"{path} has groups of rows of {size / 1e6:,.0f} MB, and each image costs the reading of one; "
                    "write it again with row_group_size=100"
                )
            if in_struct and paths in leaves:
                column = file.read_row_group(group, columns=[paths], use_threads=False).column(name)
                suffixes = _suffixes((row or {}).get("path") for row in column.to_pylist())
            else:
                suffixes = _suffixes([None] * about.num_rows)
            for row, suffix in enumerate(suffixes):
                yield number, suffix, (group, 0, row, 0, ROW)
                number += 1


def read_row(path: str, then: tuple[int, int], group: int, row: int) -> bytes:
    """The image in a row of a .parquet file that bore the stamp `then`. Raises OSError with the reason if it cannot."""
    try:
        check_unchanged(path, stamp(path), then)
    except FileNotFoundError as error:
        raise OSError(f"{path} has gone") from error
    key = path, then, group, os.getpid()
    if getattr(_kept, "key", None) != key:
        library = pyarrow(path)
        with library.parquet.ParquetFile(path) as file:
            name, in_struct = image_column(library, file.schema_arrow, path)
            leaf = f"{name}.bytes" if in_struct else name
            column = file.read_row_group(group, columns=[leaf], use_threads=False).column(name).combine_chunks()
        _kept.key, _kept.column = key, column
    value = _kept.column[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise OSError(EMPTY_ROW)
    return content


def saved_files(folder: str) -> tuple[list[str], str] | None:
    """The .arrow files of a folder that `save_to_disk` wrote, and of a dictionary of parts which one; None for another.

    Raises InputError for one whose files are not there, or in which there is no part to train on.
    """
    part = ""
    try:
        if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
            parts = json.loads(Path(folder, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            part = "train" if "train" in parts else parts[0] if len(parts) == 1 else ""
            if not part:
                raise InputError(f"{folder} has the parts {', '.join(parts)}; give the folder of one of them")
        state = Path(folder, part, "state.json")
        if not state.is_file() or not Path(folder, part, "dataset_info.json").is_file():
            if part:
                raise InputError(f"{folder} has no part {part}, though its dataset_dict.json says so; copy it again")
            return None
        entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        names = [os.path.basename(entry["filename"]) for entry in entries]
    except InputError:
        raise
    except Exception as error:  # what is in a file by somebody else can be anything
        raise InputError(f"{folder} is no data set that can be read: {one_line(error)}; save it again") from error
    if not names:
        raise InputError(f"{folder} is a data set without a file of images; save it again")
    return [os.path.join(folder, part, name) for name in names], part
