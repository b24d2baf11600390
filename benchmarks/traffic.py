"""What processes send to each other in a training step: counted, and by formula.

    python benchmarks/traffic.py

`train` runs with two processes on a small ViT, and every collective is counted by what it is for, where torch.distributed is
called; of DistributedDataParallel by way of its communication hook. Beside it stands what formulas.py says. The second table is of
formulas alone, for a ViT-B/16.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from formulas import Sent, a_step, sent_by_ring, verdict
from processes import QUIET, free_port, noise
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from data2vec_vision import methods, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.distributed import BatchNorm
from data2vec_vision.methods.swav import SwAV
from data2vec_vision.plan import Job
from data2vec_vision.targets import PositionMean

TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_encoders": 2, "n_heads": 2}
COUNTED_STEPS = 4
# What a collective is for, by the function that asks for it.
PURPOSES = {
    "average_gradients": "gradients",
    "any_process_each": "flags",
    "sinkhorn": "Sinkhorn",
    "mean_entropy_gap": "mean entropy",
    "prototype_use": "prototypes in use",
    "read": "log",
    "read_health": "verdict",
    "state": "checkpoint",
}


class Counts:
    """Collectives of each purpose, of one process, while `running`."""

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}
        self.running = False
        self.n_logged = 0

    def add(self, purpose: str, n_bytes: int) -> None:
        if self.running:
            calls, before = self.sent.get(purpose, Sent(0, 0))
            self.sent[purpose] = Sent(calls + 1, before + n_bytes)


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


def count(config: TrainConfig, rank: int, port: int) -> tuple[dict[str, Sent], dict[str, Sent]]:
    """One of 2 processes trains. Returns what it sends, and what formulas.py says of as many steps."""
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
    formula = a_step(job.method, resolved.batch_size, resolved.grad_accum, 2, resolved.log_every, counts.n_logged)
    formula = {name: sent * n_steps for name, sent in formula.items()}
    formula["verdict"] = verdict(job.method)  # a short run reads it once, at its end
    return counts.sent, formula


def counted(configs: list[TrainConfig]) -> list[tuple[dict[str, Sent], dict[str, Sent]]]:
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
    print(f"torch {torch.__version__}, 2 processes, gloo; bytes that a process hands over in a step, and calls, counted in {COUNTED_STEPS} "
          "steps of 2 passes of 4 images, ViT 32 x 2, 16 px\n\n| method | of | counted | formula |\n|---|---|---|---|")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, both in zip(args.methods, counted(counted_configs(Path(folder), args.methods))):
            for what in sorted(both[0] | both[1], key=lambda key: -both[0].get(key, (0, 0))[1]):
                cells = [
                    f"{f[what].bytes / COUNTED_STEPS:,.0f} in {f[what].calls / COUNTED_STEPS:g}" if what in f else ""
                    for f in both
                ]
                print(f"| {name} | {what} | {' | '.join(cells)} |")
    print(
        "\nViT-B/16 at 224 px, defaults, 1,024 images a step in one pass, 8 processes, by formula; a line each 10 steps\n"
    )
    print(
        "| method | gradients, MB | gradients, MB sent a process | all else, MB sent | share | calls beside gradients |"
    )
    print("|---|---|---|---|---|---|")
    for name in args.methods:
        parts = a_step(methods.find(name)("vit_base_patch16_224"), 1024, 1, 8, 10, 8)
        sent = {what: sent_by_ring(part.bytes, 8, what == "queue") / 1e6 for what, part in parts.items()}
        own = sum(sent.values()) - sent["gradients"]
        print(f"| {name} | {parts['gradients'].bytes / 1e6:,.0f} | {sent['gradients']:,.0f} | {own:.2f} | "
              f"{100 * own / sent['gradients']:.2f} % | {sum(part.calls for part in parts.values()) - 1:.1f} |", flush=True)  # fmt: skip


def main() -> None:
    names = methods.names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    traffic(parser.parse_args())


if __name__ == "__main__":
    main()
