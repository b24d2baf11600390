"""Writes the files of this version that all later versions must load: a student and a training checkpoint.

    python tests/golden/make_files.py tests/golden

Run once for each release, and never again for one that is out: `files_of_0.1.0/` is what 0.1.0 wrote. The images are
made of arithmetic and stored as PNG, which no version of a decoder reads differently, so that features can be compared.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import data2vec_vision
from data2vec_vision.__main__ import main

RUN = ["--image-size", "8", "--patch-size", "4", "--hidden-dim", "16", "--n-heads", "2", "--n-encoders", "1",
       "--batch-size", "4", "--epochs", "2", "--workers", "0", "--precision", "fp32", "--device", "cpu",
       "--log-every", "1", "--no-report", "--no-tensorboard"]  # fmt: skip


def write_images(folder: Path) -> Path:
    """Eight PNGs of 8 x 8 pixels, gradients of different slopes."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:8, :8]
    for n in range(8):
        pixels = np.stack([x * (n + 1) * 4, y * (8 - n) * 4, (x + y) * 8 + n], axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def write_files(golden: Path) -> None:
    out = golden / f"files_of_{data2vec_vision.__version__}"
    out.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that the checkpoint names no folder of this machine
        write_images(Path("images"))
        assert main(["train", "images", *RUN, "--save-every", "1", "--checkpoint-out-dir", "run"]) == 0
        assert main(["extract", "run/student_1.pt", "images", "--output", "f.npz"]) == 0
        for name in ("student_1.pt", "checkpoint_0.pt"):
            shutil.copy(Path("run", name), out / name)
        features = np.load("f.npz")["features"]
        losses = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        expected = {
            "features": features.astype(float).round(6).tolist(),
            "losses": {str(line["step"]): line["loss"] for line in losses if "loss" in line},
        }
        (out / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]).resolve())
