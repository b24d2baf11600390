"""benchmarks/learning.py: a run of each seed becomes a row, rows become a table; it is trained as `train` trains."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "learning.py"
SMALL = [
    "--option",
    "image_size=16",
    "hidden_dim=32",
    "n_encoders=2",
    "n_heads=2",
    "log_every=1",
    "--set",
    "decoder_dim=32",
    "--batch-size",
    "4",
]


@pytest.fixture
def classes(tmp_path):
    """30 training and 6 test images of two classes: dark and light."""
    random = np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 3)):
        for shade, name in ((40, "dark"), (200, "light")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = np.clip(random.normal(shade, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path


def learn(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_row_a_seed_and_a_table_with_their_spread(classes):
    results = classes / "results.jsonl"
    folders = ["--train", classes / "train", "--test", classes / "test", "--results", results, "--threads", 1]
    run = learn("mae", *folders, "--epochs", 1.5, "--seeds", 0, 1, *SMALL)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["library"], row["method"], row["images"], row["labelled"]) == ("ours", "mae", 30, [30, 6])
        assert row["steps"] == round(1.5 * 30 / 4) and row["seen"] == 4 * row["steps"]
        assert 0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100 and row["verdict"] == "early"
        assert "decoder_dim=32" in row["settings"] and row["cpu_minutes"] >= 0 and "1" in row["few_shot"]
    table = learn("--table", "--results", results).stdout.splitlines()
    assert len(table) == 3 and "| mae |" in table[2] and "| 2 |" in table[2] and " ± " in table[2]


def test_what_is_missing_is_said(classes):
    run = learn("mae", "--train", classes / "train", "--test", classes / "test")
    assert run.returncode == 2 and "--minutes or --epochs" in run.stderr
    run = learn("data2vec2", "--train", classes / "train", "--test", classes / "test", "--epochs", 1, "--peer")
    assert run.returncode == 2 and "stable-pretraining has no data2vec2; leave out --peer" in run.stderr
