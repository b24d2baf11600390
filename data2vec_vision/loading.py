"""Batches from processes that may be killed or hang: new ones go on where they were, and nothing else changes.

What a batch holds is a function of its number, so a loader from batch n on gives what the lost one would have given.
An image that kills or stops its process every time is not left out, for what a run sees would then depend on how busy
the machine is: after TRIES the error names it.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

SLOWEST = 600.0  # seconds at one image after which a process is taken to hang
TRIES = 3  # loaders that are started for one batch
RESTARTS = 20  # of a command: beyond that it is the machine that needs a look
LOOK = 5.0  # seconds between looks at the processes
SETTLE = 1.0  # seconds in which a process that has closed its files is gone
IDLE = -1


class LoadingFailed(RuntimeError):
    """Processes that read images were lost again and again. The text is one line: at which images, what to try."""


class Note(ctypes.Structure):
    """Where a process is, in memory that it shares with the main one."""

    _fields_ = [("pid", ctypes.c_int64), ("image", ctypes.c_int64), ("since", ctypes.c_double)]


@contextmanager
def reading(index: int) -> Iterator[None]:
    """For datasets, around the reading of image `index`: should its process be lost inside, the image can be named."""
    worker: Any = get_worker_info()
    notes = None if worker is None else getattr(worker.dataset, "notes", None)
    if notes is None:
        yield
        return
    note = notes[worker.id]
    note.pid, note.since, note.image = os.getpid(), time.monotonic(), index
    try:
        yield
    finally:
        note.since, note.image = time.monotonic(), IDLE


def sendable(tensor: Tensor) -> Tensor:
    """For datasets: `tensor` in shared memory where a worker made it.

    It would be put there when it is sent, but by a thread whose error, for want of room, is lost: nothing would come.
    """
    return tensor if get_worker_info() is None else tensor.share_memory_()


def lasting(
    make: Callable[[int], DataLoader], name: Callable[[int], str], tell: Callable[[str], None] = lambda text: None
) -> Iterator[Any]:
    """The batches of make(0) and, when its processes are lost, from batch n on those of make(n).

    `name` is that of an image by the index in `reading`; `tell` gets one line at the first loss. Raises LoadingFailed
    when processes are lost TRIES times at a batch or RESTARTS times in all, and whatever the dataset raises.
    With no processes beside the main one an image that kills or hangs does so to the command.
    """
    done = lost = tries = 0
    while True:
        loader = make(done)
        if not loader.num_workers:
            yield from loader
            return
        workers = Workers(loader, name)
        try:
            while (loss := workers.wait()) is None:
                yield workers.batch
                done, tries = done + 1, 0
        finally:
            workers.end()
        if not loss:
            return
        lost, tries = lost + 1, tries + 1
        if tries == TRIES or lost > RESTARTS:
            times = f"{tries} times in a row" if tries == TRIES else f"{lost} times"
            raise LoadingFailed(
                f"a process that reads images was lost {times}; the last {loss}; {advice(loss, loader.num_workers)}"
            )
        if lost == 1:
            tell(f"Note     a process that reads images {loss}: others go on at the same place, with the same result")


def advice(loss: str, workers: int) -> str:
    """What to try after such losses."""
    fewer = f"--workers {workers // 2}"
    if "hung" in loss:
        return "see whether the disk answers, or remove the image"
    if "SIGBUS" in loss:
        return f"/dev/shm is full perhaps: make it larger (docker run --shm-size=8g), or try {fewer}"
    if "SIGKILL" in loss:
        return f"for want of memory perhaps: try {fewer}"
    return f"remove the image that does it, or try {fewer}"


class Workers:
    """The processes of a loader, until its batches end or one of them is lost."""

    def __init__(self, loader: DataLoader, name: Callable[[int], str]):
        self._name = name
        self._notes = multiprocessing.RawArray(Note, [(0, IDLE, 0.0)] * loader.num_workers)
        loader.dataset.notes = self._notes  # type: ignore[attr-defined]
        before = set(multiprocessing.active_children())
        self._batches: Iterator[Any] | None = iter(loader)
        self._processes = set(multiprocessing.active_children()) - before
        self.batch: Any = None
        self._hung, self._waits_since = "", math.inf
        self._end = threading.Event()
        _deaths.install()
        # A thread, for the main one may wait without end for what a process that hangs was about to send.
        self._watch = threading.Thread(target=self._kill_what_hangs, daemon=True)
        self._watch.start()

    def wait(self) -> str | None:
        """None when there is another `batch`, "" after the last, else how a process was lost."""
        self._waits_since = time.monotonic()
        try:
            self.batch = _deaths.next(self._batches)
            return None
        except StopIteration:
            return ""
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):  # the dataset's own
                raise
        except (OSError, EOFError):  # a tensor that a process sent before it was gone
            time.sleep(SETTLE)
            if not self._ended():
                raise
        finally:
            self._waits_since = math.inf
        return self._hung or self._how_it_ended()

    def _kill_what_hangs(self) -> None:
        while not self._end.wait(min(LOOK, SLOWEST / 2)):
            now, notes = time.monotonic(), list(self._notes)
            slow = [self._name(n.image) for n in notes if n.image != IDLE and now - n.since > SLOWEST]
            latest = max(self._waits_since, *(n.since for n in notes))
            idle = now - latest > SLOWEST and all(n.image == IDLE for n in notes)
            if slow or idle:
                self._hung = f"hung for {SLOWEST:g} s at {', '.join(slow) or 'no image'}"
                self._kill()
                return

    def _ended(self) -> list[Any]:
        return [process for process in self._processes if process.exitcode not in (None, 0)]

    def _how_it_ended(self) -> str:
        ended = self._ended()
        codes = {p.exitcode for p in ended}
        names = [signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes]
        pids = {process.pid for process in ended}
        images = [self._name(note.image) for note in self._notes if note.pid in pids and note.image != IDLE]
        where = f" while it read {', '.join(images)}" if images else ""
        return f"was ended by {', '.join(names) or 'the system'}{where}"

    def end(self) -> None:
        """End the processes, if they are not gone yet."""
        self._end.set()
        self._watch.join()
        self._kill()
        self._batches = None

    def _kill(self) -> None:
        for process in self._processes:  # one that hangs in a decoder does not listen to less
            process.kill()


class Deaths:
    """Handles SIGCHLD. torch's own handler raises wherever the main thread is when a worker has died, be it in an
    optimizer step or a checkpoint; under this one it does so only where a batch is waited for."""

    def __init__(self) -> None:
        self._torchs: Any = None
        self._waiting = False

    def install(self) -> None:
        """For when a loader has started its processes, which is when torch installs its handler."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return  # there torch looks for the dead when batches do not come
        current: Any = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != self._handle:
            self._torchs = current
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._waiting:
            self._torchs(number, frame)

    def next(self, batches: Any) -> Any:
        """next(batches). Raises RuntimeError when a worker has died before or dies meanwhile."""
        try:
            self._waiting = True
            if self._torchs is not None:
                self._torchs(signal.SIGCHLD, None)
            return next(batches)
        finally:
            self._waiting = False


_deaths = Deaths()
