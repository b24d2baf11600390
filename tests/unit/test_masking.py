"""Masks: every sampler is naive code draw for draw, and gives always the exact number of patches."""

import math

import pytest
import torch

from data2vec_vision.errors import InputError
from data2vec_vision.masking import (
    block_mask,
    inverse_block_mask,
    multiblock,
    multiblock_official,
    no_masks,
    others,
    random_keep,
    share,
    stack_masks,
)

GRIDS = [(14, 14), (8, 8), (6, 6), (4, 4), (6, 10), (9, 4)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("grid", GRIDS)
def test_random_keep_is_the_first_of_a_permutation_in_order_and_others_the_rest(grid):
    S = grid[0] * grid[1]
    for seed in range(10):
        for n_keep in (1, round(0.25 * S), S - 1):
            keep = random_keep(S, n_keep, seeded(seed))
            assert keep.dtype == torch.int64 and len(keep) == n_keep
            assert keep.tolist() == sorted(torch.randperm(S, generator=seeded(seed)).tolist()[:n_keep])
            rest = others(keep, S)
            assert rest.dtype == torch.int64
            assert rest.tolist() == [patch for patch in range(S) if patch not in keep.tolist()]


def test_random_keep_favours_no_patch_and_no_pair():
    """Of 16 patches 4 are kept: each in 1/4 of the draws, each pair in 1/20."""
    draws, together = 4000, torch.zeros(16, 16)
    generator = seeded(0)
    for _ in range(draws):
        kept = torch.zeros(16)
        kept[random_keep(16, 4, generator)] = 1
        together += kept.outer(kept)
    single, pairs = together.diag() / draws, together[~torch.eye(16, dtype=torch.bool)] / draws
    assert (single - 1 / 4).abs().max() < 0.03 and (pairs - 1 / 20).abs().max() < 0.02


def test_others_takes_indices_in_any_order_and_shape():
    assert others(torch.tensor([[3, 0], [3, 5]]), 6).tolist() == [1, 2, 4]
    assert others(torch.arange(6), 6).tolist() == []
    assert others(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 1, 2]


def test_share_is_the_nearest_whole_number_that_leaves_some_on_both_sides():
    for S in range(2, 200):
        for percent in range(1, 100):
            n = share(percent / 100, S)
            assert isinstance(n, int) and 1 <= n <= S - 1
            assert abs(100 * n - percent * S) <= 50 or n in (1, S - 1)
    # Where int() of the float falls one short: 100 * (1 - 0.8) is 19.999..., 5 * (1 - 0.8) is 0.999...
    assert (share(1 - 0.8, 100), share(1 - 0.8, 5)) == (20, 1)
    assert (196 - share(0.75, 196), 196 - share(0.8, 196)) == (49, 39)


def test_masks_of_images_are_stacked_and_what_differs_in_length_is_cut_from_the_end():
    one = {"keep": torch.tensor([1, 4, 6, 9]), "query": torch.tensor([[2, 3], [7, 8]])}
    two = {"keep": torch.tensor([0, 5, 6]), "query": torch.tensor([[3, 4], [5, 6]])}
    masks = stack_masks([one, two])
    assert masks["keep"].tolist() == [[1, 4, 6], [0, 5, 6]]
    assert masks["query"].tolist() == [[[2, 3], [7, 8]], [[3, 4], [5, 6]]]
    assert stack_masks([no_masks(seeded(0), seeded(0))] * 3) == {}


def naive_inverse_block_mask(rows, columns, n_keep, n_centres, side, generator):
    """Squares around centres as a set of cells, cut at the border; then cells dropped or added up to the number."""
    S, kept = rows * columns, set()
    for centre in torch.randint(S, (n_centres,), generator=generator).tolist():
        first_row, first_column = centre // columns - side // 2, centre % columns - side // 2
        for row in range(first_row, first_row + side):
            for column in range(first_column, first_column + side):
                if 0 <= row < rows and 0 <= column < columns:
                    kept.add(row * columns + column)
    inside, outside = sorted(kept), [patch for patch in range(S) if patch not in kept]
    if len(inside) > n_keep:
        order = torch.randperm(len(inside), generator=generator).tolist()
        kept -= {inside[i] for i in order[: len(inside) - n_keep]}
    elif len(inside) < n_keep:
        order = torch.randperm(len(outside), generator=generator).tolist()
        kept |= {outside[i] for i in order[: n_keep - len(inside)]}
    return sorted(kept)


@pytest.mark.parametrize(
    ("grid", "mask_ratio", "adjust", "n_keep", "n_centres", "side"),
    [
        ((14, 14), 0.8, 0.07, 39, 5, 3),  # the official numbers for ViT-B, ViT-L and ViT-H
        ((14, 14), 0.75, 0.1, 49, 7, 3),
        ((16, 16), 0.75, 0.1, 64, 9, 3),
        ((8, 8), 0.8, 0.07, 13, 4, 2),  # int() of the official formula gives one square here
        ((6, 6), 0.8, 0.07, 7, 2, 2),
        ((6, 10), 0.8, 0.07, 12, 4, 2),
        ((9, 4), 0.5, 0.0, 18, 2, 3),
        ((4, 4), 0.8, 0.07, 3, 4, 1),
    ],
)
def test_inverse_blocks_equal_naive_code_draw_for_draw(grid, mask_ratio, adjust, n_keep, n_centres, side):
    S = grid[0] * grid[1]
    assert S - share(mask_ratio, S) == n_keep
    for seed in range(30):
        ours = inverse_block_mask(grid, n_keep, seeded(seed), adjust)
        assert ours.tolist() == naive_inverse_block_mask(*grid, n_keep, n_centres, side, seeded(seed))


@pytest.mark.parametrize("grid", [*GRIDS, (2, 2), (1, 9), (7, 3)])
def test_inverse_blocks_keep_exactly_the_number_asked_for(grid):
    S = grid[0] * grid[1]
    for n_keep in {1, round(0.2 * S), round(0.5 * S), S - 1} - {0}:
        for seed in range(20):
            keep = inverse_block_mask(grid, n_keep, seeded(seed))
            assert keep.dtype == torch.int64 and keep.tolist() == sorted(set(keep.tolist()))
            assert len(keep) == n_keep and keep.min() >= 0 and keep.max() < S


def share_with_a_kept_neighbour(grid, keep):
    """How many of the kept patches have a kept one above, below, to the left or to the right."""
    cells = {divmod(patch, grid[1]) for patch in keep.tolist()}
    near = [any((r + i, c + j) in cells for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))) for r, c in cells]
    return sum(near) / len(near)


