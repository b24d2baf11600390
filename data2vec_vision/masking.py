"""Which patches a method hides: pure functions of a grid and a random generator, free of models.

A mask is an int64 tensor of patch indices in [0, S), row-major over the grid of S patches, sorted.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from data2vec_vision.errors import InputError

# One image's masks, index tensors by name, from its own generator and one that is the same for all images of a step.
MaskSampler = Callable[[Generator, Generator], dict[str, Tensor]]

# Bao et al. 2021 (BEiT), section 2.3: at least 16 of the 196 patches a block, aspect ratio 0.3 to 1/0.3.
MIN_BLOCK_SHARE = 16 / 196
LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)
ATTEMPTS = 10


def no_masks(generator: Generator, shared: Generator) -> dict[str, Tensor]:
    """For a method that hides nothing."""
    return {}


def stack_masks(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The masks of images, each a dict of tensors, as a batch's; what differs in length is cut to the shortest."""
    masks = {}
    for name in samples[0]:
        shortest = min(len(sample[name]) for sample in samples)
        masks[name] = torch.stack([sample[name][:shortest] for sample in samples])
    return masks


def share(ratio: float, S: int) -> int:
    """`ratio` of S patches as a whole number in [1, S - 1]; rounded, because 0.2 * 5 is not quite one."""
    return min(max(round(ratio * S), 1), S - 1)


def random_keep(S: int, n_keep: int, generator: Generator | None = None) -> Tensor:
    """`n_keep` of S patches, each set as likely as any other (MAE, section 3): int64 [n_keep]."""
    return torch.randperm(S, generator=generator)[:n_keep].sort().values


def others(index: Tensor, S: int) -> Tensor:
    """The patches of [0, S) that are not in `index`."""
    rest = torch.ones(S, dtype=torch.bool)
    rest[index] = False
    return rest.nonzero().squeeze(1)


def block_mask(grid: tuple[int, int], n_masked: int, generator: Generator | None = None) -> Tensor:
    """Block-wise mask of exactly `n_masked` patches of a grid of (rows, columns): int64 [n_masked].

    Rectangles of random area, aspect ratio and place are masked until `n_masked` patches are
    (BEiT, algorithm 1). The paper's algorithm never exceeds the number but may fall short of it
    when no further rectangle fits; here the rest is topped up with single random patches, so that
    every image of a batch has the same count. The smallest block is 8 % of the grid, as in BEiT.

    Raises ValueError unless 0 < n_masked < S.
    """
    rows, columns = grid
    S = rows * columns
    if not 0 < n_masked < S:
        raise ValueError(f"cannot mask {n_masked} of {S} patches: between 1 and {S - 1} can be masked")
    min_area = max(1.0, MIN_BLOCK_SHARE * S)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    count = 0
    while count < n_masked:
        for _ in range(ATTEMPTS):
            u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            area = min_area + u[0] * (n_masked - count - min_area)
            aspect = math.exp(LOG_ASPECT[0] + u[1] * (LOG_ASPECT[1] - LOG_ASPECT[0]))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = int(u[2] * (rows - height + 1)), int(u[3] * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if 0 < new <= n_masked - count:
                block.fill_(True)
                count += new
                break
        else:
            break  # no rectangle of the allowed sizes fits any more
    flat = mask.flatten()
    if count < n_masked:
        free = (~flat).nonzero().squeeze(1)
        order = torch.randperm(len(free), generator=generator)[: n_masked - count]
        flat[free[order]] = True
    return flat.nonzero().squeeze(1)


def inverse_block_mask(
    grid: tuple[int, int], n_keep: int, generator: Generator | None = None, adjust: float = 0.07, side: int = 3
) -> Tensor:
    """What is left visible by data2vec 2.0's inverse block masking: int64 [n_keep] patches, in blocks.

    Squares of `side` x `side` patches around random centres are kept, as many as fill `n_keep` and a
    share `adjust` of the grid more, since they overlap and are cut at the border; then single random
    patches are dropped or added until exactly `n_keep` are (Baevski et al. 2023). On a
    small grid a single square would be most of what is kept: there the squares get smaller, until
    there are two of them at least.
    """
    rows, columns = grid
    S = rows * columns
    wanted = n_keep + adjust * S
    while side > 1 and wanted < 2 * side**2:
        side -= 1
    centres = torch.randint(S, (int(wanted / side**2),), generator=generator).tolist()
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for centre in centres:
        top, left = centre // columns - side // 2, centre % columns - side // 2
        kept[max(top, 0) : top + side, max(left, 0) : left + side] = True
    flat = kept.flatten()
    inside, outside = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
    surplus = len(inside) - n_keep
    if surplus > 0:
        flat[inside[torch.randperm(len(inside), generator=generator)[:surplus]]] = False
    elif surplus < 0:
        flat[outside[torch.randperm(len(outside), generator=generator)[:-surplus]]] = True
    return flat.nonzero().squeeze(1)


# Assran et al. 2023 (I-JEPA) and its published configurations: shares of the grid, and height / width.
TARGET_SCALE, TARGET_ASPECT, CONTEXT_SCALE = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)
PLACES = 200  # tried for an image's blocks


