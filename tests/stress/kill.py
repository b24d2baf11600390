"""Kill runs at random moments, go on with them, kill them again, until they end: nothing is lost, nothing is different.

    python tests/stress/kill.py                 # 100 kills; the table of benchmarks/RESULTS.md
    python tests/stress/kill.py --kills 5       # as the test suite does it

Runs take their images from a folder or from a zip, have no worker or two, and write a checkpoint after every step or
after every epoch of 6 steps. A half of the kills come at a random moment, a half while a file is being written. After each,
all files of the run must be readable; the same command, with `--resume-checkpoint auto`, goes on. In the end the
encoder must be bit for bit that of a run which nobody killed, and metrics.jsonl have the same lines.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data2vec_vision.__main__ import main as command_line

STEPS, OF_EPOCH = 30, 6
TINY = ["--image-size", "16", "--patch-size", "4", "--hidden-dim", "32", "--n-heads", "2", "--n-encoders", "2",
        "--batch-size", "4", "--epochs", str(STEPS // OF_EPOCH), "--precision", "fp32", "--log-every", "1", "--no-report",
        "--no-tensorboard", "--dropout", "0.1", "--resume-checkpoint", "auto"]  # fmt: skip
EACH_STEP = ["--checkpoint-minutes", "1e-6", "--save-every", "5"]
EACH_EPOCH = ["--checkpoint-minutes", "1000", "--save-every", "1"]
UNTIMED = ("images_per_second", "data_wait")  # what differs in every run
KILLED = -signal.SIGKILL


@dataclass
class Kind:
    """A kind of run, and what became of its kills."""

    images: Path
    workers: int
    each_step: bool
    kills: int = 0
    while_writing: int = 0
    unreadable: list[str] = field(default_factory=list)
    recomputed: int = 0  # steps at most that were logged and had to be done again after a kill
    different: list[str] = field(default_factory=list)
    runs: int = 0

    @property
    def options(self) -> list[str]:
        return [str(self.images), *TINY, "--workers", str(self.workers), *(EACH_STEP if self.each_step else EACH_EPOCH)]

    def __str__(self) -> str:
        source, saved = self.images.suffix.lstrip(".") or "folder", "step" if self.each_step else "epoch of 6 steps"
        return (
            f"| {source} | {self.workers} | {saved} | {self.kills} | {self.while_writing} | {len(self.unreadable)} "
            f"| {self.recomputed} | {len(self.different)} of {self.runs} |"
        )


def make_images(folder: Path) -> tuple[Path, Path]:
    """24 small images in a folder, and the same in a zip."""
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(images / f"{number}.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted(images.iterdir()):
            archive.write(path, path.name)
    return images, folder / "images.zip"


def started(arguments: list[str], log: Path) -> int:
    """The command in a forked process, which has everything imported; its output is added to `log`."""
    if child := os.fork():
        return child
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = command_line(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(child: int, block: bool = True) -> int | None:
    """The exit code of a process, less than 0 for a signal; None while it runs."""
    done, status = os.waitpid(child, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def run_and_kill(kind: Kind, folder: Path, seconds: float, chance: random.Random) -> int:
    """The command, killed within so many seconds or, by chance, later, while it writes; its exit code."""
    aimed, limit = chance.random() < 0.5, chance.uniform(0, seconds)
    child = started(["train", *kind.options, "--checkpoint-out-dir", str(folder)], folder.with_suffix(".log"))
    begin = time.monotonic()
    while time.monotonic() - begin < limit:
        if (code := ended(child, block=False)) is not None:
            return code
        time.sleep(0.001)
    while aimed and not (writing := any(folder.glob(".*.tmp"))):
        if (code := ended(child, block=False)) is not None:
            return code
    if aimed:
        time.sleep(chance.uniform(0, 0.003))
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    assert code is not None
    if code == KILLED:
        kind.kills += 1
        kind.while_writing += aimed and writing
    return code


def look_at(kind: Kind, folder: Path) -> None:
    """Note files that cannot be read, and how many steps have to be done again."""
    saved = max([0, *(readable(kind, path, step_of, 0) for path in folder.glob("checkpoint_*.pt"))])
    for kind_of_file in ("student", "teacher"):
        for path in folder.glob(f"{kind_of_file}_*.pt"):
            readable(kind, path, step_of, 0)
    readable(kind, folder / "config.json", lambda path: json.loads(path.read_text()), None)
    logged = readable(kind, folder / "metrics.jsonl", last_step, 0)
    kind.recomputed = max(kind.recomputed, logged - saved)


def readable(kind: Kind, path: Path, read: Callable[[Path], Any], otherwise: Any) -> Any:
    """What `read` makes of a file; `otherwise` where it is not there, or, which is noted, cannot be read."""
    try:
        return read(path) if path.exists() else otherwise
    except Exception as error:
        kind.unreadable.append(f"{path}: {error}")
        return otherwise


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


def last_step(path: Path) -> int:
    """Of metrics.jsonl, whose last line may be torn."""
    *lines, _ = path.read_text().split("\n")
    return max([0, *(json.loads(line)["step"] for line in lines)])


def result(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The lines of metrics.jsonl that every run has, and the encoder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / f"student_{STEPS // OF_EPOCH - 1}.pt", weights_only=True)["state_dict"]
    return [{name: value for name, value in line.items() if name not in UNTIMED} for line in lines], state


def same(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def survive(kinds: list[Kind], kills: int, place: Path, chance: random.Random) -> None:
    """Runs of all kinds in turn, until each has ended and so many kills have hit."""
    # Everything is done in processes of their own: what was computed in this one would not survive a fork.
    begin = time.monotonic()
    whole = place / "whole"
    code = ended(started(["train", *kinds[0].options, "--checkpoint-out-dir", str(whole)], place / "whole.log"))
    assert code == 0, (place / "whole.log").read_text()
    seconds, expected, number = time.monotonic() - begin, result(whole), 0
    while sum(kind.kills for kind in kinds) < kills or not all(kind.runs for kind in kinds):
        kind = kinds[number % len(kinds)]
        folder = place / f"run{number}"
        number += 1
        given = seconds / 4
        while (code := run_and_kill(kind, folder, given, chance)) == KILLED:
            look_at(kind, folder)
            given *= 1.5  # so that each run comes to its end
        if code != 0:
            raise SystemExit(f"a run ended with {code}:\n{folder.with_suffix('.log').read_text()}")
        look_at(kind, folder)
        kind.runs += 1
        if not same(result(folder), expected):
            kind.different.append(str(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["D2V_CACHE"] = str(place / "cache")
        sources = make_images(place)
        kinds = [Kind(*parts) for parts in product(sources, (0, 2), (True, False))]
        random.Random(args.seed).shuffle(kinds)
        survive(kinds, args.kills, place, random.Random(args.seed))
    print("| images from | workers | saved after each | kills | while a file was written | unreadable files ", end="")
    print("| steps done again, at most | final encoders that differ |\n|---|---|---|---|---|---|---|---|")
    for kind in kinds:
        print(kind)
    bad = [*(text for kind in kinds for text in kind.unreadable), *(f for kind in kinds for f in kind.different)]
    limit = all(kind.recomputed <= (1 if kind.each_step else OF_EPOCH) for kind in kinds)
    print(f"{sum(kind.kills for kind in kinds)} kills; {'; '.join(bad) or 'nothing was lost'}")
    return 1 if bad or not limit else 0


if __name__ == "__main__":
    sys.exit(main())
