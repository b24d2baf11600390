"""Workers of a run are killed or stopped at random moments: is the run the same, bit for bit?

    python tests/stress/lost_workers.py [--tries 50] [--seed 0]

Each try trains a tiny encoder for 36 steps with two workers, of which one gets SIGKILL, SIGSEGV or SIGSTOP (a process that
hangs; the limit is 2 s here) after a random time, up to three times. Prints what became of the tries; exit code 1 unless
all ended as the run that nothing happened to, or, when processes were lost thrice in a row, in the line that says so.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from long_run import silence, write_images

from data2vec_vision import loading, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import RunFailed

SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)


def config(images: Path, folder: Path, workers: int) -> TrainConfig:
    return TrainConfig(
        str(images), image_size=16, patch_size=4, hidden_dim=32, n_heads=2, n_encoders=2, batch_size=4, device="cpu",
        precision="fp32", workers=workers, epochs=6, save_every=10**6, no_report=True, no_tensorboard=True, dropout=0.1,
        checkpoint_out_dir=str(folder),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "checkpoint_5.pt", weights_only=True)
    return content["method_state"]


class Killer(threading.Thread):
    """Sends `count` signals to random children of this process, each after up to half a second."""

    def __init__(self, draw: random.Random, number: signal.Signals, count: int):
        super().__init__(daemon=True)
        self.draw, self.number, self.left, self.sent = draw, number, count, 0

    def run(self) -> None:
        while self.left > 0:
            time.sleep(self.draw.uniform(0, 0.5))
            if children := active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw_pid(self.draw, children), self.number)
                    self.sent += 1
            self.left -= 1


def draw_pid(draw: random.Random, children: list[Any]) -> int:
    return draw.choice(sorted(child.pid for child in children))


def tried(images: Path, folder: Path, expected: dict[str, torch.Tensor], killer: Killer) -> str:
    """What became of a run whose workers the killer is after."""
    killer.start()
    try:
        with silence():
            train.train(config(images, folder, 2))
    except RunFailed as error:
        return (
            "ended in a line" if "a process that reads images was lost 3 times in a row" in str(error) else str(error)
        )
    finally:
        killer.left = 0
        killer.join()
    found = weights(folder)
    return "the same" if all(torch.equal(found[name], value) for name, value in expected.items()) else "ANOTHER RUN"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, outcomes = random.Random(args.seed), Counter()
    loading.SLOWEST = 2.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images = write_images(folder / "images")
        with silence():
            train.train(config(images, folder / "plain", 0))
        for n in range(args.tries):
            number = SIGNALS[n % len(SIGNALS)]
            killer = Killer(draw, number, draw.randint(1, 3))
            outcome = tried(images, folder / f"try{n}", weights(folder / "plain"), killer)
            outcomes[number.name, killer.sent, outcome] += 1
    print("| signal | sent | outcome | tries |\n|---|---|---|---|")
    for (name, sent, outcome), count in sorted(outcomes.items()):
        print(f"| {name} | {sent} | {outcome} | {count} |")
    return 0 if {outcome for _, _, outcome in outcomes} <= {"the same", "ended in a line"} else 1


if __name__ == "__main__":
    sys.exit(main())
