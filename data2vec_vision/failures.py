"""What a machine that is not enough for a job says, as one line that says what to change."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data2vec_vision.errors import InputError, RunFailed
from data2vec_vision.loading import LoadingFailed

# What torch says, beside errors with a type of their own: a CPU's allocator, a GPU's libraries, Apple's.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_ALLOC_FAILED", "MemoryError")
IN_A_WORKER = "in DataLoader worker process"


def out_of_memory(error: Exception) -> bool:
    """Whether memory was not enough, on the device, in the machine, or in a process that reads images."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def of_reading(error: Exception, workers: int) -> str:
    """What to change so that so many processes can read images; "" for an error that is not about that."""
    text, fewer = str(error), f"--workers {workers // 2}"
    if isinstance(error, LoadingFailed):
        return text
    if not workers:
        return ""
    if text.startswith("DataLoader worker"):  # of a loader that does not start again
        return f"a process that reads images was killed, for want of memory perhaps; try {fewer}"
    if "shared memory" in text:
        return (
            f"/dev/shm, through which {workers} processes send images, is full; try {fewer}, or make it larger "
            "(docker run --shm-size=8g)"
        )
    if out_of_memory(error) and (IN_A_WORKER in text or isinstance(error, OSError)):
        return f"the memory of this machine is not enough for {workers} processes that read images; try {fewer}"
    if (isinstance(error, OSError) and error.errno == errno.EMFILE) or "Too many open files" in text:
        return f"too many files are open for {workers} processes that read images; try {fewer}, or ulimit -n 65536"
    return ""


@contextmanager
def said_with(batch_size: int, workers: int, device: torch.device) -> Iterator[None]:
    """For jobs that take images in batches: inside, a want of memory or of processes is RunFailed, with what to try."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        if reason := of_reading(error, workers):
            raise RunFailed(reason) from error
        if not out_of_memory(error):
            raise
        smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else "--device cpu"
        raise RunFailed(f"the memory of {device} is not enough for batches of {batch_size}; try {smaller}") from error
