"""Images as sequences of patches, and back.

Shapes: B batch, C channels, H x W pixels, P patch side, S = (H / P) * (W / P) patches in row-major
order, K indices, D width. A patch is flattened as (channel, row, column), the order of a patch
embedding's convolution kernel.
"""

import torch
from torch import Tensor

from data2vec_vision.errors import InputError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, S, C*P*P]. Raises ValueError when P does not divide H and W."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {P} x {P}")
    patches = images.reshape(B, C, H // P, P, W // P, P)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify(sequence: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """[B, S, C*P*P] -> [B, C, H, W] for a grid of (H / P, W / P) patches; the inverse of patchify."""
    B, S, length = sequence.shape
    P, (rows, columns) = patch_size, grid
    if rows * columns != S or length % (P * P):
        raise ValueError(
            f"{S} patches of {length} values do not fill a grid of {rows} x {columns} patches of {P} x {P}"
        )
    patches = sequence.reshape(B, rows, columns, length // (P * P), P, P)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, rows * P, columns * P)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels of each patch, [..., C*P*P] -> [..., 1] each (MAE's official code)."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index`: [B, S, D] and [B, K] with indices in [0, S) -> [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_position(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sin-cos positions of a grid of (rows, columns): [S, dim], in the order of MAE and I-JEPA.

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] of
    dim / 4 frequencies 10000^(-4 i / dim). Raises InputError when 4 does not divide dim.
    """
    if dim % 4:
        raise InputError(f"sin-cos positions need a width that is a multiple of 4, got {dim}; use {-(-dim // 4) * 4}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.flatten().outer(frequencies) for axis in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
