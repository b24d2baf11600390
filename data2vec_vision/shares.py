"""A job whose batches several processes share: each makes every n-th, the main one gets all of them in order.

Batches are those of one process, so that on the CPU what is computed of them has the same bits.
"""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data2vec_vision import distributed
from data2vec_vision.errors import InputError, Stopped

T = TypeVar("T")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes work together; they leave together, so that torchrun ends none while it writes."""
    with distributed.joined():
        try:
            yield
        except Stopped:
            distributed.wait_for_all()
            raise
        distributed.wait_for_all()


def in_order(items: Iterable[T], count: int, tick: Callable[[], None]) -> Iterator[T]:
    """In the main process the items of all: its own, of which there are `count`, and in turn those of the others.

    In the others nothing comes, and the items go to the main process, which has room for two at a time. In all of them
    `tick` is called before each round of items.
    """
    n, rank = distributed.processes(), distributed.rank()
    total = int(distributed.total(torch.tensor(count)))
    mine = iter(items)
    for start in range(0, total, n):
        tick()
        item = next(mine) if start + rank < total else None
        if rank == 0:
            yield item  # the main process has the first of every round
            for other in range(1, min(n, total - start)):
                yield receive(other)
        elif item is not None:
            dist.send_object_list([item], dst=0, device=torch.device("cpu"))


def receive(sender: int) -> Any:
    box: list[Any] = [None]
    dist.recv_object_list(box, src=sender, device=torch.device("cpu"))
    return box[0]


def shared(signals: list[int], stop: Callable[[], None]) -> Callable[[], None]:
    """A function for `in_order`: a signal that any process has got becomes every process's, and `stop` is called."""

    def tick() -> None:
        if distributed.any_process(bool(signals)) and not signals:
            signals.append(signal.SIGTERM)
        stop()

    return tick


def refuse_unlike(value: Any, what: str) -> None:
    """Raises InputError, in all processes, where they do not have the same `value`."""
    if distributed.any_process(distributed.from_main(lambda: value) != value):
        raise InputError(f"the processes do not see the same {what}; give paths that all machines share")
