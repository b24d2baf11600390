"""The images as one infinite stream: what step t sees is a function of the seed and t.

Position p of the stream is image permutation(seed, p // N)[p % N], N the number of images, and step t
takes positions [t*G, (t+1)*G), G images a step. What is random about position p is drawn under
(seed, p). So neither the workers nor the point where a run was resumed change what is trained on.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data2vec_vision.arrays import ArrayPicture
from data2vec_vision.errors import Unreadable
from data2vec_vision.images import AnyPicture
from data2vec_vision.loading import reading, sendable
from data2vec_vision.masking import MaskSampler, stack_masks
from data2vec_vision.seeding import derive, generator, seeded
from data2vec_vision.sources import ImageFolder, opened_picture
from data2vec_vision.transforms import Views, ViewTransform

LONGEST_TMPDIR = 70  # bytes, of the 108 of a socket's path
BAD_TRIES = 20  # images tried in place of an unreadable one


class Stream:
    """The infinite sequence of images: every N positions hold each of N images once, in a fresh order."""

    def __init__(self, n_images: int, seed: int):
        self.n_images = n_images
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def image(self, position: int) -> int:
        """The index, in [0, N), of the image at `position`."""
        return int(self._permutation(position // self.n_images)[position % self.n_images])

    def _draw_permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.n_images, generator=generator(self.seed, "order", epoch))


@dataclass
class MicroBatches:
    """The positions, with their images, of each forward pass of this process, from step `first_step` on."""

    stream: Stream
    batch_size: int  # images of a pass, over all processes
    grad_accum: int
    first_step: int
    last_step: int
    rank: int = 0
    processes: int = 1
    done: int = 0  # passes of these that are left out, at the start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.processes
        for micro in range(self.first_step * self.grad_accum + self.done, self.last_step * self.grad_accum):
            start = micro * self.batch_size + self.rank * share
            yield [(p, self.stream.image(p)) for p in range(start, start + share)]

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.grad_accum - self.done


@dataclass
class Sample:
    """One position of the stream."""

    views: list[Tensor]  # uint8 [3, h, w] each, or float32 [C, h, w] of other than three channels
    masks: dict[str, Tensor]
    bad: dict[int, str]  # the unreadable images met on the way, with the reason


@dataclass
class Batch:
    """A forward pass: V views, uint8 [B, 3, h, w] or float32 [B, C, h, w], indices [B, ...], unreadable images."""

    views: list[Tensor]
    masks: dict[str, Tensor]
    bad: dict[int, str]

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch([f(v) for v in self.views], {k: f(m) for k, m in self.masks.items()}, self.bad)


class StreamDataset(Dataset):
    """(position, image) -> Sample. An unreadable image is replaced by a function of its index.

    Images come from `opened`, which opens their files unless it is replaced.
    """

    def __init__(
        self,
        source: ImageFolder,
        views: ViewTransform,
        masks: MaskSampler,
        seed: int,
        images_a_step: int,
        channels: int = 3,
    ):
        self.source, self.views, self.masks = source, views, masks
        self.seed, self.images_a_step, self.channels = seed, images_a_step, channels
        self.opened: Callable[[int], AbstractContextManager[AnyPicture]]
        self.opened = partial(opened_picture, source, channels=channels)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        views, bad = self.views_of(index, position)
        step = position // self.images_a_step
        masks = self.masks(generator(self.seed, "masks", position), generator(self.seed, "masks of step", step))
        return Sample(views, masks, bad)

    def views_of(self, index: int, position: int) -> tuple[list[Tensor], dict[int, str]]:
        """The views at `position` of image `index` or its replacement, and why which images could not be read."""
        bad: dict[int, str] = {}
        for attempt in range(BAD_TRIES + 1):
            chosen = index if attempt == 0 else derive(index, attempt) % len(self.source)
            with seeded(self.seed, "views", position), one_thread(), reading(chosen):
                try:
                    with self.opened(chosen) as picture:
                        return self.seen(picture), bad
                except Unreadable as error:
                    bad[chosen] = str(error)
        # So many in a row mean that the folder is beyond the share of bad files that ends the run.
        with seeded(self.seed, "views", position), one_thread():
            return self.seen(ArrayPicture.blank(self.channels)), bad

    def seen(self, picture: AnyPicture) -> list[Tensor]:
        """Its views; those of somebody's own take the whole image, PIL's or with other channels a tensor."""
        views: Any = self.views
        return views(picture if isinstance(views, Views) else picture.image())


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside, so that a view does not depend on who makes it: workers have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        [sendable(torch.stack(views)) for views in zip(*(s.views for s in samples))],
        {name: sendable(mask) for name, mask in stack_masks([s.masks for s in samples]).items()},
        {index: reason for s in samples for index, reason in s.bad.items()},
    )


def start_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process ends its workers.

    It does so by SIGTERM when one hangs, so that only the first is passed over. And where the path of TMPDIR is long,
    the socket by which tensors travel cannot be made there, and they would be waited for without end.
    """
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR and os.path.isdir("/tmp"):
        tempfile.tempdir = "/tmp"
    if threading.current_thread() is threading.main_thread():
        # The socket there is that of the process which this one was forked from.
        signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # asks the main process to save
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def make_loader(
    dataset: StreamDataset, batches: MicroBatches, workers: int, pin: bool, context: str | BaseContext | None = None
) -> DataLoader:
    """Batches in order, whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=start_worker,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # the loader draws its workers' base seed; keep it off the global generator
    )
