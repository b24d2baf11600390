"""Decoded images kept in memory: for small images, whose files take longer to open than to make views of.

A run with a cache decodes every image whole, also where its images turn out not to fit: so it is the same run on any
machine.

Shapes: H x W pixels of an image.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from data2vec_vision.data import start_worker
from data2vec_vision.errors import Unreadable
from data2vec_vision.images import AnyPicture, Picture
from data2vec_vision.loading import lasting, reading, sendable
from data2vec_vision.sources import ImageFolder, opened_picture, sizes_of_some

BLOCK = 1 << 28  # bytes that are taken at once
CHUNK = 64  # images that a worker decodes before it answers
SHARED = "/dev/shm"  # where memory lies that processes share without being forked
LOOKED_AT = 200  # images by which the whole is estimated
NOTHING = torch.empty(3, 0, 0, dtype=torch.uint8)


@dataclass
class RamCache:
    """All images of a source as bytes, [H, W, 3] one behind the other in a few blocks, which worker processes share."""

    places: np.ndarray  # int64 [N, 4]: block, first byte in it, H, W; a block of -1: the image cannot be read
    blocks: list[Tensor] = field(default_factory=list)  # uint8
    bad: dict[int, str] = field(default_factory=dict)
    used: int = 0  # bytes of the last block
    nbytes: int = 0
    seconds: float = 0.0  # that it took to fill

    def picture(self, index: int) -> Picture:
        """Image `index`. Raises Unreadable for one whose file could not be read."""
        block, start, height, width = self.places[index].tolist()
        if block < 0:
            raise Unreadable(self.bad[index])
        pixels = self.blocks[block][start : start + 3 * height * width]
        return Picture.decoded(pixels.view(height, width, 3).permute(2, 0, 1))

    @contextmanager
    def opened(self, index: int) -> Iterator[Picture]:
        """`picture`, in the manner of sources.opened_picture."""
        yield self.picture(index)

    def add(self, index: int, pixels: Tensor, height: int, width: int) -> None:
        """Take in the bytes of image `index`."""
        if not self.blocks or self.used + len(pixels) > len(self.blocks[-1]):
            self.blocks.append(torch.empty(max(BLOCK, len(pixels)), dtype=torch.uint8))
            self.used = 0
        self.blocks[-1][self.used : self.used + len(pixels)] = pixels
        self.places[index] = len(self.blocks) - 1, self.used, height, width
        self.used += len(pixels)
        self.nbytes += len(pixels)


def shareable(limit: float, workers: int) -> float:
    """The bytes, `limit` at most, that workers can share: of those that are not forked what /dev/shm still takes."""
    if not workers or multiprocessing.get_start_method() == "fork" or not os.path.isdir(SHARED):
        return limit
    return min(limit, shutil.disk_usage(SHARED).free)


def fill(source: ImageFolder, workers: int, limit: float) -> RamCache | int:
    """The images of `source`, decoded by so many processes, or, where they would not fit into `limit` bytes, how many
    bytes they take, estimated."""
    if (expected := estimate(source)) > limit:
        return expected
    start, N = time.perf_counter(), len(source)
    cache = RamCache(np.full((N, 4), -1, np.int64))
    chunks = Decoded(source)

    def from_chunk(done: int) -> DataLoader:
        left = range(done, len(chunks))
        return DataLoader(
            chunks, batch_size=None, sampler=left, num_workers=workers, worker_init_fn=start_worker,
            generator=torch.Generator(),
        )  # fmt: skip

    hidden = not sys.stderr.isatty()
    with tqdm(total=N, unit="image", desc="caching", dynamic_ncols=True, leave=False, disable=hidden) as bar:
        for first, sizes, pixels, bad in lasting(from_chunk, source.name):
            cache.bad |= bad
            for index, (height, width), part in zip(range(first, N), sizes, parts(sizes, pixels)):
                if height:
                    cache.add(index, part, height, width)
            bar.update(len(sizes))
            if cache.nbytes > limit:
                return max(expected, round(cache.nbytes / (first + len(sizes)) * N))
    if cache.blocks:  # new processes that are not forked share blocks as they are
        cache.blocks[-1] = cache.blocks[-1][: cache.used].clone()
    cache.seconds = time.perf_counter() - start
    return cache


def estimate(source: ImageFolder) -> int:
    """Bytes of all images decoded, by the headers of some from all over the source."""
    sizes = sizes_of_some(source, LOOKED_AT)
    return round(sum(3 * width * height for width, height in sizes) / max(1, len(sizes)) * len(source))


class Decoded(Dataset):
    """Number n -> CHUNK images from n * CHUNK on: the first's number, [(H, W)], their bytes in one, and the bad ones.

    H and W are 0 for an image that cannot be read; the bad ones are reasons by number.
    """

    def __init__(self, source: ImageFolder):
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, number: int) -> tuple[int, list[tuple[int, int]], Tensor, dict[int, str]]:
        first, sizes, images = number * CHUNK, [], []
        bad: dict[int, str] = {}
        for index in range(first, min(first + CHUNK, len(self.source))):
            pixels = NOTHING
            with reasons(bad, index), reading(index), opened_picture(self.source, index) as picture:
                pixels = whole(picture)
            sizes.append((pixels.shape[1], pixels.shape[2]))
            images.append(pixels.permute(1, 2, 0).reshape(-1))
        return first, sizes, sendable(torch.cat(images)), bad


def whole(picture: AnyPicture) -> Tensor:
    """All of a picture: uint8 [3, H, W]."""
    return picture.pixels() if isinstance(picture, Picture) else pil_to_tensor(picture.image())


@contextmanager
def opened_whole(source: ImageFolder, index: int) -> Iterator[Picture]:
    """Image `index` as a cache would have it: no large JPEG is decoded smaller, so that both train the same."""
    with opened_picture(source, index) as picture:
        yield Picture.decoded(whole(picture))


@contextmanager
def reasons(bad: dict[int, str], index: int) -> Iterator[None]:
    """Notes why image `index` cannot be read."""
    try:
        yield
    except Unreadable as error:
        bad[index] = str(error)


def parts(sizes: list[tuple[int, int]], pixels: Tensor) -> Iterator[Tensor]:
    """The bytes of each image out of those of all."""
    start = 0
    for height, width in sizes:
        yield pixels[start : (start := start + 3 * height * width)]
