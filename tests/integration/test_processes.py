"""Under torchrun a run is the same run, sliced over processes; one of them prints and writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics
from several import forked

from data2vec_vision import device, gallery, plan
from data2vec_vision.config import TrainConfig
from data2vec_vision.data import Stream
from data2vec_vision.errors import InputError
from data2vec_vision.sources import open_source


def torchrun(count, *arguments, launcher=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *launcher]
    return subprocess.run(
        [*command, "-m", "data2vec_vision", *map(str, arguments)],
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
    run = forked(2, "train", images, *TINY, "--batch-size", 3)
    assert run.returncode != 0
    assert run.stderr.count("Error: --batch-size 3 cannot be shared by 2 processes; use a multiple of 2") == 1


def test_a_bad_file_that_another_process_meets_is_counted_and_listed(images):
    source, stream = open_source(images), Stream(24, seed=0)
    for position in (2, 3):  # of the first step: the second process's share
        (images / source.name(stream.image(position))).write_text("no image")
    run = forked(2, "train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "two")
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
    asked = []
    monkeypatch.setattr(gallery, "find_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(gallery, "prepare", lambda config, **more: asked.append(config.device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gallery.draw_pictures(images, TrainConfig(input_path=str(images), device="cuda"), [], None, maps=False)
    assert asked == ["cuda"]


def test_a_dry_run_takes_one_process(images):
    run = forked(2, "train", images, *TINY, "--dry-run")
    assert run.stderr.count("Error: a dry run takes one process") == 1


def test_a_line_that_spans_a_stop_of_two_processes_is_whole(images):
    """The first checkpoint is written after every step, so the run is resumed from step 9 of 12, between two lines."""
    options = [*TINY, "--epochs", 2, "--log-every", 6, "--save-every", 1]
    assert forked(2, "train", images, *options, "--checkpoint-out-dir", "whole").returncode == 0
    options += ["--checkpoint-minutes", 1e-6, "--method", "slow.py"]
    Path("slow.py").write_text(
        "import os, signal\n"
        "from data2vec_vision.methods.data2vec import Data2Vec\n"
        "class Slow(Data2Vec):\n"
        '    """Gets a SIGUSR1 in the second process and in both, and in its ninth step a SIGTERM in the first, twice."""\n'
        "    calls, rank = 0, int(os.environ['RANK'])\n"
        "    def training_step(self, views, masks):\n"
        "        self.calls += 1\n"
        "        if not os.environ.get('CALM'):\n"
        "            if (self.calls, self.rank) in ((3, 1), (5, 0), (5, 1)):\n"
        "                os.kill(os.getpid(), signal.SIGUSR1)\n"
        "            if (self.calls, self.rank) == (9, 0):\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n"
        "                os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().training_step(views, masks)\n"
    )
    options += ["--checkpoint-out-dir", "stopped", "--resume-checkpoint", "auto"]
    run = forked(2, "train", images, *options)
    assert [line for line in run.stdout.splitlines() if "SIGUSR1" in line] == [
        f"Saved after step {step}, as SIGUSR1 asks: stopped/checkpoint_last.pt" for step in (3, 5)
    ]
    assert run.stderr.count("Stopped after step 9; continue with") == 1
    assert torch.load("stopped/checkpoint_last.pt", weights_only=True)["step"] == 9
    os.environ["CALM"] = "1"
    try:
        run = forked(2, "train", images, *options)
    finally:
        del os.environ["CALM"]
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("The newest checkpoint in stopped is checkpoint_last.pt, of step 9;") == 1
    for one, two in zip(metrics("whole"), metrics("stopped"), strict=True):
        assert one["step"] == two["step"]
        for name in ("loss", "target_std", "prediction_std"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_processes_whose_clocks_differ_save_together(cli, images):
    """Saving asks all processes, so the one whose ten minutes are not over must come along."""
    Path("clocks.py").write_text(
        "import os, time, types\n"
        "from data2vec_vision import train\n"
        "from data2vec_vision.methods.data2vec import Data2Vec\n"
        "class Clocks(Data2Vec):\n"
        '    """For the second process time stands still."""\n'
        "if os.environ['RANK'] == '1':\n"
        "    train.time = types.SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter)\n"
    )
    options = [*TINY, "--epochs", 2, "--log-every", 5, "--checkpoint-minutes", 1e-6, "--method", "clocks.py"]
    run = forked(2, "train", images, *options, "--checkpoint-out-dir", "two")
    assert run.returncode == 0, run.stderr
    assert cli("train", images, *TINY, "--epochs", 2, "--log-every", 5, "--checkpoint-out-dir", "one")[0] == 0
    assert [line["loss"] for line in metrics("two")] == pytest.approx(
        [line["loss"] for line in metrics("one")], rel=1e-3
    )


def test_processes_of_one_machine_share_its_cores(images, monkeypatch):
    """And not those of all machines."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(plan, "cores", lambda: 12)
    job = plan.prepare(TrainConfig(input_path=str(images), image_size=16, patch_size=4, hidden_dim=32, batch_size=8))
    assert job.config.workers == 5


def test_the_longest_wait_for_images_counts(images):
    Path("waits.py").write_text(
        "import os, time\n"
        "from data2vec_vision import data\n"
        "from data2vec_vision.methods.data2vec import Data2Vec\n"
        "class Waits(Data2Vec):\n"
        '    """The second process reads its images from a slow disk."""\n'
        "if os.environ['RANK'] == '1':\n"
        "    original = data.StreamDataset.__getitem__\n"
        "    data.StreamDataset.__getitem__ = lambda self, key: time.sleep(0.05) or original(self, key)\n"
    )
    run = forked(2, "train", images, *TINY, "--epochs", 1, "--method", "waits.py", "--checkpoint-out-dir", "two")
    assert run.returncode == 0, run.stderr
    assert min(line["data_wait"] for line in metrics("two")) > 0.5
