"""A run of many small steps: what grows with their number?

    python tests/stress/long_run.py [--steps 20000] [--workers 1] [--log-every 50]

Trains a tiny encoder on 24 small images it writes, with a checkpoint every second or so, and prints after each tenth of
the run: the median time of a step, memory and memory of the workers, open files, threads, and bytes of the logs a step.
Exit code 1 when something grows. Linux only: it reads /proc. `measure` is what the tests call with few steps.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from data2vec_vision import train
from data2vec_vision.config import TrainConfig

TENTHS = 10
SLACK = 8e6  # bytes of memory by which the end may exceed what it was after a tenth: pages of the allocator


@dataclass
class Sample:
    """The process after a tenth of the run."""

    step: int
    seconds: float  # of a step, median since the last sample
    memory: int  # bytes resident
    workers_memory: int
    files: int  # open
    threads: int
    log: float  # bytes of metrics.jsonl a step
    checkpoints: int  # written so far


def write_images(folder: Path) -> Path:
    """24 images of noise, of which four a step make six steps an epoch."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, steps: int, workers: int = 1, log_every: int = 50, minutes: float = 0.02) -> list[Sample]:
    """Train so many steps (a multiple of 60) in `folder` and look TENTHS times."""
    images, samples, times, saves = write_images(folder / "images"), [], [], []
    add, save, clock = train.Window.add, train.save, time.perf_counter()

    def noted(self: train.Window, step: train.Step) -> None:
        nonlocal clock
        add(self, step)
        times.append(time.perf_counter() - clock)
        if step.number % (steps // TENTHS) == 0:
            samples.append(
                Sample(
                    step.number,
                    statistics.median(times),
                    resident(os.getpid()),
                    sum(resident(child.pid) for child in active_children() if child.pid),
                    len(os.listdir("/proc/self/fd")),
                    len(os.listdir("/proc/self/task")),
                    (folder / "run" / "metrics.jsonl").stat().st_size / step.number,
                    len(saves),
                )
            )
            times.clear()
        clock = time.perf_counter()

    def counted(*args: object) -> None:
        save(*args)
        saves.append(None)

    config = TrainConfig(
        str(images), image_size=16, patch_size=4, hidden_dim=32, n_heads=2, n_encoders=2, batch_size=4, device="cpu",
        precision="fp32", workers=workers, epochs=steps // 6, log_every=log_every, checkpoint_minutes=minutes,
        save_every=10**6, no_report=True, no_tensorboard=True, checkpoint_out_dir=str(folder / "run"),
    )  # fmt: skip
    with mock.patch.object(train.Window, "add", noted), mock.patch.object(train, "save", counted), silence():
        train.train(config)
    return samples


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def grown(samples: list[Sample]) -> list[str]:
    """What is more at the end than after the first tenth, in words."""
    first, last = samples[0], samples[-1]
    found = [f"{n}: {getattr(first, n)} to {getattr(last, n)}" for n in ("files", "threads") if more(first, last, n, 0)]
    return found + [
        f"{n}: {getattr(first, n) / 1e6:.1f} to {getattr(last, n) / 1e6:.1f} MB"
        for n in ("memory", "workers_memory")
        if more(first, last, n, SLACK)
    ]


def more(first: Sample, last: Sample, name: str, slack: float) -> bool:
    return getattr(last, name) > getattr(first, name) + slack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_040)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(Path(folder), args.steps // 60 * 60, args.workers, args.log_every)
    print("|   step | ms a step | memory, MB | workers, MB | open files | threads | log, bytes a step | checkpoints |")
    for s in samples:
        memory, workers = s.memory / 1e6, s.workers_memory / 1e6
        print(
            f"| {s.step:6,} | {1000 * s.seconds:9.2f} | {memory:10.1f} | {workers:11.1f} | {s.files:10} | "
            f"{s.threads:7} | {s.log:17.1f} | {s.checkpoints:11,} |"
        )
    found = grown(samples)
    print(f"grown: {'; '.join(found) or 'nothing'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
