"""What a method learns on a folder of class folders: pretrain, `evaluate`, one line in a file of results.

    python benchmarks/learning.py data2vec2 mae --train cifar10/train --test cifar10/test --minutes 20 --threads 1
    python benchmarks/learning.py data2vec2 --train cifar10/train --test cifar10/test --epochs 4 --seeds 0 1 2
    python benchmarks/learning.py data2vec --peer --train cifar10/train --test cifar10/test --minutes 20 --seeds 0 1 2
    python benchmarks/learning.py --table

The class folders' names are seen by `evaluate` only. All methods train the same small ViT (192 wide, 6 blocks, 3 heads) with
their defaults, unless `--option` and `--set` say otherwise, on one batch size. `--minutes` is CPU time, of all threads of the
training process together and divided by their number: a few steps are timed, then the run gets as many steps as
fit. `--epochs` gives all methods the same number of images. Every run has a process of its own; with `--peer` each is followed by one of
stable-pretraining's class of the method, on the same images, views, encoder, batch and precision, with the optimizer, rate and
arguments of that project's own benchmark script. What the row of a run holds is in `row`. `--table` prints the results by setting,
mean and standard deviation over seeds.
"""

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data2vec_vision import checkpoint, methods
from data2vec_vision.config import TrainConfig, field_type, fields
from data2vec_vision.device import device_name
from data2vec_vision.evaluate import evaluate
from data2vec_vision.online import Onlooker
from data2vec_vision.plan import Job, prepare
from data2vec_vision.run import RunFolder
from data2vec_vision.sources import open_source
from data2vec_vision.train import optimizer_and_scaler, training_steps, watch

PEERS = Path(__file__).parent / "peers"
RESULTS = Path(__file__).parent / "learning.jsonl"
SMALL = {"patch_size": 4, "hidden_dim": 192, "n_encoders": 6, "n_heads": 3}
TIMED = slice(4, 20)  # steps whose mean time sets the length of a run


@dataclass
class Trained:
    """What came of a run, whoever's code it was."""

    steps: int
    cpu_seconds: float
    wall_seconds: float
    encoder: Path  # a student file
    record: dict[str, Any]  # the log's last value of each figure


def configuration(args: argparse.Namespace, method: str, out: str) -> TrainConfig:
    settings: dict[str, Any] = {**SMALL, "image_size": 32} if not args.model else {"model": args.model}
    settings |= {
        "batch_size": args.batch_size,
        "grad_accum": 1,
        "seed": args.seed,
        "workers": args.workers,
    }
    for option in args.option:
        name, _, value = option.partition("=")
        settings[name] = field_type(name)(value)
    return TrainConfig(
        args.train, method=method, set=tuple(args.set), checkpoint_out_dir=out, save_every=10**6,
        no_report=True, no_tensorboard=True, compile=False, **settings,
    )  # fmt: skip


def steps_of(config: TrainConfig, args: argparse.Namespace) -> int:
    """The length of the run: what fits into --minutes, or --epochs, which may be a fraction."""
    if args.minutes is not None:
        return steps_that_fit(config, 60 * args.minutes * args.threads)
    return max(1, round(args.epochs * len(open_source(config.input_path)) / config.images_a_step))


def steps_that_fit(config: TrainConfig, seconds: float) -> int:
    """How many steps take so many CPU seconds, by the mean of a few of a run of that length: its knobs may depend on it."""
    steps = TIMED.stop
    for _ in range(3):
        job = prepare(config, steps)
        job.method.skip_beginning()
        knobs, start = job.config.set, 0.0
        for step in training_steps(job, *optimizer_and_scaler(job)):
            if step.number == TIMED.start:
                start = time.process_time()
            if step.number == TIMED.stop:
                break
        steps = max(TIMED.stop, round(seconds * (TIMED.stop - TIMED.start) / (time.process_time() - start)))
        if prepare(config, steps).config.set == knobs:
            break
    return steps


