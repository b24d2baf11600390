"""Everything that knows about processes. With one process each function does nothing.

A run of several processes is started by torchrun, which sets the environment that `start` reads.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, in [0, processes)."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the other processes: gloo for what lies on the CPU, nccl for what lies on a GPU."""
    if processes() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over the processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / processes()
    return values


def union(found: dict[int, str]) -> dict[int, str]:
    """The entries that any process has, in every process; costs one flag where there is none."""
    if not any_process(bool(found)):
        return found
    everyone: list[dict[int, str]] = [found] * processes()
    if dist.is_initialized():
        dist.all_gather_object(everyone, found)
    return {index: reason for part in everyone for index, reason in part.items()}


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; on the CPU, so that no device waits."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)
