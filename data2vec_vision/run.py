"""A run as others see it: its folder with lock, metrics and bad files, and what it prints."""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

from tqdm import tqdm

from data2vec_vision import distributed
from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.config import TrainConfig, to_json
from data2vec_vision.errors import ESCAPES, InputError, RunFailed, of_writing
from data2vec_vision.sources import ImageFolder

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

PROGRAM = "python -m data2vec_vision"
BAD_SHARE = 0.1  # a run fails when more than this share of the images cannot be read
WARM_UP_STEPS = 3  # left out of the pace: the first steps allocate, compile, fill the loader
LINE_SECONDS = 10  # at most one plain line in so many seconds


def command(*words: object) -> str:
    """A command of this tool as a shell takes it."""
    return f"{PROGRAM} {shlex.join(str(word) for word in words)}"


def launched(*words: object) -> str:
    """A command of this tool for as many processes as this run has."""
    here = distributed.local_processes()
    if (nodes := distributed.processes() // here) == here == 1:
        return command(*words)
    machines = f"--nnodes {nodes} ... " if nodes > 1 else ""
    return f"torchrun {machines}--nproc-per-node {here} -m data2vec_vision {shlex.join(str(word) for word in words)}"


def say(text: str) -> None:
    """Print for the user, once however many processes there are."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def lock(file: IO[Any], busy: str, lockless: str) -> None:
    """Take `file` for this process until it closes it.

    Raises InputError(busy) when another process has it; says `lockless` where the file system has no locks.
    """
    if fcntl is None:
        return
    try:
        # A record lock: unlike flock it is not handed on to workers, which outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(busy) from None
    except OSError:
        say(f"note: {lockless}")


class RunFolder:
    """The folder of a run. One process may write to it at a time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl, what a verdict is read off, of an earlier process
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None

    def refuse_if_used(self) -> None:
        """Raises InputError when the folder holds another run's files."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder as --checkpoint-out-dir")
        files = [p for kind in ("checkpoint", "student", "teacher") for p in self.path.glob(f"{kind}_*.pt")]
        if files:
            newest = max(
                (p for p in files if p.name.startswith("checkpoint")), key=lambda p: p.stat().st_mtime, default=None
            )
            resume = f"continue it: {command('train', '--resume-checkpoint', newest)}; or " if newest else ""
            place = shlex.quote(str(_next_name(self.path)))
            other = f"start another: {PROGRAM} train ... --checkpoint-out-dir {place}"
            raise InputError(f"{self.path} holds a run already; {resume}{other}")

    def make(self) -> None:
        """Raises InputError when the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {self.path}: {error.strerror}; give another --checkpoint-out-dir") from error

    def open(self, config: TrainConfig, step: int) -> None:
        """Take the folder for a run that has done `step` steps; later lines of metrics.jsonl go."""
        if not distributed.is_main():
            return
        self.make()
        try:
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; give another --checkpoint-out-dir"
            ) from error
        lock(
            self._lock,
            busy=f"another process is training in {self.path}; wait for it, or give another --checkpoint-out-dir",
            lockless=f"the file system of {self.path} has no locks; see that no other run writes there",
        )
        for pattern in (".*.pt.*.tmp", ".checkpoint_*.pt.tmp", ".config.json.*.tmp", ".metrics.jsonl.*.tmp"):
            for leftover in self.path.glob(pattern):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
        metrics = self.path / "metrics.jsonl"
        try:
            with atomic_write(self.path / "config.json") as file:
                file.write(to_json(config).encode())
            kept = [line for line in complete_lines(metrics) if step_of(line) <= step]
            with atomic_write(metrics) as file:
                file.write("".join(line + "\n" for line in kept).encode("utf-8", "surrogateescape"))
            self._metrics = open(metrics, "a", encoding="utf-8")
        except OSError as error:
            raise RunFailed(of_writing(error, self.path)) from error
        self.lines = [json.loads(line) for line in kept if '"feature_std"' in line or '"knn"' in line]

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()

    def keep_traceback(self, text: str) -> Path | None:
        """Write error.txt, so that an error nobody foresaw can be looked into after a long run."""
        path = self.path / "error.txt"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError:  # the disk may be what failed, and that is being reported
            return None
        return path

    def close(self) -> None:
        for file in (self._metrics, self._lock):
            if file is not None:
                # A line that did not fit on the disk is tried once more; it was said when it was written.
                with contextlib.suppress(OSError):
                    file.close()


