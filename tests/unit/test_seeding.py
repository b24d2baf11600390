"""The same keys give the same draws, other keys others, and nobody else's random numbers are disturbed."""

import random

import numpy as np
import torch

from data2vec_vision.seeding import derive, generator, seed_device, seeded


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.rand()


def test_derive_depends_on_every_key_and_their_order():
    values = {derive(0), derive(1), derive(0, 1), derive(0, 1, 2), derive(0, 2, 1), derive(0, "a"), derive(0, "a", 1)}
    assert len(values) == 7 and all(0 <= v < 2**63 for v in values)
    assert derive(3, "views", np.int64(5)) == derive(3, "views", 5)


def test_derive_is_the_same_on_every_machine():
    assert derive(0, "views", 7) == 4918774770245324584


def test_generator_repeats():
    assert torch.equal(torch.rand(4, generator=generator(1, 2)), torch.rand(4, generator=generator(1, 2)))


def test_seeded_repeats_in_all_three_libraries_and_restores_them():
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draws()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with seeded(0, "x"):
        first = draws()
    assert draws() == expected
    with seeded(0, "x"):
        assert draws() == first
    with seeded(0, "y"):
        assert draws() != first


def test_seed_device_governs_dropout():
    x = torch.ones(50)
    masks = []
    for key in (1, 1, 2):
        seed_device(torch.device("cpu"), 0, "dropout", key)
        masks.append(torch.nn.functional.dropout(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
