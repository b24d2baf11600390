"""A large image made smaller band by band, so that memory is that of a band and not of the image.

Shapes: C channels, h x w pixels of what is read, H x W of what is made of it, n rows of a band.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

FINE = 3  # rows for each that is made of them, at least, stay where rows are averaged before they are resized


def resized(pixels: Tensor, size: tuple[int, int], cubic: bool) -> Tensor:
    """float32 [C, h, w] -> [C, H, W], by bicubic or else bilinear interpolation, with antialias."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(pixels[None], size, mode="bicubic" if cubic else "bilinear", antialias=True)[0]


def resized_in_bands(
    read: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    size: tuple[int, int],
    cubic: bool,
    rows: int,
    first: int | None = None,
) -> Tensor:
    """`resized` of an image of (h, w) = `shape`, of which `read(start, stop)` gives rows, [n, w, C]: float32 [C, H, W].

    `rows` rows are read at a time, and `first` before them. Where the result is much smaller, rows are averaged first,
    which is much faster than to resize them; FINE for each row of the result stay.
    """
    h, (H, W) = shape[0], size
    k = max(1, int(h / H / FINE))
    weights = row_weights(h / k, H, cubic)
    found: Tensor | None = None
    done, left = 0, None  # means made of the rows so far, and rows that are too few for another one
    for start, stop in bands(h, rows, rows if first is None else first):
        band = read(start, stop)
        band = band if left is None else torch.cat([left, band])
        n = len(band) if stop == h else len(band) - len(band) % k
        left = band[n:].clone() if n < len(band) else None
        if n == 0:
            continue
        narrow = averaged(band[:n], k).permute(2, 0, 1)
        narrow = resized(narrow, (narrow.shape[1], W), cubic)
        of_band = weights[:, done : done + narrow.shape[1]] @ narrow  # [C, H, W]
        done += narrow.shape[1]
        found = of_band if found is None else found.add_(of_band)
    assert found is not None
    return found


def bands(h: int, rows: int, first: int) -> Iterator[tuple[int, int]]:
    """Where to start and stop reading h rows: `first` of them, then so many `rows` each."""
    start, stop = 0, min(first, h)
    while start < h:
        yield start, stop
        start, stop = stop, min(h, stop + rows)


def averaged(band: Tensor, k: int) -> Tensor:
    """The means of k rows each, and of what rows are left over: [n, w, C] -> [ceil(n / k), w, C]."""
    if k == 1:
        return band
    n, w, C = band.shape
    whole = n - n % k
    means = band[:whole].view(whole // k, k, w, C).mean(dim=1)
    return means if whole == n else torch.cat([means, band[whole:].mean(dim=0, keepdim=True)])


def row_weights(h: float, H: int, cubic: bool) -> Tensor:
    """What each of h rows contributes to each of H, [H, ceil(h)]: torch's interpolation with antialias, as a matrix."""
    scale = h / H
    stretch, support = max(scale, 1.0), (2.0 if cubic else 1.0) * max(scale, 1.0)
    centre = scale * (torch.arange(H, dtype=torch.float64) + 0.5)
    row = torch.arange(math.ceil(h), dtype=torch.float64)
    first, last = (centre - support + 0.5).floor().clamp(min=0), (centre + support + 0.5).floor()
    x = ((row - centre[:, None] + 0.5) / stretch).abs()
    curve = cubic_curve(x) if cubic else (1 - x).clamp(min=0)
    weights = torch.where((row >= first[:, None]) & (row < last[:, None]), curve, 0.0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def cubic_curve(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution of distances x >= 0, with the a of Pillow and of torch's antialias."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
