"""Randomness as a function of position: the same keys give the same draws, whoever draws them.

A run keeps no random state. What is random about position p of the data stream is drawn under
(seed, p), what a step shares under (seed, t), dropout under (seed, t, micro-batch, rank); so a
resumed run, or one with another number of workers, draws exactly what the first would have drawn.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *keys: int | str) -> int:
    """A seed in [0, 2**63) that is a pure function of its arguments; any change gives another one."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive(seed, *keys)`."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def seed_device(device: torch.device, seed: int, *keys: int | str) -> None:
    """Seed the generator that dropout and drop path on `device` draw from."""
    value = derive(seed, *keys)
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)  # torch.manual_seed walks every backend: 100 x slower
    else:
        torch.get_device_module(device).manual_seed(value)


@contextmanager
def seeded(seed: int, *keys: int | str) -> Iterator[None]:
    """Inside, torch (CPU), `random` and numpy draw from `derive(seed, *keys)`; after, from where they were.

    All three, because image transforms of different libraries use different ones.
    """
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    value = derive(seed, *keys)
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
