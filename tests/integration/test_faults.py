"""Faults of the machine and of numbers while a command runs: what it says, what it keeps, and that it is the same run."""

import faulthandler
import json
import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, same_state
from test_resume import LAST, signal_after, untimed

from data2vec_vision import checkpoint, extract, loading, methods, train
from data2vec_vision.methods.data2vec import Data2Vec

TWO_WORKERS = ["--workers", 2]  # after TINY: the last counts


def kill_workers():
    for process in loading.multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def plain(cli, images):
    cli("train", images, *TINY, "--epochs", 2, "--dropout", 0.1, "--checkpoint-out-dir", "plain")
    return Path("plain")


def test_a_run_whose_workers_are_killed_is_the_run_bit_for_bit(cli, images, plain, monkeypatch):
    add = train.Window.add

    def killing(self, step):
        add(self, step)
        if step.number in (3, 7):
            kill_workers()

    monkeypatch.setattr(train.Window, "add", killing)
    options = [*TINY, *TWO_WORKERS, "--epochs", 2, "--dropout", 0.1, "--checkpoint-out-dir", "killed"]
    code, out, err = cli("train", images, *options)
    assert code == 0, err
    assert out.count("a process that reads images was ended by SIGKILL") == 1
    assert "others go on at the same place, with the same result" in out
    assert same_state("plain/checkpoint_1.pt", "killed/checkpoint_1.pt")
    assert untimed(metrics("killed")) == untimed(metrics("plain"))


def test_features_are_the_same_though_workers_are_killed(cli, images, plain, monkeypatch):
    student = plain / "student_1.pt"
    assert cli("extract", student, images, "--output", "plain.npz", "--batch-size", 4, "--workers", 0)[0] == 0
    add, rows = extract.Partial.add, []

    def killing(self, features, unreadable):
        add(self, features, unreadable)
        rows.append(len(features))
        if sum(rows) == 8:
            kill_workers()

    monkeypatch.setattr(extract.Partial, "add", killing)
    code, out, err = cli("extract", student, images, "--output", "killed.npz", "--batch-size", 4, *TWO_WORKERS)
    assert code == 0 and "with the same result" in out, err
    one, two = np.load("plain.npz"), np.load("killed.npz")
    assert np.array_equal(one["features"], two["features"]) and list(one["paths"]) == list(two["paths"])


def test_an_image_that_kills_its_process_every_time_ends_extract_which_can_go_on(cli, images, plain, monkeypatch):
    resized = extract.ImageTransform.resized
    deadly = sorted(images.rglob("*.*"))[13]

    def killing(self, picture):
        if os.path.exists("armed") and picture.size == deadly_size:
            faulthandler.disable()  # pytest's, which would print where
            os.kill(os.getpid(), signal.SIGABRT)
        return resized(self, picture)

    from PIL import Image

    Image.new("RGB", (40, 17)).save(deadly)
    deadly_size = (40, 17)
    monkeypatch.setattr(extract.ImageTransform, "resized", killing)
    Path("armed").touch()
    arguments = ["extract", plain / "student_1.pt", images, "--output", "f.npz", "--batch-size", 4, "--workers", 1]
    code, _, err = cli(*arguments)
    assert code == 1 and f"while it read {deadly.relative_to(images)}" in err, err
    assert err.startswith("Error: a process that reads images was lost 3 times in a row; the last was ended by SIGABRT")
    Path("armed").unlink()
    code, out, err = cli(*arguments, *(["--resume"] if "--resume" in err else []))
    assert code == 0 and "features 24 x 32" in out, err


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_memory(*args, **kwargs):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")


def test_out_of_memory_says_in_one_line_what_keeps_the_images_of_a_step(cli, images, monkeypatch):
    monkeypatch.setattr(Data2Vec, "training_step", out_of_memory)
    code, _, err = cli("train", images, *TINY, "--batch-size", 24, "--grad-accum", 2)
    assert code == 1 and len(err.splitlines()) == 1
    assert "try --batch-size 12 --grad-accum 4, the same images a step, or --grad-checkpointing" in err
    monkeypatch.setattr(Data2Vec, "training_step", no_memory)
    code, _, err = cli("train", images, *TINY, "--batch-size", 15, "--checkpoint-out-dir", "odd")
    assert code == 1 and "try --batch-size 5 --grad-accum 3, the same images a step" in err


@pytest.mark.parametrize("error", [out_of_memory, no_memory])
def test_out_of_memory_in_extract_and_evaluate_names_a_smaller_batch(cli, images, plain, monkeypatch, error):
    student = plain / "student_1.pt"
    monkeypatch.setattr("data2vec_vision.vit.MaskedVisionTransformer.encode", error)
    for arguments in (["extract", student, images, "--output", "f.npz"], ["evaluate", student, images, "--k", 5]):
        code, _, err = cli(*arguments, "--batch-size", 32, "--workers", 0)
        assert code == 1 and len(err.splitlines()) == 1, err
        assert "the memory of cpu is not enough for batches of 32; try --batch-size 16" in err
    assert not Path("f.npz").exists()