def _next_name(path: Path) -> Path:
    return next(p for n in range(2, 10**6) if not (p := path.with_name(f"{path.name}-{n}")).exists())


def complete_lines(path: Path) -> list[str]:
    """The lines that were written whole; a kill may have torn the last one."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return lines


def step_of(line: str) -> float:
    """The step of a line of a .jsonl file; infinite for a line that a failing disk has spoilt."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class BadFiles:
    """The images that could not be read: counted, listed in bad_files.txt; beyond a share they end the run.

    A resumed run adds to the list, but only what it meets itself can end it: the user may have mended the rest.
    """

    def __init__(self, source: ImageFolder, folder: Path, resumed: bool):
        self.source, self.path = source, folder / "bad_files.txt"
        if not resumed and distributed.is_main():
            self.path.unlink(missing_ok=True)  # of a run that failed before its first checkpoint
        self._listed = {line.split("\t")[0] for line in complete_lines(self.path)} if resumed else set()
        self._met: set[int] = set()

    def __len__(self) -> int:
        return len(self._listed)

    def add(self, bad: Mapping[int, str]) -> None:
        """Raises RunFailed when more than BAD_SHARE of all images have turned out unreadable."""
        for index, reason in bad.items():
            self._met.add(index)
            name = self.source.name(index).translate(ESCAPES)
            if name in self._listed:
                continue
            self._listed.add(name)
            if distributed.is_main():
                with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(f"{name}\t{reason}\n")
        if len(self._met) > BAD_SHARE * len(self.source):
            raise RunFailed(
                f"{len(self._met)} of {len(self.source):,} images cannot be read, more than {BAD_SHARE:.0%}; "
                f"{self.path} lists them with the reasons: mend or remove them"
            )


class Progress:
    """The bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, first_step: int, total_steps: int):
        self.total = total_steps
        shown = distributed.is_main()
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=self._lines or not shown
        )
        self._printed, self._timed_from, self._clock = 0.0, first_step + WARM_UP_STEPS, 0.0

    def step(self, number: int) -> float:
        """Note that `number` steps are done; returns the seconds left at the pace so far."""
        self._bar.update()
        if number <= self._timed_from:
            self._clock = time.perf_counter()
            return math.inf
        return (self.total - number) * (time.perf_counter() - self._clock) / (number - self._timed_from)

    def show(self, record: Mapping[str, Any], left: float) -> None:
        """`record` is a line of metrics.jsonl, `left` the seconds to the end."""
        parts = {
            "loss": "none" if record["loss"] is None else f"{record['loss']:.4f}",
            "lr": f"{record['lr']:.1e}",
            "tau": f"{record['tau']:.5f}" if "tau" in record else "",
            "images/s": f"{record['images_per_second']:.0f}",
            "waiting": f"{record['data_wait']:.0%}",
            "skipped": str(record["skipped"] or ""),
            "bad files": str(record["bad_files"] or ""),
        }
        parts = {name: value for name, value in parts.items() if value}
        self._bar.set_postfix(parts, refresh=False)
        last = record["step"] == self.total
        if self._lines and (last or time.monotonic() - self._printed > LINE_SECONDS):
            self._printed = time.monotonic()
            values = "  ".join(f"{name} {value}" for name, value in parts.items())
            remaining = f"  {duration(left)} left" if math.isfinite(left) and not last else ""
            print(
                f"epoch {record['epoch']}  step {record['step']}/{self.total}  {values}{remaining}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are noted in the list; a second SIGINT acts at once. Other threads get no signals.

    A second SIGTERM does not: schedulers and torchrun send it again while a run saves, and have SIGKILL to insist.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Asked:
    """Whether something was asked for since it was last looked at."""

    def __init__(self) -> None:
        self.times = self._seen = 0

    def taken(self) -> bool:
        """Whether it was asked for; what comes later counts anew. A signal may come at any point of this."""
        before, self._seen = self._seen, self.times
        return self._seen > before


@contextlib.contextmanager
def asked_to_save() -> Iterator[Asked]:
    """Inside, SIGUSR1 is noted and does not end the process, as it else would; Windows has none."""
    asked = Asked()
    number = getattr(signal, "SIGUSR1", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.times += 1

    before = signal.signal(number, note)
    try:
        yield asked
    finally:
        signal.signal(number, before)


def duration(seconds: float) -> str:
    """Seconds as people say it: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """Bytes as people say it."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plural(count: int, one: str, many: str) -> str:
    """1 pass, 4 passes."""
    return f"{count:,} {one if count == 1 else many}"
