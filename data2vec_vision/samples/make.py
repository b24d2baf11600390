"""Make the archive of sample images from the original Fashion-MNIST files: the first 200 of each class.

    python -m data2vec_vision.samples.make FOLDER_WITH_TRAIN_IDX_GZ_FILES

The originals are at https://github.com/zalandoresearch/fashion-mnist and in Debian's package
dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist. The archive is the same at every run.
"""

import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data2vec_vision.samples import ARCHIVE

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
PER_CLASS = 200


def main(folder: str) -> None:
    images = read_idx(Path(folder) / "train-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    labels = read_idx(Path(folder) / "train-labels-idx1-ubyte.gz", header=8)
    target = Path(__file__).with_name(ARCHIVE)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for label, name in sorted(enumerate(CLASSES), key=lambda pair: pair[1]):
            for number, index in enumerate(np.flatnonzero(labels == label)[:PER_CLASS]):
                png = io.BytesIO()
                Image.fromarray(images[index]).save(png, "PNG", optimize=True)
                entry = zipfile.ZipInfo(f"{name}/{number:03}.png", (2017, 8, 25, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, png.getvalue())
    print(f"{target}: {target.stat().st_size:,} bytes")


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes behind the header of a gzipped IDX file."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


if __name__ == "__main__":
    main(sys.argv[1])