def test_shared_memory_that_is_full_names_workers(cli, images, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    code, _, err = cli("train", images, *TINY, *TWO_WORKERS, "--epochs", 1)
    assert code == 1 and len(err.splitlines()) == 1
    assert "/dev/shm, through which 2 processes send images, is full; try --workers 1" in err


def spoiling(*numbers):
    """A step of data2vec whose loss is not finite in the forward passes of these numbers."""
    original, calls = Data2Vec.training_step, []

    def training_step(self, views, masks):
        out = original(self, views, masks)
        calls.append(None)
        return out._replace(loss=out.loss * float("nan")) if len(calls) in numbers else out

    return mock.patch.object(Data2Vec, "training_step", training_step)


def test_the_list_of_skipped_steps_of_a_resumed_run_is_that_of_a_whole_one(cli, images):
    """Skipped are steps 7, 9 and 10; the stop comes after 9, in the midst of a line of metrics.jsonl."""
    options = [*TINY, "--epochs", 3, "--log-every", 4, "--checkpoint-out-dir"]
    with spoiling(7, 9, 10):
        code, out, err = cli("train", images, *options, "whole")
    assert code == 0 and "Note     step 7 was skipped: its loss is not finite; whole/skipped_steps.jsonl" in out, err
    with spoiling(7, 9, 10), signal_after(9, signal.SIGTERM):
        assert cli("train", images, *options, "stopped")[0] == 143
    with open("stopped/skipped_steps.jsonl", "a") as file:
        file.write('{"step": 11, "of": "a part that was lost"}\n{"st')
    with spoiling(1):
        assert cli("train", "--resume-checkpoint", LAST)[0] == 0
    whole, stopped = (Path(f"{name}/skipped_steps.jsonl").read_text() for name in ("whole", "stopped"))
    assert whole == stopped and [json.loads(line)["step"] for line in whole.splitlines()] == [7, 9, 10]
    assert same_state("whole/checkpoint_2.pt", "stopped/checkpoint_2.pt")


def test_weights_that_are_not_finite_do_not_replace_the_last_good_checkpoint(cli, images, monkeypatch):
    original, steps = Data2Vec.after_step, []

    def after_step(self, progress):
        original(self, progress)
        steps.append(progress)
        if len(steps) == 8:
            with torch.no_grad():
                self.student.vit.norm.bias[0] = float("inf")

    monkeypatch.setattr(Data2Vec, "after_step", after_step)
    code, _, err = cli("train", images, *TINY, "--epochs", 3, "--save-every", 1, "--checkpoint-out-dir", "a")
    line = err.splitlines()[-1]
    assert code == 1 and "Error: student.vit.norm.bias is not finite, so it was not saved; try a lower --max-lr" in line
    assert "continue with: python -m data2vec_vision train --resume-checkpoint a/checkpoint_last.pt" in line
    assert torch.load("a/checkpoint_last.pt", weights_only=True)["step"] == 6
    assert sorted(p.name for p in Path("a").glob("student_*")) == ["student_0.pt"]
    assert checkpoint.load_encoder("a/student_0.pt")[0].vit.norm.bias.isfinite().all()


@pytest.mark.parametrize("name", methods.names())
def test_deterministic_is_the_same_run_on_a_cpu_whatever_the_workers(cli, images, name):
    """And torch is left as it was."""
    from test_all_methods import OPTIONS

    run = ["train", images, *TINY, *OPTIONS[name], "--method", name, "--epochs", 1, "--checkpoint-out-dir"]
    for folder, options in (("a", ["--workers", 3]), ("b", ["--deterministic", "--workers", 1]), ("c", [])):
        code, _, err = cli(*run, folder, *options)
        assert code == 0, err
    assert same_state("a/checkpoint_0.pt", "b/checkpoint_0.pt") and same_state("a/checkpoint_0.pt", "c/checkpoint_0.pt")
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_deterministic_is_said_in_one_line(cli, images, monkeypatch):
    def training_step(self, views, masks):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation, but you set 'torch.use_det")

    monkeypatch.setattr(Data2Vec, "training_step", training_step)
    code, _, err = cli("train", images, *TINY, "--deterministic")
    assert code == 1 and len(err.splitlines()) == 1
    assert "--deterministic is not to be had here: RuntimeError: kthvalue CUDA does not have" in err
    assert "try --no-deterministic" in err
