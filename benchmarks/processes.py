"""What several processes cost: time of a step, and what they send to each other.

    python benchmarks/processes.py overhead --methods data2vec2 swav
    python benchmarks/processes.py traffic

`overhead` times `train`'s own steps on the CPU, the same images a step: plain with all threads; in DistributedDataParallel
with one process, which sends to nobody; and with two processes of half the threads each, over gloo. Every variant has
processes of its own and takes its turn while the others wait; ratios are taken within a round. The views are in memory, so that loading has no part in it.

`traffic` runs `train` with two processes on a small ViT, counts the bytes of every collective by what it is for, and puts them beside
formulas.py. All are counted where torch.distributed is called; of DistributedDataParallel by way of its communication hook.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from formulas import bytes_a_step, gradient_bytes, health_bytes, predicted_width, sent_by_ring
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from data2vec_vision import methods, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import device_name
from data2vec_vision.distributed import BatchNorm
from data2vec_vision.methods.swav import SwAV
from data2vec_vision.plan import Job, prepare
from data2vec_vision.targets import PositionMean
from data2vec_vision.train import optimizer_and_scaler, training_steps

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 4, "hidden_dim": 192, "n_encoders": 6}
TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_encoders": 2, "n_heads": 2}
QUIET: dict[str, Any] = {"workers": 0, "no_report": True, "no_tensorboard": True, "device": "cpu", "compile": False}
VARIANTS = ("plain", "DDP, 1 process", "DDP, 2 processes")
COUNTED_STEPS = 4
# What a collective is for, by the function that asks for it.
PURPOSES = {
    "average_gradients": "gradients",
    "any_process": "flags",
    "sinkhorn": "Sinkhorn",
    "mean_entropy_gap": "mean entropy",
    "prototype_use": "prototypes in use",
    "read": "log",
    "read_health": "verdict",
    "state": "checkpoint",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def noise(folder: Path, count: int, side: int) -> Path:
    """So many images without content."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return folder


# Time


