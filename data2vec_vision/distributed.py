"""Everything that knows about processes. With one process each function does nothing.

A run of several processes is started by torchrun, which sets the environment that `start` reads, and which ends all
when one ends.
"""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from data2vec_vision.errors import InputError, RunFailed

WAIT = timedelta(minutes=30)  # for a slow process, before it is taken to be lost
STUCK = 25.0  # seconds after torchrun's SIGTERM in which a process has to note it; after 30 it is killed
PATIENCE = 3.0  # seconds that a process leaves to those who know more of a failure
# What gloo says when the other end is gone; nccl's errors have a type of their own.
CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
SIGNS_OF_LOSS = ("gloo/", "NCCL", *CUT_OFF)
T = TypeVar("T")
_store: dist.Store | None = None  # where processes leave notes for each other; torchrun keeps it
_speaks: bool | None = None


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


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process computes together with those that torchrun started with it.

    The first that fails says why; the others fail for want of it, and are told by `speaks` to be silent.
    """
    mine = start()
    try:
        yield
    except BaseException as error:
        speaks()  # before the others notice that this process is gone
        mine = mine and not (is_loss(error) or is_loss(error.__cause__))  # nccl would wait for the lost one
        raise
    finally:
        if mine:
            stop()


def start() -> bool:
    """Join the other processes: gloo for what lies on the CPU, nccl for what lies on a GPU. Returns whether it did."""
    global _store, _speaks
    if processes() == 1 or dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    _store, _speaks = new_store(), None
    dist.init_process_group(backend, store=_store, rank=rank(), world_size=processes(), timeout=WAIT)
    return True


def new_store() -> dist.Store:
    """Where these processes, and none before them, leave notes for each other; all have to ask for it."""
    return of_this_start(*next(rendezvous("env://", timeout=WAIT)))


def of_this_start(store: dist.Store, number: int, count: int) -> dist.Store:
    """A part of `store` that nobody has used, the same for all `count` processes; each gives its `number`.

    torchrun keeps one store while it starts processes again, and in it lie the addresses of those that are gone: who
    reads one waits for the dead. It counts its attempts on each machine by itself, so that the count is no name for
    all. The main process makes a name up, and tells it to whoever asks until all have it: a question may be old too.
    """
    if number > 0:
        question = uuid.uuid4().hex
        store.set(f"question {number}", question)
        name = store.get(f"answer {question}").decode()
        store.set(f"{name} known to {number}", "")
        return dist.PrefixStore(name, store)
    name, unaware, until = uuid.uuid4().hex, set(range(1, count)), time.monotonic() + WAIT.total_seconds()
    while unaware and time.monotonic() < until:
        for other in unaware:
            if store.check([f"question {other}"]):
                store.set(f"answer {store.get(f'question {other}').decode()}", name)
        unaware = {other for other in unaware if not store.check([f"{name} known to {other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait, once a start, until every process is here, however long that takes; torchrun ends who waits for one that is
    gone."""
    if _store is not None:
        _store.add("here", 1)
        while _store.add("here", 0) < processes():
            time.sleep(0.1)


def speaks() -> bool:
    """Whether this process is the one that tells the user of a failure: the first of all that asks."""
    global _speaks
    if _speaks is None and processes() > 1:
        try:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
            # Where torchrun does not host the store the main process does; before they have joined it tells.
            store = _store or (None if attempt is None else _store_of_torchrun())
            _speaks = is_main() if store is None else store.add(f"failures told {attempt}", 1) == 1
        except RuntimeError:  # the machine with the store is gone
            _speaks = True
    return _speaks is not False


def _store_of_torchrun() -> dist.Store:
    return next(rendezvous("env://", timeout=timedelta(seconds=10)))[0]


def is_loss(error: BaseException | None) -> bool:
    """Whether an error says that another process does not answer any more."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS_OF_LOSS)


def is_cut_off(error: BaseException) -> bool:
    """Whether a loss says no more than that the other end is gone."""
    return any(sign in str(error) for sign in CUT_OFF)


@contextmanager
def patient(signals: Sequence[int], last_words: Callable[[], str]) -> Iterator[None]:
    """When another process is lost inside, wait until who knows more has spoken, or torchrun's SIGTERM is in `signals`.

    Where the loss does not show, because this process waits for a GPU, Python cannot note that SIGTERM. Then a thread
    says the `last_words` and ends the process, shortly before torchrun kills it.
    """
    with _heard_by_a_thread(signals, last_words):
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + PATIENCE
            while is_loss(error) and not signals and time.monotonic() < until:
                time.sleep(0.05)
            raise


@contextmanager
def _heard_by_a_thread(signals: Sequence[int], last_words: Callable[[], str]) -> Iterator[None]:
    """Inside, under torchrun, a SIGTERM that is not in `signals` after STUCK seconds ends this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                time.sleep(STUCK)
                if not signals:
                    if speaks():
                        os.write(2, f"Error: {last_words()}\n".encode())
                    os._exit(1)

    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()


def everyone(value: T) -> list[T]:
    """The `value` of each process, in the order of their numbers."""
    if not dist.is_initialized():
        return [value]
    values = [value] * processes()
    dist.all_gather_object(values, value)
    return values


def together(make: Callable[[], T]) -> T:
    """What `make` returns, called in each process. Where it raises InputError or RunFailed in one, all raise the same.

    Else the others would wait for that one, and nobody would know why.
    """
    if not dist.is_initialized():
        return make()
    made: list[T] = []
    error: InputError | RunFailed | None = None
    try:
        made.append(make())
    except (InputError, RunFailed) as raised:
        error = raised
    errors = everyone(error)
    for number, found in enumerate(errors):
        if found is not None:
            alone = number > 0 and any(str(other) != str(found) for other in errors)
            raise type(found)(f"{found} (found by process {number} only)" if alone else str(found)) from error
    return made[0]


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, where alone it is called, in each; all raise the error that it raises.

    Other machines need not have, or see already, what it reads. Processes that have not joined each call it.
    """
    result: list[Any] = [None, None]
    if is_main() or not dist.is_initialized():
        try:
            result[0] = make()
        except (InputError, RunFailed) as error:
            result[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    if result[1] is not None:
        raise result[1]
    return result[0]


def largest(value: float) -> float:
    """The largest of the values of all processes."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over the processes."""
    return total(values) / processes() if dist.is_initialized() else values


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


def union(found: dict[int, str]) -> dict[int, str]:
    """The entries that any process has, in every process."""
    return {index: reason for part in everyone(found) for index, reason in part.items()}


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; on the CPU, so that no device waits."""
    return any_process_each(flag)[0]


def any_process_each(*flags: bool) -> list[bool]:
    """`any_process` of several flags at once."""
    if not dist.is_initialized():
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]
