"""Archives read in place: what a .zip or a .tar holds and where, and the bytes of one file in it.

Nothing is ever unpacked, so that a name is only a name, wherever it points. Each read opens the archive, as it would
open an image in a folder: no handle is shared by threads or processes, and an archive that has changed is noticed.
"""

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from typing import BinaryIO, NoReturn

import numpy as np

from data2vec_vision.errors import InputError, one_line
from data2vec_vision.folders import count, is_image
from data2vec_vision.images import image_suffixes
from data2vec_vision.index import MEMBER, Index

SUFFIXES = (".zip", ".tar")
# What unpacks an archive that is compressed as a whole, by its suffix and by its first bytes.
UNPACKERS = {
    ".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".tbz2": "bunzip2", ".tbz": "bunzip2",
    ".xz": "unxz", ".txz": "unxz", ".zst": "unzstd", ".tzst": "unzstd",
}  # fmt: skip
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
LARGEST = 2**29  # bytes of an image: more is a mistake, or is meant to fill the memory
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip, which its name, other fields and then its bytes follow
# How a member is stored: as it is; in a zip as it is, deflated, in another way, encrypted; in a row of a table, or not.
RAW, STORED, DEFLATED, OTHER, ENCRYPTED, ROW, NOTHING = range(7)
EMPTY_ROW = "there are no bytes in its row"
DOS = 0  # the system that made an entry of a zip
LINK, SPARSE = "link", "sparse"  # what such members count as among those that are no images

Members = dict[bytes, tuple[int, int, int, int, int]]  # by name what MEMBER has


def refuse_compressed(path: str) -> None:
    """Raises InputError for a tar that is compressed as a whole."""
    stem, suffix = os.path.splitext(path)
    suffix = suffix.lower()
    if suffix in UNPACKERS and (suffix.startswith(".t") or stem.lower().endswith(".tar")):
        unpacked = stem if stem.lower().endswith(".tar") else f"{stem}.tar"
        _refuse(path, f"{UNPACKERS[suffix]} {path} makes {unpacked}, which can be given")


def _refuse(path: str, remedy: str) -> NoReturn:
    raise InputError(f"{path} is compressed as a whole, so that no image in it can be read by itself; {remedy}")


def members(path: str) -> tuple[Index, Counter[str]]:
    """The images in an archive, sorted, and what else there is, by suffix. Raises InputError if it is damaged."""
    skipped: Counter[str] = Counter()
    suffix = os.path.splitext(path)[1].lower()
    try:
        found = in_zip(path, skipped) if suffix == ".zip" else in_tar(path, skipped)
        names = sorted(found)
        return Index.of(names, np.array([found[name] for name in names], MEMBER)), skipped
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # a damaged archive makes the library raise nearly anything
        why = one_line(error)
        raise InputError(
            f"{path} is no {suffix} archive that can be read, it is damaged or cut short ({why}); copy or make it again"
        ) from error


def visible(name: bytes) -> bytes:
    """The name of a member as a folder would have it, without a leading "./" or "/"; empty where it is hidden."""
    while name.startswith((b"/", b"./")):
        name = name.removeprefix(b".").lstrip(b"/")
    parts = name.split(b"/")
    hidden = any(part.startswith(b".") and part not in (b".", b"..") for part in parts) or b"__MACOSX" in parts[:-1]
    return b"" if hidden or not parts[-1] else name


def _suffixes() -> frozenset[bytes]:
    return frozenset(suffix.encode() for suffix in image_suffixes())


