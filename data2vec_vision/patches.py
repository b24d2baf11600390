"""Images as sequences of patches, and back.

Shapes: B batch, C channels, H x W pixels, P patch side, S = (H / P) * (W / P) patches in row-major
order, K indices, D width. A patch is flattened as (channel, row, column), the order of a patch
embedding's convolution kernel.
"""

from torch import Tensor


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


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index`: [B, S, D] and [B, K] with indices in [0, S) -> [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