@pytest.mark.parametrize(("grid", "n_keep"), [((14, 14), 39), ((8, 8), 13), ((6, 6), 7)])
def test_inverse_blocks_are_blocks_and_not_scattered_cells(grid, n_keep):
    """Of patches kept one by one only half have a kept neighbour; of a single big block, all."""
    shares = [share_with_a_kept_neighbour(grid, inverse_block_mask(grid, n_keep, seeded(seed))) for seed in range(100)]
    one_by_one = [
        share_with_a_kept_neighbour(grid, random_keep(grid[0] * grid[1], n_keep, seeded(s))) for s in range(100)
    ]
    assert sum(shares) / 100 > 0.85 and sum(one_by_one) / 100 < 0.6


@pytest.mark.parametrize(("grid", "n_keep"), [((14, 14), 39), ((8, 8), 13), ((6, 10), 12)])
def test_inverse_blocks_are_in_several_places_and_leave_out_no_patch(grid, n_keep):
    """They are no single square: what is kept spans most of the grid; and each patch is kept now and then."""
    rows, columns = grid
    counts, spans = torch.zeros(rows * columns), []
    for seed in range(400):
        keep = inverse_block_mask(grid, n_keep, seeded(seed))
        counts[keep] += 1
        spans.append(int((keep // columns).max() - (keep // columns).min()) + 1)
    assert counts.min() > 10 and counts.max() < 200
    assert sum(spans) / 400 > 0.6 * rows


def naive_multiblock(rows, columns, n_targets, n_context, generator, shared):
    """Sizes from three numbers, then blocks as sets of cells at any place until the context has room."""
    u = torch.rand(3, generator=shared, dtype=torch.float64).tolist()
    area, ratio, share_of_context = (0.15 + 0.05 * u[0]) * rows * columns, 0.75 + 0.75 * u[1], 0.85 + 0.15 * u[2]
    target_size = (
        min(max(round(math.sqrt(area * ratio)), 1), rows),
        min(max(round(math.sqrt(area / ratio)), 1), columns),
    )
    context_size = round(rows * math.sqrt(share_of_context)), round(columns * math.sqrt(share_of_context))

    def place(height, width):
        top = torch.randint(0, rows - height + 1, (), generator=generator).item()
        left = torch.randint(0, columns - width + 1, (), generator=generator).item()
        return [r * columns + c for r in range(top, top + height) for c in range(left, left + width)]

    while True:
        targets = [place(*target_size) for _ in range(n_targets)]
        allowed = sorted(set(place(*context_size)).difference(*targets))
        if len(allowed) >= n_context:
            order = torch.randperm(len(allowed), generator=generator).tolist()
            return sorted(allowed[i] for i in order[:n_context]), targets


@pytest.mark.parametrize(
    ("grid", "n_targets", "ratio"), [*((grid, 4, 0.25) for grid in GRIDS), ((14, 14), 1, 0.5), ((8, 8), 5, 0.35)]
)
def test_multiblock_equals_naive_code_draw_for_draw(grid, n_targets, ratio):
    n_context = share(ratio, grid[0] * grid[1])
    for seed in range(30):
        context, targets = multiblock(grid, n_targets, n_context, seeded(seed), seeded(1000 + seed))
        expected = naive_multiblock(*grid, n_targets, n_context, seeded(seed), seeded(1000 + seed))
        assert context.dtype == targets.dtype == torch.int64
        assert (context.tolist(), targets.tolist()) == expected


@pytest.mark.parametrize("grid", GRIDS)
def test_multiblock_gives_exact_counts_and_a_context_outside_of_all_targets(grid):
    S = grid[0] * grid[1]
    n_context = share(0.25, S)
    for seed in range(30):
        context, targets = multiblock(grid, 4, n_context, seeded(seed), seeded(seed))
        assert len(context) == n_context and context.tolist() == sorted(set(context.tolist()))
        assert targets.shape[0] == 4 and all(block.tolist() == sorted(set(block.tolist())) for block in targets)
        assert min(context.min(), targets.min()) >= 0 and max(context.max(), targets.max()) < S
        assert not set(context.tolist()) & set(targets.flatten().tolist())


def size_of(block, columns):
    """(height, width) of a target block, which must be a full rectangle."""
    rows = {patch // columns for patch in block.tolist()}
    across = {patch % columns for patch in block.tolist()}
    assert set(block.tolist()) == {r * columns + c for r in range(min(rows), max(rows) + 1) for c in across}
    assert max(across) - min(across) + 1 == len(across)
    return len(rows), len(across)


def test_sizes_of_blocks_are_a_function_of_the_shared_generator_alone():
    """So the masks of all images of a step can be stacked; the places differ."""
    sizes = set()
    for step in range(30):
        samples = [multiblock((14, 14), 4, 49, seeded(100 * step + i), seeded(step)) for i in range(4)]
        [size] = {size_of(block, 14) for _, targets in samples for block in targets}
        sizes.add(size)
        assert len({tuple(targets.flatten().tolist()) for _, targets in samples}) == 4
    assert len(sizes) > 4


def test_the_context_block_has_the_size_of_the_step_too():
    """Of 30 images some show its whole height, which is that of the step's third number and never more."""
    for step in range(5):
        heights = set()
        for image in range(30):
            context, _ = multiblock((30, 30), 1, 100, seeded(image), seeded(step), context_scale=(0.2, 0.3))
            heights.add(int((context // 30).max() - (context // 30).min()) + 1)
        side = math.sqrt(0.2 + 0.1 * torch.rand(3, generator=seeded(step), dtype=torch.float64)[2].item())
        assert max(heights) == round(30 * side)


def test_scale_and_aspect_of_targets_are_drawn_apart():
    """On a grid so fine that rounding does not matter; one number for both gives a correlation of 1."""
    sizes = []
    for seed in range(400):
        _, targets = multiblock((60, 60), 1, 1, seeded(seed), seeded(seed))
        sizes.append(size_of(targets[0], 60))
    height, width = torch.tensor(sizes, dtype=torch.float64).T
    area, aspect = height * width / 3600, height / width
    assert abs(torch.corrcoef(torch.stack([area, aspect]))[0, 1]) < 0.15
    assert area.min() > 0.14 and area.max() < 0.21 and abs(area.mean() - 0.175) < 0.003
    assert aspect.min() > 0.7 and aspect.max() < 1.6 and abs(aspect.mean() - 1.125) < 0.05


def test_blocks_lie_anywhere_the_last_row_and_column_included():
    """Corners and edges of the grid are targets and context as often as the opposite ones."""
    counts = {"context": torch.zeros(64), "targets": torch.zeros(64)}
    for seed in range(800):
        context, targets = multiblock((8, 8), 4, 16, seeded(seed), seeded(seed))
        counts["context"][context] += 1
        counts["targets"][targets.flatten().unique()] += 1
    for count in counts.values():
        count = count.view(8, 8)
        assert count.min() > 20
        for first, last in ((count[0], count[-1]), (count[:, 0], count[:, -1])):
            assert 0.85 < first.sum() / last.sum() < 1.18


def test_target_blocks_may_overlap_each_other():
    overlaps = 0
    for seed in range(50):
        _, targets = multiblock((14, 14), 4, 49, seeded(seed), seeded(seed))
        overlaps += targets.flatten().unique().numel() < targets.numel()
    assert overlaps > 10


def test_every_patch_of_the_context_comes_from_one_block():
    """With context blocks of 20 to 30 % of the grid, the context spans no more than such a block's sides."""
    for seed in range(100):
        context, _ = multiblock((14, 14), 1, 10, seeded(seed), seeded(seed), context_scale=(0.2, 0.3))
        for places in (context // 14, context % 14):
            assert places.max() - places.min() < round(14 * math.sqrt(0.3))


def test_targets_that_leave_no_context_are_refused():
    with pytest.raises(
        InputError, match="4 target blocks of .* leave no room for a context of 15 of the 4 x 4 patches"
    ):
        multiblock((4, 4), 4, 15, seeded(0), seeded(0))


def naive_official(rows, columns, n_targets, min_keep, generator, shared):
    """The published collator: one number a size, an upper bound never reached, targets given up after 20 tries each."""

    def size(smallest, largest, flat, tall):
        u = torch.rand(1, generator=shared).item()
        n, ratio = int(rows * columns * (smallest + u * (largest - smallest))), flat + u * (tall - flat)
        height, width = round(math.sqrt(n * ratio)), round(math.sqrt(n / ratio))
        while height >= rows:
            height -= 1
        while width >= columns:
            width -= 1
        return height, width

    def place(height, width):
        top = torch.randint(0, rows - height, (1,), generator=generator).item()
        left = torch.randint(0, columns - width, (1,), generator=generator).item()
        return [r * columns + c for r in range(top, top + height) for c in range(left, left + width)]

    target_size, context_size = size(0.15, 0.2, 0.75, 1.5), size(0.85, 1.0, 1.0, 1.0)
    targets, given_up, left = [place(*target_size) for _ in range(n_targets)], 0, 20
    while True:
        context = sorted(set(place(*context_size)).difference(*targets[: max(n_targets - given_up, 0)]))
        if len(context) > min_keep:
            return context, targets, given_up
        left -= 1
        if left == 0:
            given_up, left = given_up + 1, 20


@pytest.mark.parametrize(
    ("grid", "n_targets", "min_keep"),
    [
        ((14, 14), 4, 10),
        ((14, 14), 30, 10),  # so many that some must be given up
        ((28, 28), 4, 40),
        ((8, 8), 4, 3),
        ((6, 6), 4, 2),
        ((6, 10), 4, 3),
        ((9, 4), 4, 2),
    ],
)
def test_the_official_sampler_equals_the_published_one_draw_for_draw(grid, n_targets, min_keep):
    most_given_up = 0
    for seed in range(30):
        context, targets = multiblock_official(grid, n_targets, seeded(seed), seeded(1000 + seed))
        expected = naive_official(*grid, n_targets, min_keep, seeded(seed), seeded(1000 + seed))
        assert (context.tolist(), targets.tolist()) == expected[:2]
        most_given_up = max(most_given_up, expected[2])
    assert (most_given_up > 0) == (n_targets == 30)


def test_the_official_sampler_never_uses_the_last_row_or_column():
    for seed in range(200):
        for patches in multiblock_official((14, 14), 4, seeded(seed), seeded(seed)):
            assert (patches // 14).max() < 13 and (patches % 14).max() < 13


def test_the_official_sampler_has_one_number_for_scale_and_aspect():
    """Of all sizes only five occur on 14 x 14, in the shares that follow from that number."""
    counts = {}
    for seed in range(1000):
        _, targets = multiblock_official((14, 14), 1, seeded(seed), seeded(seed))
        counts[size_of(targets[0], 14)] = counts.get(size_of(targets[0], 14), 0) + 1
    shares = {(5, 6): 0.26, (6, 6): 0.22, (6, 5): 0.13, (7, 5): 0.36, (8, 5): 0.03}
    assert set(counts) == set(shares)
    assert all(abs(counts[size] / 1000 - share) < 0.05 for size, share in shares.items())


def test_official_contexts_of_a_batch_are_cut_to_the_shortest_and_lose_the_bottom():
    """In batches of 128 about 48 patches are left, 25 %, hardly any of them from the lower half."""
    lengths, rows = [], torch.zeros(14)
    for step in range(5):
        samples = [multiblock_official((14, 14), 4, seeded(128 * step + i), seeded(step)) for i in range(128)]
        keep = stack_masks([{"keep": context} for context, _ in samples])["keep"]
        assert keep.shape[1] == min(len(context) for context, _ in samples)
        assert all(row.tolist() == context.tolist()[: len(row)] for row, (context, _) in zip(keep, samples))
        lengths.append(keep.shape[1])
        rows += (keep // 14).flatten().bincount(minlength=14) / (5 * 128 * 14)
    assert 40 < sum(lengths) / 5 < 56
    assert rows[0] > 0.6 and rows[8] < 0.3 and rows[12] < 0.05 and rows[13] == 0


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 4), (1, 20)])
def test_grids_too_small_for_the_official_sampler_are_refused(grid):
    with pytest.raises(InputError, match=f"{grid[0]} x {grid[1]} patches are too few for the official sampler"):
        for seed in range(20):
            multiblock_official(grid, 4, seeded(seed), seeded(seed))