def in_zip(path: str, skipped: Counter[str]) -> Members:
    """The images in a zip; of several with one name the last. Raises what zipfile raises."""
    found: Members = {}
    suffixes, methods = _suffixes(), {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.filelist:
            if not (name := visible(_zip_name(entry))):
                continue
            if stat.S_ISLNK(entry.external_attr >> 16):
                count(skipped, LINK)
            elif is_image(name, suffixes, skipped):
                kind = ENCRYPTED if entry.flag_bits & 1 else methods.get(entry.compress_type, OTHER)
                found[name] = entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, kind
    return found


def _zip_name(entry: zipfile.ZipInfo) -> bytes:
    """A name in UTF-8. Without the flag for it a name is in the code page of DOS, but Unix writes what it has there."""
    name = entry.orig_filename
    if entry.create_system == DOS and "/" not in name:  # some programs write names as Windows has them
        name = name.replace("\\", "/")
    if entry.flag_bits & 0x800:
        return name.encode()
    raw = name.encode("cp437")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return name.encode()
    return raw


def in_tar(path: str, skipped: Counter[str]) -> Members:
    """The images in a tar; of several with one name the last. Raises what tarfile raises, and EOFError."""
    found: Members = {}
    suffixes = _suffixes()
    with open(path, "rb") as file:
        start = file.read(6)
        for magic, suffix in MAGIC.items():
            if start.startswith(magic):
                _refuse(path, f"it is a {suffix} file, which {UNPACKERS[suffix]} unpacks once it is named so")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if entry.isdir() or not (name := visible(entry.name.encode("utf-8", "surrogateescape"))):
                    continue
                if entry.issparse() or not (entry.isreg() or entry.islnk()):
                    count(skipped, SPARSE if entry.issparse() else LINK)
                elif is_image(name, suffixes, skipped):
                    if entry.isreg():
                        found[name] = entry.offset_data, entry.size, entry.size, 0, RAW
                    elif target := found.get(visible(entry.linkname.encode("utf-8", "surrogateescape"))):
                        found[name] = target  # a hard link, to what came before it
                    else:
                        count(skipped, LINK)
            # It stops without a word at a header that is damaged or not there.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError(f"its end is missing behind byte {archive.offset:,}")
    return found


def stamp(file: str | BinaryIO) -> tuple[int, int]:
    """What changes when an archive does: its size in bytes and its time in nanoseconds. Raises OSError."""
    status = os.stat(file) if isinstance(file, str) else os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: str, now: tuple[int, int], then: tuple[int, int]) -> None:
    """Raises OSError for an archive that is not as it was when it was looked through."""
    if now != then:
        raise OSError(f"{path} has changed since it was opened; start again")


def read(path: str, then: tuple[int, int], member: np.void) -> bytes:
    """The bytes of a member of the archive that bore the stamp `then`. Raises OSError with the reason if it cannot."""
    offset, stored, size, crc, kind = member.item()
    if kind == ENCRYPTED:
        raise OSError("it is encrypted")
    if kind == OTHER:
        raise OSError("it is compressed in a way that is not read; only deflate is")
    if kind == NOTHING:
        raise OSError(EMPTY_ROW)
    if max(stored, size) > LARGEST:
        raise OSError(f"{max(stored, size):,} bytes are too many for an image")
    try:
        file = open(path, "rb")
    except FileNotFoundError as error:
        raise OSError(f"{path} has gone") from error
    with file:
        check_unchanged(path, stamp(file), then)
        if kind != RAW:
            offset = _data_offset(file, offset)
        file.seek(offset)
        content = file.read(stored)
    if len(content) < stored:
        raise OSError("the archive ends before it does")
    if kind == DEFLATED:
        content = _inflated(content, size)
    if kind != RAW and (len(content) != size or zlib.crc32(content) != crc):
        raise OSError("it is damaged: its checksum differs")
    return content


def _data_offset(file: BinaryIO, header: int) -> int:
    """Where the bytes of a file in a zip begin."""
    file.seek(header)
    start = file.read(LOCAL_HEADER.size)
    if len(start) < LOCAL_HEADER.size or not start.startswith(b"PK\x03\x04"):
        raise OSError("it is damaged: its header is not where the archive says")
    _, name, extra = LOCAL_HEADER.unpack(start)
    return header + LOCAL_HEADER.size + name + extra


def _inflated(content: bytes, size: int) -> bytes:
    """At most one byte more than the size that its header gives, whatever is in it."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise OSError(f"it is damaged: {one_line(error)}") from error
