"""Which patches a method hides: pure functions of a grid and a random generator, free of models.

A mask is an int64 tensor of patch indices in [0, S), row-major over the grid of S patches, sorted.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# One image's masks: index tensors by name.
MaskSampler = Callable[[torch.Generator], dict[str, Tensor]]

# Bao et al. 2021 (BEiT), section 2.3: at least 16 of the 196 patches a block, aspect ratio 0.3 to 1/0.3.
MIN_BLOCK_SHARE = 16 / 196
LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)
ATTEMPTS = 10


def block_mask(grid: tuple[int, int], n_masked: int, generator: torch.Generator | None = None) -> Tensor:
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