def multiblock(
    grid: tuple[int, int],
    n_targets: int,
    n_context: int,
    generator: Generator,
    shared: Generator,
    context_scale: tuple[float, float] = CONTEXT_SCALE,
) -> tuple[Tensor, Tensor]:
    """I-JEPA's multi-block masks: context int64 [n_context], targets int64 [n_targets, block].

    The sizes of the target and context blocks come from `shared`, so that all images of a step have
    the same; the places from `generator`. Target blocks may overlap each other. The context is a random
    `n_context` of the patches that lie in the context block and in no target.

    Unlike the official sampler (`multiblock_official`) blocks can lie anywhere, the last row and column
    included; scale and aspect are drawn apart; and the context does not depend on which images share a batch.
    Where no places are found that leave enough of the context, all targets lie at one place, as a last
    resort. Raises InputError when even that leaves fewer than `n_context` patches.
    """
    rows, columns = grid
    u = torch.rand(3, generator=shared, dtype=torch.float64).tolist()
    target_size, context_size = block_sizes(grid, u, context_scale)

    def block(size: tuple[int, int]) -> Tensor:
        """Indices of a block at a random place, as [height, width]."""
        top, left = (
            int(torch.randint(n - length + 1, (), generator=generator)) for n, length in zip(grid, size, strict=True)
        )
        return torch.arange(rows * columns).view(grid)[top : top + size[0], left : left + size[1]]

    for attempt in range(PLACES + 1):
        places = n_targets if attempt < PLACES else 1
        targets = torch.stack([block(target_size).flatten() for _ in range(places)]).repeat(n_targets // places, 1)
        eligible = torch.zeros(rows * columns, dtype=torch.bool)
        eligible[block(context_size).flatten()] = True
        eligible[targets.flatten()] = False
        context = eligible.nonzero().squeeze(1)
        if len(context) >= n_context:
            chosen = torch.randperm(len(context), generator=generator)[:n_context].sort().values
            return context[chosen], targets
    raise InputError(
        f"{n_targets} target blocks of {target_size[0]} x {target_size[1]} leave no room for a context of {n_context} "
        f"of the {rows} x {columns} patches"
    )


def block_sizes(
    grid: tuple[int, int], u: Sequence[float], context_scale: tuple[float, float] = CONTEXT_SCALE
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a target and of the context block, from three numbers in [0, 1].

    They stand for the target's scale, its aspect, and the context's scale.
    """
    rows, columns = grid
    area = rows * columns * (TARGET_SCALE[0] + u[0] * (TARGET_SCALE[1] - TARGET_SCALE[0]))
    aspect = TARGET_ASPECT[0] + u[1] * (TARGET_ASPECT[1] - TARGET_ASPECT[0])
    side = math.sqrt(context_scale[0] + u[2] * (context_scale[1] - context_scale[0]))
    target = fitted(math.sqrt(area * aspect), rows), fitted(math.sqrt(area / aspect), columns)
    return target, (fitted(rows * side, rows), fitted(columns * side, columns))


def largest_context(grid: tuple[int, int]) -> int:
    """How many patches a context can have whatever the sizes drawn: the smallest block less the largest target."""
    aspects = [n / 5000 for n in range(5001)]
    height, width = block_sizes(grid, (0, 0, 0))[1]
    return height * width - max(h * w for h, w in (block_sizes(grid, (1, aspect, 0))[0] for aspect in aspects))


def fitted(length: float, longest: int) -> int:
    """A side of a block in whole patches, in [1, longest]."""
    return min(max(round(length), 1), longest)


def multiblock_official(
    grid: tuple[int, int], n_targets: int, generator: Generator, shared: Generator
) -> tuple[Tensor, Tensor]:
    """I-JEPA's masks as its published code draws them: context int64 [any], targets int64 [n_targets, block].

    One random number sets scale and aspect of the targets, no block touches the last row or column (nor
    has the size of the grid), and a context that keeps too few patches forgets the targets one by
    one. The contexts of a batch differ in length: they are cut to the shortest, from the end.
    """
    rows, columns = grid
    S = rows * columns
    least = max(1, round(10 / 196 * S))  # ten patches of 14 x 14
    u = torch.rand(1, generator=shared).item()
    area = int(S * (TARGET_SCALE[0] + u * (TARGET_SCALE[1] - TARGET_SCALE[0])))
    aspect = TARGET_ASPECT[0] + u * (TARGET_ASPECT[1] - TARGET_ASPECT[0])
    target_size = shrunk(math.sqrt(area * aspect), rows), shrunk(math.sqrt(area / aspect), columns)
    v = torch.rand(1, generator=shared).item()
    area = int(S * (CONTEXT_SCALE[0] + v * (CONTEXT_SCALE[1] - CONTEXT_SCALE[0])))
    context_size = shrunk(math.sqrt(area), rows), shrunk(math.sqrt(area), columns)

    def block(size: tuple[int, int]) -> Tensor:
        top = int(torch.randint(0, rows - size[0], (1,), generator=generator))
        left = int(torch.randint(0, columns - size[1], (1,), generator=generator))
        mask = torch.zeros(grid, dtype=torch.int64)
        mask[top : top + size[0], left : left + size[1]] = 1
        return mask.flatten()

    if target_size[0] * target_size[1] <= least:
        raise InputError(
            f"{rows} x {columns} patches are too few for the official sampler; use --set official_sampler=false"
        )
    targets = [block(target_size) for _ in range(n_targets)]
    for observed in range(n_targets, -1, -1):  # how many targets the context still keeps clear of
        for _ in range(20):
            mask = block(context_size)
            for target in targets[:observed]:
                mask = mask * (1 - target)
            if mask.sum() > least:
                return mask.nonzero().squeeze(1), torch.stack([t.nonzero().squeeze(1) for t in targets])
    raise InputError(
        f"{rows} x {columns} patches are too few for the official sampler; use --set official_sampler=false"
    )


def shrunk(length: float, longest: int) -> int:
    """A side of an official block: shorter than the grid's, by the original's strict comparison."""
    return min(round(length), longest - 1)