class Timed:
    """A variant in its processes: seconds of a step on demand."""

    def __init__(self, variant: str, config: TrainConfig, threads: int):
        context = multiprocessing.get_context("spawn")
        count = 2 if variant == VARIANTS[2] else 1
        port, self._pipes = free_port(), []
        for rank in range(count):
            ours, theirs = context.Pipe()
            given = (theirs, variant, config, rank, count, port, max(1, threads // count))
            context.Process(target=serve, args=given, daemon=True).start()
            theirs.close()
            self._pipes.append(ours)
        self.gradient_bytes = max(pipe.recv() for pipe in self._pipes)

    def seconds(self, steps: int) -> float:
        """A step's, the mean of so many, of the slower process; none end the processes."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self._pipes) if steps else 0.0


def serve(pipe: Connection, variant: str, config: TrainConfig, rank: int, count: int, port: int, threads: int) -> None:
    """The life of a variant's process: `train`'s steps on one batch, timed as asked."""
    torch.set_num_threads(threads)
    if variant != VARIANTS[0]:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    job = prepare(config)
    job.method.skip_beginning()
    batch = next(iter(train.loader(job)))
    train.loader = lambda *given: itertools.repeat(batch)
    if variant == VARIANTS[1]:  # `train` wraps for two processes or more
        train.compiled_and_parallel = lambda job: DistributedDataParallel(
            job.method, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    steps = training_steps(job, *optimizer_and_scaler(job))
    for _ in range(2):  # DDP arranges its buckets in the first
        next(steps)
    pipe.send(gradient_bytes(job.method))
    while number := pipe.recv():
        start = time.perf_counter()
        for _ in range(number):
            next(steps)
        pipe.send((time.perf_counter() - start) / number)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def overhead(args: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `train` has it: threads that wait do not spin
    threads = args.threads or len(os.sched_getaffinity(0))
    print(f"{device_name(torch.device('cpu'))}, {threads} threads, python {platform.python_version()}, torch "
          f"{torch.__version__}, timm {timm.__version__}; ViT {args.hidden_dim} x {args.n_encoders}, {args.image_size} px, patch "
          f"{args.patch_size}, {args.batch_size} images a step, {args.rounds} rounds of {args.steps} steps\n")  # fmt: skip
    print(
        "| method | gradients, MB | plain, ms a step | DDP, 1 process | times plain | DDP, 2 processes | times plain |"
    )
    print("|---|---|---|---|---|---|---|")
    sizes = {name: getattr(args, name) for name in SMALL}
    with tempfile.TemporaryDirectory() as folder:
        images = noise(Path(folder) / "images", args.batch_size, args.image_size)
        for method in args.methods:
            config = TrainConfig(str(images), method=method, batch_size=args.batch_size, grad_accum=1, epochs=10**6,
                                 checkpoint_out_dir=f"{folder}/run", precision=args.precision, **sizes, **QUIET)  # fmt: skip
            timed = [Timed(variant, config, threads) for variant in VARIANTS]
            times: list[list[float]] = [[] for _ in VARIANTS]
            for _ in range(args.rounds):
                for of, variant in zip(times, timed):
                    of.append(variant.seconds(args.steps))
            for variant in timed:
                variant.seconds(0)
            plain, *others = times
            cells = [method, f"{timed[0].gradient_bytes / 1e6:.1f}", spread([1e3 * t for t in plain], 0)]
            for of in others:
                cells += [spread([1e3 * t for t in of], 0), spread([t / p for t, p in zip(of, plain)], 2)]
            print("| " + " | ".join(cells) + " |", flush=True)


# Bytes


class Counts:
    """Bytes of each purpose, of one process, while `running`."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.running = False
        self.n_logged = 0

    def add(self, purpose: str, count: int) -> None:
        self.bytes[purpose] += count if self.running else 0


def purpose() -> str:
    """What the collective that is being called is for."""
    frame = sys._getframe(2)
    while frame is not None:
        name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if name in PURPOSES:
            return PURPOSES[name]
        if name == "forward" and isinstance(owner, BatchNorm):
            return "batch norm"
        if name == "after_step" and isinstance(owner, PositionMean | SwAV):
            return "queue" if isinstance(owner, SwAV) else "centre of targets"
        if name == "backward" and frame.f_code.co_filename == methods.base.distributed.__file__:
            return "gradients of statistics"
        frame = frame.f_back
    return "unknown"


def average_gradients(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DistributedDataParallel does with a bucket of gradients anyway, but from Python."""
    return allreduce_hook(group, bucket)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts what this process gives to torch.distributed from the first step of `train` on."""
    counts = Counts()
    originals = dist.all_reduce, dist.all_gather, train.compiled_and_parallel, train.training_steps
    all_reduce, all_gather, compiled_and_parallel, steps_of_training = originals

    def counted_reduce(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
        counts.add(purpose(), tensor.nbytes)
        return all_reduce(tensor, *given, **named)

    def counted_gather(parts: list[torch.Tensor], *given: Any, **named: Any) -> Any:
        counts.add(purpose(), sum(part.nbytes for part in parts))
        return all_gather(parts, *given, **named)

    def hooked(job: Job) -> torch.nn.Module:
        forward = compiled_and_parallel(job)
        forward.register_comm_hook(None, average_gradients)
        return forward

    def counted_steps(*given: Any) -> Iterator[train.Step]:
        counts.running = True
        for step in steps_of_training(*given):
            counts.n_logged = len(step.logs)
            yield step

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather
    train.compiled_and_parallel, train.training_steps = hooked, counted_steps
    try:
        yield counts
    finally:
        dist.all_reduce, dist.all_gather, train.compiled_and_parallel, train.training_steps = originals


def count(config: TrainConfig, rank: int, port: int) -> tuple[dict[str, int], dict[str, float]]:
    """One of 2 processes trains. Returns its bytes, and those of formulas.py for as many steps."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    made: list[Job] = []
    original: Callable[..., Job] = train.prepare
    train.prepare = lambda config: made.append(original(config)) or made[0]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), counting() as counts:
        train.train(config)
    train.prepare = original
    job, n_steps = made[0], made[0].schedule.total_steps
    resolved = job.config
    formula = bytes_a_step(job.method, resolved.batch_size, resolved.grad_accum, 2, resolved.log_every, counts.n_logged)
    formula = {name: n_steps * value for name, value in formula.items()}
    formula["verdict"] = health_bytes(job.method, predicted_width(job.method))  # a short run reads it once, at its end
    return dict(counts.bytes), formula


def counted(configs: list[TrainConfig]) -> list[tuple[dict[str, int], dict[str, float]]]:
    """`count` of each, in two processes; both must have counted the same."""
    results = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for config in configs:
            port = free_port()
            one, two = [pool.submit(count, config, rank, port) for rank in range(2)]
            results.append(one.result())
            if two.result() != results[-1]:
                raise RuntimeError(f"{config.method}: the processes do not send the same: {two.result()}")
    return results


def counted_configs(folder: Path, names: list[str] | tuple[str, ...]) -> list[TrainConfig]:
    """Short runs of each method with all that it sends: no beginning with pixels, SwAV's queue from the start."""
    images = str(noise(folder / "images", 4 * 2 * COUNTED_STEPS, TINY["image_size"]))
    configs = []
    for name in names:
        knobs = {"swav": ("queue_start=0", "queue_length=2", "n_prototypes=16", "head_dim=24", "n_local=1"),
                 "msn": ("n_prototypes=16", "head_dim=24", "n_focal=2"), "mae": ()}.get(name, ("pixel_pct=0",))  # fmt: skip
        configs.append(TrainConfig(images, method=name, set=knobs, batch_size=4, grad_accum=2, epochs=1, log_every=1, precision="fp32",
                                   checkpoint_out_dir=str(folder / name), **TINY, **QUIET))  # fmt: skip
    return configs


def traffic(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, 2 processes, gloo; bytes of payload a step and process, counted in {COUNTED_STEPS} steps "
          "of 2 passes of 4 images, ViT 32 x 2, 16 px\n\n| method | of | counted | formula |\n|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, (real, formula) in zip(args.methods, counted(counted_configs(Path(folder), args.methods))):
            for what in sorted(real | formula, key=lambda key: -real.get(key, 0)):
                cells = [f"{found[what] / COUNTED_STEPS:,.0f}" if what in found else "" for found in (real, formula)]
                print(f"| {name} | {what} | {' | '.join(cells)} |")
    print(
        "\nViT-B/16 at 224 px, defaults, 1,024 images a step in one pass, by formula; MB that a process of 8 sends a step\n"
    )
    print("| method | gradients | gradients, MB sent | its own collectives, MB sent | share |\n|---|---|---|---|---|")
    for name in args.methods:
        method = methods.find(name)("vit_base_patch16_224")
        parts = bytes_a_step(method, 1024, 1, 8, 10, 8)
        sent = {what: sent_by_ring(value, 8, what == "queue") / 1e6 for what, value in parts.items()}
        own = sum(sent.values()) - sent["gradients"]
        print(f"| {name} | {parts['gradients'] / 1e6:,.0f} MB | {sent['gradients']:,.0f} | {own:.2f} | "
              f"{100 * own / sent['gradients']:.2f} % |", flush=True)  # fmt: skip


def main() -> None:
    names = methods.names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    time_of = commands.add_parser("overhead", help="time of a step, plain and with 1 and 2 processes")
    time_of.add_argument("--methods", nargs="+", default=["data2vec2", "swav"], choices=names)
    time_of.add_argument("--batch-size", type=int, default=64)
    time_of.add_argument("--rounds", type=int, default=7)
    time_of.add_argument("--steps", type=int, default=4, help="steps of a variant in a round")
    time_of.add_argument("--threads", type=int, help="of the plain variant; else one a core")
    time_of.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    for name, value in SMALL.items():
        time_of.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    bytes_of = commands.add_parser("traffic", help="bytes between processes, counted and by formula")
    bytes_of.add_argument("--methods", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    {"overhead": overhead, "traffic": traffic}[args.command](args)


if __name__ == "__main__":
    main()
