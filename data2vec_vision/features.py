"""Features of chosen images by several encoders in one pass over the files, kept on the disk and not in memory."""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from data2vec_vision.sources import ImageFolder


class Selected(ImageFolder):
    """Some images of a source, in the order of `indices`, as a source of their own."""

    def __init__(self, source: ImageFolder, indices: Sequence[int] | np.ndarray):
        self.source, self.indices, self.root = source, indices, source.root

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def open(self, index: int) -> BinaryIO:
        return self.source.open(int(self.indices[index]))
