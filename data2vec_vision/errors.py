"""The ways a run can end early, each an exit code of the command line; and images that cannot be read."""

import errno
import functools
import logging
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# A name may hold line breaks, and what a terminal takes for commands; whoever reads it should see them.
ESCAPES = {n: repr(chr(n))[1:-1] for n in (*range(32), 127)}


ROOM, WRITABLE, BACK = "make room there", "make it writable", "the folder is gone, bring it back"
REMEDIES = {  # for what a disk says
    errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: WRITABLE, errno.EACCES: WRITABLE, errno.EPERM: WRITABLE, errno.ENOENT: BACK, errno.ESTALE: BACK,
}  # fmt: skip


class InputError(ValueError):
    """What the user gave cannot be used (exit code 2). The message, one line, says what to do instead."""

    def __init__(self, message: str):
        super().__init__(message.translate(ESCAPES))


class Finished(InputError):
    """There is nothing left to do of a run that is to be continued."""


class RunFailed(RuntimeError):
    """The run could not go on: disk, memory, numbers (exit code 1). Nothing saved is lost."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint (exit code 128 + the signal's number)."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Unreadable(Exception):
    """An image that cannot be read; the text says why, in one line."""


class OtherChannels(Unreadable):
    """An image with `channels` channels where `wanted` were asked for."""

    def __init__(self, channels: int, wanted: int):
        has = f"it has {channels} channel{'s' * (channels != 1)}"
        super().__init__(f"{has}; give --channels {channels}" if wanted == 3 else f"{has}, not {wanted}")
        self.channels = channels


class MissingExtra(Unreadable):
    """An image whose format takes a package that is not installed."""

    def __init__(self, extra: str):
        super().__init__(f"needs pip install 'data2vec_vision[{extra}]'")


@functools.cache
def quiet(library: str) -> None:
    """Keeps what a library logs of damaged files off the terminal; whoever configures logging still gets it."""
    logging.getLogger(library).addHandler(logging.NullHandler())


@contextmanager
def explained() -> Iterator[None]:
    """Any error inside becomes Unreadable: damaged files make decoders raise nearly anything.

    But for too many open files, which is no image's fault.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that does not matter; what cannot be decoded raises
            yield
    except Unreadable:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise Unreadable(why_unreadable(error)) from error


def why_unreadable(error: Exception) -> str:
    """The reason in one line, without what the name of the file says already."""
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "no such file, or a link to one"
    if isinstance(error, OSError):  # the system's, whose text repeats the path, or Pillow's own
        return error.strerror or one_line(error).removeprefix("OSError: ").removeprefix("UnidentifiedImageError: ")
    return one_line(error)


def brief(value: object) -> str:
    """A value out of somebody's file as a short text; lists in lists may be longer than any memory when written out."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return " ".join(short.repr(value).split())[:100]


def one_line(error: BaseException) -> str:
    """`error` as a short text on one line, with its type where the text alone says little."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def of_writing(error: OSError, folder: object) -> str:
    """What to change so that the files of a run can be written to its folder."""
    remedy = REMEDIES.get(error.errno or 0, "see that the disk works")
    return f"cannot write to {folder}: {error.strerror or one_line(error)}; {remedy}"
