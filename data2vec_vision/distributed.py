"""Everything that knows about processes. With one process each function does nothing.

A run of several processes is started by torchrun, which sets the environment that `start` reads.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data2vec_vision.errors import InputError

T = TypeVar("T")


def processes() -> int:
    """How many processes the run has, whether torchrun or somebody's own code started them."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, in [0, processes)."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_processes() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def local_rank() -> int:
    """This process's number on its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def start(device: torch.device, store: dist.Store | None = None) -> None:
    """Join the other processes: gloo for what lies on the CPU, nccl for what lies on a GPU.

    They find each other by the `store`, in which nobody has joined before; by default by torchrun's.
    """
    if processes() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        known: dict[str, Any] = {} if store is None else {"store": store, "rank": rank(), "world_size": processes()}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **known)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over the processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / processes()
    return values


def total(values: Tensor) -> Tensor:
    """The sum of `values` over the processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


class _Total(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0].contiguous())


def mean_with_gradient(values: Tensor) -> Tensor:
    """The mean of `values` over the processes, through which a gradient flows back to each of them."""
    return _Total.apply(values) / processes() if dist.is_initialized() else values


def logsumexp(values: Tensor) -> Tensor:
    """log of the sum of exp(values) over the rows of all processes: [B, K] -> [1, K]."""
    if not dist.is_initialized():
        return values.logsumexp(dim=0, keepdim=True)
    largest = values.amax(dim=0, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest + total((values - largest).exp().sum(dim=0, keepdim=True)).log()


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their numbers: [B, ...] -> [B * processes, ...]."""
    if not dist.is_initialized():
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(processes())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the rows [B, C] of all processes, always with the statistics of the present batch.

    On any device, unlike nn.SyncBatchNorm, and differentiable across processes. It keeps no running
    statistics: heads are thrown away after training, and a teacher's head normalises its own batch.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        if not dist.is_initialized():
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = mean_with_gradient(values.mean(dim=0))
        variance = mean_with_gradient((values - mean).square().mean(dim=0))
        normal = (values - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias).to(x.dtype)


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, where alone it is called, in every process.

    Every process raises the InputError that it raises. Processes that have not joined each call it.
    """
    result: list[Any] = [None, None]
    if is_main() or not dist.is_initialized():
        try:
            result[0] = make()
        except InputError as error:
            result[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    if result[1] is not None:
        raise result[1]
    return result[0]


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