def train(config: TrainConfig, steps: int) -> tuple[Trained, Job]:
    """A run as `train` has it, of so many steps."""
    job = prepare(config, steps)
    folder = RunFolder(job.folder)
    folder.open(job.config, 0)
    cpu, wall = time.process_time(), time.perf_counter()
    with contextlib.closing(Onlooker(job, folder)) as onlooker:
        watch(job, folder, onlooker)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    folder.close()
    path = folder.path / "student.pt"
    checkpoint.save_encoder(job.method.student, path, config.method, config=vars(job.config), step=0, epoch=0)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    record = {name: value for line in lines for name, value in line.items() if value is not None}  # the last of each
    return Trained(job.schedule.total_steps, cpu, wall, path, record), job


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run of args.method in this process, and its evaluation."""
    torch.set_num_threads(args.threads)
    method = str(PEERS / f"peer_{args.methods[0]}.py") if args.peer else args.methods[0]
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args, method, f"{folder}/run")
        trained, job = train(config, steps_of(config, args))
        found = evaluate(
            str(trained.encoder), args.labelled or args.train, test_path=args.test, floors=False, precision=job.config.precision,
            device=job.device.type, json=f"{folder}/evaluation.json", picture=f"{folder}/confusion.png",
        )  # fmt: skip
        if args.keep:
            shutil.copy(trained.encoder, args.keep)
    return row(args, trained, job, found)


def row(args: argparse.Namespace, trained: Trained, job: Job, found: dict[str, Any]) -> dict[str, Any]:
    result = next(iter(found["results"].values()))
    seen = trained.steps * job.config.images_a_step
    return {
        "library": "stable-pretraining" if args.peer else "ours",
        "method": args.methods[0],
        "settings": [*args.set, *args.option],
        "data": args.data or Path(args.train).parent.name,
        "images": len(job.source),
        "encoder": args.model or f"ViT 192 x 6, patch 4, {job.config.image_size} px",
        "batch_size": job.config.batch_size,
        "precision": job.config.precision,
        "resolved": {
            "set": job.config.set,
            **{n: getattr(job.config, n) for n in ("max_lr", "tau_initial", "tau_end")},
        },
        "budget": f"{args.minutes:g} min x {args.threads}" if args.minutes is not None else f"{args.epochs:g} epochs",
        "steps": trained.steps,
        "seen": seen,
        "cpu_minutes": round(trained.cpu_seconds / 60, 1),
        "wall_minutes": round(trained.wall_seconds / 60, 1),
        "seed": args.seed,
        "knn": result["knn"],
        "linear": result["linear"],
        "few_shot": {n: round(v["mean"], 2) for n, v in result["few_shot"].items()},
        "labelled": [found["images"]["train"], found["images"]["test"]],
        "verdict": None if args.peer else trained.record.get("verdict"),  # read off figures that peers do not give
        "rank": None if args.peer else trained.record.get("rankme"),
        "hardware": f"{device_name(job.device)}, {args.threads} threads",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "day": time.strftime("%Y-%m-%d"),
    }


def runs(args: argparse.Namespace) -> Iterator[list[str]]:
    """The command line of each run: methods within seeds, ours and the peer's in turn, so that rounds alternate."""
    passed = [a for name in ("train", "labelled", "test", "minutes", "epochs", "model", "batch_size", "threads", "workers",
                             "option", "set", "data", "results", "keep")
              if (value := getattr(args, name)) not in (None, [])
              for a in (f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)]))]  # fmt: skip
    for seed in args.seeds:
        for method in args.methods:
            for peer in (False, True) if args.peer else (False,):
                yield [sys.executable, __file__, method, "--one", "--seed", str(seed), *passed] + ["--peer"] * peer


def table(path: Path) -> str:
    """The results as a Markdown table: a row for each setting, mean ± standard deviation over its seeds."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        r = json.loads(line)
        key = (
            r["data"],
            r["images"],
            r["encoder"],
            r["batch_size"],
            r["budget"],
            tuple(r["labelled"]),
            r["library"],
            r["method"],
        )
        groups[(*key, " ".join(r["settings"]))][r["seed"]] = (
            r  # a later run of a seed takes the place of an earlier one
        )
    lines = [
        "| data | encoder | labelled / test | budget | method | settings | images seen | CPU min | seeds | kNN | linear | 10-shot | RankMe | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, images, encoder, batch, budget, labelled, library, method, settings), by_seed in groups.items():
        rows = list(by_seed.values())
        name = method if library == "ours" else f"{method}, {library}"
        cells = [
            f"{data}, {images:,}",
            f"{encoder}, batch {batch}",
            "{:,} / {:,}".format(*labelled),
            budget,
            name,
            settings or "default",
        ]
        cells += [f"{statistics.mean(r['seen'] for r in rows):,.0f}"]
        cells += [f"{statistics.mean(r['cpu_minutes'] for r in rows):.1f}", str(len(rows))]
        cells += [spread([r["knn"] for r in rows]), spread([r["linear"] for r in rows])]
        cells += [spread([r["few_shot"].get("10", float("nan")) for r in rows])]
        ranks = [r["rank"] for r in rows if r["rank"] is not None]
        cells += [spread(ranks, 0) if ranks else ""]
        cells += [", ".join(sorted({str(r["verdict"] or "none") for r in rows}))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(methods.names()))
    parser.add_argument("--train", help="folder of class folders, to pretrain on")
    parser.add_argument("--labelled", help="class folders, the labelled images of the probes, instead of --train")
    parser.add_argument("--test", help="folder of class folders that the probes are scored on")
    parser.add_argument("--minutes", type=float, help="CPU time of a run, a thread")
    parser.add_argument("--epochs", type=float, help="passes over the images, instead of --minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", help="a timm name instead of the small ViT on 32 px")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0, help="0: the CPU time of loading counts too")
    parser.add_argument("--option", nargs="*", default=[], help="options of train: max_lr=0.001 image_size=28")
    parser.add_argument("--set", nargs="*", default=[], help="knobs of the method: n_masks=4")
    parser.add_argument("--peer", action="store_true", help="run stable-pretraining's class too, after each of ours")
    parser.add_argument("--data", help="the name of the images in the results; default the folder's")
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--keep", help="copy the student file here")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(Path(args.results)))
        return
    if not (args.methods and args.train and args.test) or (args.minutes is None) == (args.epochs is None):
        parser.error("give methods, --train, --test, and --minutes or --epochs")
    if (args.minutes or args.epochs or 0) <= 0:
        parser.error("--minutes and --epochs must be more than 0")
    if unknown := {option.partition("=")[0] for option in args.option} - set(fields()):
        parser.error(f"train has no option named {', '.join(sorted(unknown))}")
    if alone := [m for m in args.methods if args.peer and not (PEERS / f"peer_{m}.py").exists()]:
        parser.error(f"stable-pretraining has no {', '.join(alone)}; leave out --peer")
    if args.keep and (args.peer or len(args.methods) * len(args.seeds) > 1) and not args.one:
        parser.error("--keep takes the encoder of one run: give one method and one seed, without --peer")
    if not args.one:
        for command in runs(args):
            subprocess.run(command, check=True)
        return
    result = measure(args)
    with open(args.results, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
