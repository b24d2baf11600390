"""Crops of very large images: seconds and memory beside decoding the whole image.

    python benchmarks/large_images.py --side 20000

Makes a tiled TIFF (JPEG and deflate), a pyramid, a JPEG and two .npy files in a temporary folder, of the same picture,
and cuts crops of several shares of the area out of each, in a process of its own, whose peak memory is what it has
beyond what it has before the first image. Needs Linux, the extra `tiff`, and about 7 GB of the disk.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

from data2vec_vision.images import Picture

SHARES = (0.001, 0.05, 0.2, 1.0)  # of the area of the image
SIZE = (224, 224)
TILE = 256


def photo(side: int) -> np.ndarray:
    """Something between noise and a flat colour, [side, side, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 240, (side // 100, side // 100, 3), np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR))
    for top in range(0, side, 1000):
        band = pixels[top : top + 1000]
        band += rng.integers(0, 16, band.shape, np.uint8)
    return pixels


def make(folder: Path, side: int) -> None:
    pixels = photo(side)
    options = {"tile": (TILE, TILE), "photometric": "rgb"}
    tifffile.imwrite(folder / "jpeg tiles.tif", pixels, **options, compression="jpeg")
    tifffile.imwrite(folder / "deflate tiles.tif", pixels, **options, compression="deflate")
    with tifffile.TiffWriter(folder / "pyramid of jpeg tiles.tif") as writer:
        writer.write(pixels, **options, compression="jpeg", subifds=4)
        for k in (2, 4, 8, 16):
            writer.write(np.ascontiguousarray(pixels[::k, ::k]), **options, compression="jpeg", subfiletype=1)
    Image.fromarray(pixels).save(folder / "baseline.jpg", quality=90)
    np.save(folder / "bytes.npy", pixels)
    del pixels
    grey = np.lib.format.open_memmap(folder / "floats, 2 channels.npy", "w+", np.float32, (side, side, 2))
    for top in range(0, side, 1000):
        grey[top : top + 1000] = np.random.default_rng(top).random((min(1000, side - top), side, 2), np.float32)
    grey.flush()


def memory(of: str) -> float:
    """MB of this process, as Linux counts them: VmRSS now, VmHWM at most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(path: Path, share: float, repeats: int) -> None:
    """Prints the median of seconds, and the peak of memory in MB, of so many crops."""
    torch.set_num_threads(1)
    channels = 2 if "2 channels" in path.name else 3
    Picture(Image.new("RGB", (64, 64))).crops([(0, 0, 64, 64)], [SIZE])  # what is made on first use
    forget_peak()
    before, seconds = memory("VmRSS"), []
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        start = time.perf_counter()
        with open(path, "rb") as file:
            picture = Picture.of(file, channels)
            width, height = picture.size
            h, w = (int(side * share**0.5) for side in (height, width))
            box = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
            picture.crops([box], [SIZE])
        seconds.append(time.perf_counter() - start)
    print(f"{statistics.median(seconds):.3f} {memory('VmHWM') - before:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "SHARE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(Path(given.one[0]), float(given.one[1]), given.repeats)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given.side)
        print(f"| {given.side:,} x {given.side:,} | file |" + "".join(f" {share:g} of the area |" for share in SHARES))
        print("|---" * (2 + len(SHARES)) + "|")
        for path in sorted(folder.iterdir()):
            cells = []
            for share in SHARES:
                command = [sys.executable, __file__, "--repeats", str(given.repeats), "--one", str(path), str(share)]
                run = subprocess.run(command, capture_output=True, text=True)
                found = run.stdout.split() or ["failed", run.stderr.strip().rpartition("\n")[2][:60]]
                cells.append(f"{found[0]} s, {found[1]} MB" if run.returncode == 0 else found[1])
            print(
                f"| {path.name} | {path.stat().st_size / 1e6:,.0f} MB |" + "".join(f" {cell} |" for cell in cells),
                flush=True,
            )


if __name__ == "__main__":
    main()
