"""An archive is looked through once: what it holds is kept in the user's cache folder, and nothing anywhere else."""

import contextlib
import os
import sys
import tempfile
from collections import Counter
from hashlib import blake2b
from pathlib import Path

from data2vec_vision import archives, distributed, tables
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.images import image_suffixes
from data2vec_vision.index import Index

VERSION = 1  # of what is kept
LARGE = 10**9  # bytes of an archive that takes so long that it is said
SUFFIXES = (*archives.SUFFIXES, *tables.SUFFIXES)  # of all archives
_said: set[str] = set()


def cache_folder() -> Path:
    """Where indices are kept: D2V_CACHE, or the system's place for caches."""
    if given := os.environ.get("D2V_CACHE"):
        return Path(given)
    home = Path.home()
    place = {"darwin": home / "Library/Caches", "win32": Path(os.environ.get("LOCALAPPDATA", home / "AppData/Local"))}
    return Path(os.environ.get("XDG_CACHE_HOME") or place.get(sys.platform, home / ".cache")) / "data2vec_vision"


def indexed(path: str) -> tuple[Index, Counter[str], tuple[int, int]]:
    """The images in an archive, the suffixes of what else is in it, and its stamp. Raises InputError.

    It is looked through only when the cache does not have it as it is now, and as this version reads it.
    """
    path = os.path.abspath(path)
    try:
        now = archives.stamp(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not os.path.isfile(path):  # a pipe would be waited for without end
        raise InputError(f"{path} is a folder or a device, not a file")
    known = blake2b(" ".join(sorted(image_suffixes())).encode(), digest_size=8).hexdigest()
    about = {"version": VERSION, "archive": path, "stamp": [*now], "suffixes": known}
    place = cache_folder() / f"{blake2b(os.fsencode(path), digest_size=16).hexdigest()}.index"
    with contextlib.suppress(Exception):  # not there, or damaged in whatever way: it is made anew
        index, found = Index.read(str(place))
        if found.items() >= about.items():
            return index, Counter({str(suffix): int(count) for suffix, count in found["skipped"].items()}), now
    if now[0] > LARGE:
        say_once("Looking through archives that are new; what they hold is kept for the next time.")
    index, skipped = (tables.rows if path.lower().endswith(tables.SUFFIXES) else archives.members)(path)
    if archives.stamp(path) != now:
        raise InputError(f"{path} changes while it is read; wait until it is complete")
    keep(index, place, {**about, "skipped": dict(skipped)})
    return index, skipped, now


def keep(index: Index, place: Path, about: dict[str, object]) -> None:
    """Write an index to the cache, or say once that it cannot be."""
    temporary = ""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(".tmp", ".", place.parent)
        with open(descriptor, "wb") as file:
            index.write(file, about)
        os.replace(temporary, place)
    except OSError as error:
        say_once(
            f"The cache folder {place.parent} cannot be written to ({error.strerror or one_line(error)}), "
            "so that archives are looked through each time; D2V_CACHE names another."
        )
        if os.path.exists(temporary):
            os.unlink(temporary)


def say_once(text: str) -> None:
    """Tell the user, once however many archives and processes there are."""
    if distributed.is_main() and text not in _said:
        _said.add(text)
        print(text, file=sys.stderr, flush=True)
