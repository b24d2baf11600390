"""Which of many files are the same, and which images look alike, in time and memory that a million of them allow.

Letters: N images. A look is a fingerprint of 128 bits: of an image scaled to 9 x 8 and to 8 x 9 grey cells, whether
each cell is brighter than the one before it (dHash, along rows and along columns). Two images look alike when their
looks differ in at most MOST_BITS bits, and in at most one for every RARITY that are set in either: where most of the
image is a plain background, there is little to tell two outlines apart by.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

# Of 250 photos, saved again at half the size as JPEG of quality 50, 98 % are found so, and no two different photos are
# closer than 28 bits. What it finds in CIFAR-10 shows the same thing; in Fashion-MNIST, garments of one cut too.
MOST_BITS, RARITY = 7, 8
BANDS = 8  # of 16 bits: looks that differ in at most 7 bits have one of 8 bands in common

# The order of the bits: each band has some from all over the image, so that a plain margin, which many images of a
# folder may share, does not make whole bands equal.
_SCATTERED = np.arange(128) * 37 % 128
_ONES = np.array([bin(number).count("1") for number in range(1 << 16)], np.uint8)


def look(image: Image.Image) -> np.ndarray:
    """The look of an RGB image, as 8 uint16."""
    grey = image.convert("L")
    # reducing_gap: large images are first made smaller by whole factors, which is quicker and hardly less exact.
    wide = np.asarray(grey.resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=4))
    high = np.asarray(grey.resize((8, 9), Image.Resampling.BILINEAR, reducing_gap=4))
    bits = np.concatenate([wide[:, 1:] > wide[:, :-1], high[1:] > high[:-1]], axis=None)
    return np.packbits(bits[_SCATTERED]).view(np.uint16)


def differing_bits(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In how many bits each of `others`, uint16 [N, BANDS], differs from `one`, uint16 [BANDS]."""
    return _ONES[one ^ others].sum(axis=1, dtype=np.int64)


def look_alike(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `others`, uint16 [N, BANDS], look like `one`, uint16 [BANDS]; those without RARITY set bits never."""
    bits, either = differing_bits(one, others), _ONES[one | others].sum(axis=1, dtype=np.int64)
    return (bits <= MOST_BITS) & (np.maximum(bits, 1) * RARITY <= either)


def equal_groups(contents: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more equal rows of `contents`, uint64 [N, 2]: ascending indices, by the first of each group."""
    order = np.lexsort((np.arange(len(contents)), contents[:, 1], contents[:, 0]))
    ordered = contents[order]
    starts = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)))
    sizes = np.diff(np.append(starts, len(order)))
    groups = [order[start : start + size] for start, size in zip(starts[sizes > 1], sizes[sizes > 1])]
    return sorted(groups, key=lambda group: int(group[0]))


def alike_groups(
    looks: np.ndarray, watched: Callable[[range], Iterable[int]] = iter
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Groups of images that look alike: the first of a group, the others, and in how many bits each differs from it.

    looks: uint16 [N, BANDS]. watched: what shows the progress over the images. Going through the images in order,
    one that looks like no first of a group so far is a first itself. So no two firsts look alike, and each other
    image looks like the first of its group, which a chain of ever so slightly different images could not promise.
    Found exactly: MOST_BITS differing bits leave one of BANDS > MOST_BITS bands equal, so only images with an
    equal band are compared; and those with so few set bits that they look like none, blank ones first of all, not.
    """
    able = np.flatnonzero(_ONES[looks].sum(axis=1, dtype=np.int64) >= RARITY - 1)
    looks = looks[able]
    buckets = [Buckets(looks[:, band]) for band in range(BANDS)]
    taken = np.zeros(len(looks), bool)
    for first in watched(range(len(looks))):
        if taken[first]:
            continue
        near = np.concatenate([bucket.behind(first) for bucket in buckets])
        near = near[~taken[near]]
        others = np.unique(near[look_alike(looks[first], looks[near])])
        if len(others):
            taken[others] = True
            yield int(able[first]), able[others], differing_bits(looks[first], looks[others])


class Buckets:
    """The images by the value of one band of their looks, in ascending order for each value."""

    def __init__(self, keys: np.ndarray):
        self.order = np.argsort(keys, kind="stable").astype(np.int32)
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(keys), dtype=np.int32)
        self.end = np.cumsum(np.bincount(keys, minlength=1 << 16), dtype=np.int32)[keys]

    def behind(self, index: int) -> np.ndarray:
        """The images after image `index` that have its value."""
        return self.order[self.place[index] + 1 : self.end[index]]
