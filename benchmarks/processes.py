"""What several processes cost: time of a step, plain and in DistributedDataParallel, and of a flag.

    python benchmarks/processes.py overhead --methods data2vec2 swav
    python benchmarks/processes.py latency

`overhead` times `train`'s own steps on the CPU, the same images a step: plain with all threads; in DistributedDataParallel
with one process, which sends to nobody; and with two processes of half the threads each, over gloo. Every variant has
processes of its own and takes its turn while the others wait; ratios are taken within a round. The views are in memory, so that loading has no part in it.

`latency` times an all-reduce of a flag, of which `train` has one a step, by the number of processes, all of them on this machine.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from formulas import gradient_bytes
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from data2vec_vision import methods, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import device_name
from data2vec_vision.plan import prepare
from data2vec_vision.train import optimizer_and_scaler, training_steps

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 4, "hidden_dim": 192, "n_encoders": 6}
QUIET: dict[str, Any] = {"workers": 0, "no_report": True, "no_tensorboard": True, "device": "cpu", "compile": False}
VARIANTS = ("plain", "DDP, 1 process", "DDP, 2 processes")


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


def flag(rank: int, processes: int, port: int, repeats: int) -> float:
    """Seconds of an all-reduce of 8 bytes on the CPU, as any_process has it."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    value = torch.tensor(0)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(value, dist.ReduceOp.MAX)
    took = time.perf_counter() - start
    dist.destroy_process_group()
    return took / repeats


def latency(args: argparse.Namespace) -> None:
    print(
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, gloo over loopback, {args.repeats} flags a round\n"
    )
    print("| processes | ms a flag |\n|---|---|")
    pools = {n: ProcessPoolExecutor(n, multiprocessing.get_context("fork")) for n in args.processes}
    times: dict[int, list[float]] = {n: [] for n in pools}
    for _ in range(args.rounds):
        for n, pool in pools.items():
            port = free_port()
            found = [pool.submit(flag, rank, n, port, args.repeats) for rank in range(n)]
            times[n].append(max(1e3 * future.result() for future in found))
    for n, pool in pools.items():
        pool.shutdown()
        print(f"| {n} | {spread(times[n], 2)} |")


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
    flag_of = commands.add_parser("latency", help="time of a flag by the number of processes")
    flag_of.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    flag_of.add_argument("--rounds", type=int, default=5)
    flag_of.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    {"overhead": overhead, "latency": latency}[args.command](args)


if __name__ == "__main__":
    main()
