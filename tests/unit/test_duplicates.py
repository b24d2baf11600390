"""Duplicates against naive code that compares every image with every other."""

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_vision.duplicates import BANDS, MOST_BITS, RARITY, alike_groups, differing_bits, equal_groups, look


def photo(seed, width=160, height=120):
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def looks_of(bits):
    """bool [N, 128] -> uint16 [N, BANDS]."""
    return np.packbits(bits, axis=1).view(np.uint16)


def naive_alike(bits):
    """The same rule in words of Python: the first image without a partner so far takes all later ones like it."""
    taken, groups = set(), []
    for i, one in enumerate(bits):
        if i in taken:
            continue
        others = {}
        for j in range(i + 1, len(bits)):
            distance, either = int((one != bits[j]).sum()), int((one | bits[j]).sum())
            if j not in taken and distance <= MOST_BITS and either >= RARITY * max(1, distance):
                others[j] = distance
        if others:
            taken |= set(others)
            groups.append((i, others))
    return groups


@pytest.mark.parametrize("density", [0.5, 0.2, 0.04])
def test_alike_groups_equal_those_of_all_pairs(density):
    rng = np.random.default_rng(0)
    bits = rng.random((60, 128)) < density
    bits = np.concatenate([bits] * 6)
    for row in bits[60:]:  # up to 10 bits from its original, so on both sides of the limit
        row[rng.permutation(128)[: rng.integers(0, 11)]] ^= True
    bits = bits[rng.permutation(len(bits))]
    found = [(first, dict(zip(others.tolist(), away.tolist()))) for first, others, away in alike_groups(looks_of(bits))]
    expected = naive_alike(bits)
    assert found == expected and (density < 0.1 or len(expected) > 50)


def test_a_chain_of_small_changes_is_not_one_group():
    bits = np.ones((20, 128), bool)
    for n in range(20):
        bits[n, : 4 * n] = False  # each 4 bits from the next
    groups = list(alike_groups(looks_of(bits)))
    assert all((away <= MOST_BITS).all() for _, _, away in groups) and [first for first, _, _ in groups][:2] == [0, 2]


def test_images_without_structure_are_like_none_and_cost_nothing():
    bits = np.zeros((10, 128), bool)
    bits[:, :6] = True
    watched = []
    assert list(alike_groups(looks_of(bits), lambda steps: watched.extend(steps) or steps)) == [] == watched
    assert differing_bits(*looks_of(bits)[[0, 1]][:, None])[0] == 0


def test_a_plain_margin_does_not_make_bands_equal():
    """Each band must tell images apart, or all of a folder of cut-out objects were compared with all."""
    looks = []
    for seed in range(300):
        page = Image.new("RGB", (240, 240), "white")
        page.paste(photo(seed, 120, 120), (60, 60))
        looks.append(look(page))
    assert all(len(np.unique(band)) > 12 for band in np.stack(looks).T)


def test_progress_is_shown_over_all_images():
    seen = []

    def watched(steps):
        for step in steps:
            seen.append(step)
            yield step

    list(alike_groups(looks_of(np.ones((9, 128), bool)), watched))
    assert seen == list(range(9))


def test_equal_groups_are_those_of_a_dictionary():
    contents = np.random.default_rng(0).integers(0, 12, (200, 2), dtype=np.uint64)
    expected = {}
    for index, content in enumerate(map(tuple, contents.tolist())):
        expected.setdefault(content, []).append(index)
    assert [group.tolist() for group in equal_groups(contents)] == [g for g in expected.values() if len(g) > 1]
    assert equal_groups(np.arange(8, dtype=np.uint64).reshape(4, 2)) == [] == equal_groups(contents[:0])


def set_bits(image):
    return np.unpackbits(look(image).view(np.uint8)).astype(bool)


def test_a_look_is_the_signs_of_the_steps_between_cells():
    """Reference: torch's antialiased resize in floating point; a step of nearly nothing may round either way."""
    for seed in range(20):
        image = photo(seed)
        grey = torch.from_numpy(np.asarray(image.convert("L"), np.float32))[None, None]
        wide, high = (
            torch.nn.functional.interpolate(grey, size, mode="bilinear", antialias=True)[0, 0]
            for size in ((8, 9), (9, 8))
        )
        expected = torch.cat([(wide.diff(dim=1) > 0).flatten(), (high.diff(dim=0) > 0).flatten()]).numpy()
        scattered = expected[np.arange(128) * 37 % 128]
        assert (set_bits(image) != scattered).sum() <= 4


def test_every_bit_of_the_picture_is_in_some_band():
    rising = Image.fromarray(np.tile(np.arange(0, 240, 3, dtype=np.uint8), (60, 1))).convert("RGB")
    falling = rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert set_bits(rising).sum() == 64 and set_bits(falling).sum() == 0
    assert look(rising).shape == (BANDS,) and look(rising).dtype == np.uint16
    assert sorted(np.arange(128) * 37 % 128) == list(range(128))


def test_saving_again_smaller_or_brighter_keeps_the_look_and_other_images_have_others(tmp_path):
    for seed in range(10):
        image = photo(seed, 320, 240)
        image.resize((160, 120)).save(tmp_path / "half.jpg", quality=50)
        again = [Image.open(tmp_path / "half.jpg"), Image.eval(image, lambda v: min(255, int(1.1 * v)))]
        for other in again:
            assert differing_bits(look(image), look(other)[None])[0] <= MOST_BITS
        assert differing_bits(look(image), look(photo(seed + 100))[None])[0] > 3 * MOST_BITS


def test_one_pixel_and_one_line_have_a_look():
    for size in ((1, 1), (1, 50), (500, 1)):
        assert look(Image.new("RGB", size, "red")).shape == (BANDS,)
