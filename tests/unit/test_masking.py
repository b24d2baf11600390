"""Block masks: BEiT's algorithm, always the exact number of patches."""

import math

import pytest
import torch

from data2vec_vision.masking import block_mask


def naive_block_mask(rows, columns, n_masked, generator):
    """BEiT's algorithm 1 with a set of cells, then random single cells up to the number."""
    smallest = max(1, 16 / 196 * rows * columns)
    masked = set()
    while len(masked) < n_masked:
        for _ in range(10):
            a, r, y, x = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            room = n_masked - len(masked)
            area = smallest + a * (room - smallest)
            ratio = 0.3 * (1 / 0.3 / 0.3) ** r
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (1 <= h < rows and 1 <= w < columns):
                continue
            top, left = int(y * (rows - h + 1)), int(x * (columns - w + 1))
            block = {(i, j) for i in range(top, top + h) for j in range(left, left + w)}
            if 0 < len(block - masked) <= room:
                masked |= block
                break
        else:
            break
    flat = {i * columns + j for i, j in masked}
    free = [c for c in range(rows * columns) if c not in flat]
    order = torch.randperm(len(free), generator=generator).tolist() if len(flat) < n_masked else []
    return sorted(flat | {free[i] for i in order[: n_masked - len(flat)]})


@pytest.mark.parametrize(("grid", "n_masked"), [((14, 14), 120), ((8, 8), 38), ((6, 10), 30), ((4, 4), 10)])
def test_equals_naive_code_draw_for_draw(grid, n_masked):
    for seed in range(50):
        ours = block_mask(grid, n_masked, torch.Generator().manual_seed(seed))
        assert ours.tolist() == naive_block_mask(*grid, n_masked, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(14, 14), (7, 3), (2, 2), (1, 9), (1, 2)])
def test_always_exactly_the_number_asked_for(grid):
    S = grid[0] * grid[1]
    for n_masked in {1, round(0.4 * S), round(0.6 * S), S - 1} - {0}:
        for seed in range(20):
            mask = block_mask(grid, n_masked, torch.Generator().manual_seed(seed))
            assert mask.dtype == torch.int64 and len(mask) == n_masked
            assert len(set(mask.tolist())) == n_masked and mask.min() >= 0 and mask.max() < S


def test_masks_are_blocks_and_not_scattered_cells():
    """A hidden patch has far more hidden neighbours than under independent masking, where it is 61 %."""
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(100):
        mask = torch.zeros(196, dtype=torch.bool)
        mask[block_mask((14, 14), 120, generator)] = True
        mask = mask.view(14, 14)
        shares.append(mask[:, :-1][mask[:, 1:]].float().mean().item())
    assert sum(shares) / len(shares) > 0.8


def test_every_patch_is_hidden_sometimes_and_seen_sometimes():
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(64)
    for _ in range(500):
        counts[block_mask((8, 8), 38, generator)] += 1
    assert counts.min() > 50 and counts.max() < 490


@pytest.mark.parametrize("n_masked", [0, 16, -1, 17])
def test_all_or_nothing_is_refused(n_masked):
    with pytest.raises(ValueError, match="between 1 and 15"):
        block_mask((4, 4), n_masked)
