"""Under torchrun a run is the same run, sliced over processes; one of them prints and writes."""

import os
import subprocess
import sys

import pytest
from conftest import TINY, metrics

from data2vec_vision import device, plan
from data2vec_vision.data import Stream
from data2vec_vision.errors import InputError
from data2vec_vision.sources import open_source


def torchrun(count, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*launcher, "-m", "data2vec_vision", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_make_the_run_of_one(cli, images):
    cli("train", images, *TINY, "--epochs", 2, "--grad-accum", 2, "--checkpoint-out-dir", "one")
    run = torchrun(2, "train", images, *TINY, "--epochs", 2, "--grad-accum", 2, "--checkpoint-out-dir", "two")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("8 images a step = 2 passes of 4, 2 processes of 2 each") == 1
    assert run.stdout.count("Done.") == 1
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_an_error_in_the_arguments_is_told_once(images):
    run = torchrun(2, "train", images, *TINY, "--batch-size", 3)
    assert run.returncode != 0
    assert run.stderr.count("Error: --batch-size 3 cannot be shared by 2 processes; use a multiple of 2") == 1


def test_a_bad_file_that_another_process_meets_is_counted_and_listed(images):
    source, stream = open_source(images), Stream(24, seed=0)
    for position in (2, 3):  # of the first step: the second process's share
        (images / source.name(stream.image(position))).write_text("no image")
    run = torchrun(2, "train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "two")
    assert run.returncode == 0, run.stderr
    assert metrics("two")[-1]["bad_files"] == 2 and "2 images could not be read" in run.stdout
    assert len(open("two/bad_files.txt").readlines()) == 2


def test_each_process_finds_its_own_device_again(images, monkeypatch):
    """A run writes which kind of device it had, so that a resumed process takes its own and not the first one's."""
    monkeypatch.setattr(device, "devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"])
    assert plan.device_to_go_on("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan.device_to_go_on("cuda:1") == plan.device_to_go_on("cuda") == "cuda"
    with pytest.raises(InputError, match="each process has its own; use --device cuda"):
        device.find_device("cuda:1")


def test_a_dry_run_takes_one_process(images):
    run = torchrun(2, "train", images, *TINY, "--dry-run")
    assert run.stderr.count("Error: a dry run takes one process") == 1
