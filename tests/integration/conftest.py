"""The command line, in this process for speed or in one of its own where that matters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data2vec_vision.__main__ import main

# A step takes milliseconds: 24 images, 4 a step, so 6 steps an epoch.
TINY = ["--image-size", "16", "--patch-size", "4", "--hidden-dim", "32", "--n-heads", "2", "--n-encoders", "2",
        "--batch-size", "4", "--workers", "0", "--precision", "fp32", "--log-every", "1", "--no-report", "--no-tensorboard"]  # fmt: skip


@pytest.fixture
def cli(capfd):
    """cli(*arguments) -> (exit code, stdout, stderr), run in this process."""

    def run(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(cli):
    """refused(*arguments) -> the one line of a command that must end with exit code 2 and that line."""

    def run(*arguments):
        code, _, err = cli(*arguments)
        assert code == 2, err
        lines = [line for line in err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("Error: "), err
        return lines[0]

    return run


def command(*arguments):
    return [sys.executable, "-m", "data2vec_vision", *map(str, arguments)]


def start(*arguments, **environment):
    """The command in a process of its own, its output in one pipe."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def state(path):
    """Everything a training checkpoint knows of weights and optimizer, flat."""
    content = torch.load(path, weights_only=True)
    flat = {f"method.{k}": v for k, v in content["method_state"].items()}
    for n, moments in content["optimizer"]["state"].items():
        flat |= {f"optimizer.{n}.{k}": v for k, v in moments.items()}
    return flat


def same_state(a, b):
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
