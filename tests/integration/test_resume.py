"""`--resume-checkpoint` continues exactly: killed anywhere, with other workers, in other slices, for longer."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, metrics, same_state, start, state

from data2vec_vision import train

EPOCHS = ["--epochs", 4]
UNTIMED = ("images_per_second", "data_wait")


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in lines]


@pytest.fixture
def whole(cli, images):
    """The folder of a run of 24 steps that was never interrupted, with dropout, which must repeat too."""
    cli("train", images, *TINY, *EPOCHS, "--dropout", 0.1, "--checkpoint-out-dir", "whole")
    return Path("whole")


@contextlib.contextmanager
def signal_after(step_number, signal_number):
    """Inside, a run gets the signal when it has done so many steps."""
    original = train.Window.add

    def add(self, step):
        original(self, step)
        if step.number == step_number:
            os.kill(os.getpid(), signal_number)

    with mock.patch.object(train.Window, "add", add):
        yield


@pytest.fixture
def stopped(cli, images):
    """The folder of the same run, stopped by a signal after step 9, in the middle of the second epoch."""
    with signal_after(9, signal.SIGTERM):
        code, _, err = cli("train", images, *TINY, *EPOCHS, "--dropout", 0.1, "--checkpoint-out-dir", "stopped")
    assert code == 143, err
    return Path("stopped")


LAST = "stopped/checkpoint_last.pt"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit(cli, whole, stopped, workers):
    assert torch.load(LAST, weights_only=True)["step"] == 9
    code, out, err = cli("train", "--resume-checkpoint", LAST, "--workers", workers)
    assert code == 0 and "after step 9 of 24" in out, err
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))
    ours, theirs = (torch.load(f"{f}/student_3.pt", weights_only=True)["state_dict"] for f in ("whole", "stopped"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_killed_at_any_moment_loses_only_what_came_after_its_last_checkpoint(cli, images, whole):
    run = start("train", images, *TINY, *EPOCHS, "--dropout", 0.1, "--checkpoint-out-dir", "killed",
                "--checkpoint-minutes", 1e-6, "--workers", 1)  # fmt: skip
    deadline = time.monotonic() + 60
    while not Path("killed/checkpoint_last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    run.kill()
    run.wait()
    kept = torch.load("killed/checkpoint_last.pt", weights_only=True)["step"]
    if kept < 24:
        code, _, err = cli("train", "--resume-checkpoint", "killed/checkpoint_last.pt", "--workers", 0)
        assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "killed/checkpoint_3.pt")
    assert untimed(metrics("killed")) == untimed(metrics("whole"))


def test_lines_behind_the_restored_step_and_torn_lines_go(cli, whole, stopped):
    with open("stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 10, "loss": 1}\n{"step": 11, "lo')
    cli("train", "--resume-checkpoint", LAST)
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))


def test_other_slices_with_the_same_images_a_step_continue_the_same_run(cli, whole, stopped):
    code, out, err = cli("train", "--resume-checkpoint", LAST, "--batch-size", 2)
    assert code == 0 and "4 images a step = 2 passes of 2" in out, err
    for a, b in zip(metrics("stopped"), metrics("whole"), strict=True):
        assert a["lr"] == b["lr"] and a["tau"] == b["tau"] and a["epoch"] == b["epoch"]


def test_the_folder_of_images_may_move(cli, images, whole, stopped):
    shutil.move(images, "elsewhere")
    code, _, err = cli("train", "elsewhere", "--resume-checkpoint", LAST)
    assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")


def test_restored_are_weights_teacher_optimizer_and_schedule(stopped):
    content = torch.load(LAST, weights_only=True)
    flat = state(LAST)
    assert content["segments"] == ((0, 24),)
    assert any(k.startswith("method.teacher.") for k in flat) and flat["optimizer.0.step"] == 9
    assert {"torch", "timm", "threads", "device"} <= content["environment"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden-dim", 64], "--hidden-dim 64 contradicts stopped/checkpoint_last.pt, which has 32"),
        (["--max-lr", 0.5], "--max-lr 0.5 contradicts"),
        (["--seed", 1], "--seed 1 contradicts stopped/checkpoint_last.pt, which has 0"),
        (["--epochs", 3], "which has 4 (more epochs can be added, not fewer)"),
        (["--batch-size", 3], "--batch-size times --grad-accum must stay that number"),
        (["--batch-size", 4, "--grad-accum", 2], "the run has 4 images a step"),
        (["--set", "crop_min=0.5"], "--set"),
        (["--checkpoint-out-dir", "other"], "--checkpoint-out-dir contradicts --resume-checkpoint"),
        (["--config", "stopped/config.json"], "leave out --config"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused_by_name(refused, stopped, options, message):
    assert message in refused("train", "--resume-checkpoint", LAST, *options)


def test_options_that_say_what_the_checkpoint_says_are_fine(cli, images, whole, stopped):
    code, _, err = cli("train", images, *TINY, *EPOCHS, "--dropout", 0.1, "--resume-checkpoint", LAST,
                       "--checkpoint-out-dir", "stopped", "--save-every", 2, "--log-every", 1)  # fmt: skip
    assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")
    assert Path("stopped/student_3.pt").exists()


def test_a_changed_folder_is_refused_with_what_changed(cli, refused, images, stopped):
    extra = next(images.rglob("*.png"))
    shutil.copy(extra, images / "extra.png")
    line = refused("train", "--resume-checkpoint", LAST)
    assert "24 images then, 25 now" in line and "--allow-changed-images" in line
    os.rename(images / "extra.png", extra)
    os.rename(extra, images / "renamed.png")
    assert "its 24 images have other names" in refused("train", "--resume-checkpoint", LAST)
    code, _, err = cli("train", "--resume-checkpoint", LAST, "--allow-changed-images")
    assert code == 0, err
    assert metrics("stopped")[-1]["step"] == 24


def test_more_epochs_make_the_run_longer_without_a_jump_and_resume_exactly_too(cli, images, stopped):
    shutil.copytree("stopped", "again")
    code, out, err = cli("train", "--resume-checkpoint", LAST, "--epochs", 8)
    assert code == 0 and "after step 9 of 48" in out, err
    lines = metrics("stopped")
    taus, rates = [line["tau"] for line in lines], [line["lr"] for line in lines]
    assert len(lines) == 48 and taus == sorted(taus)
    assert max(abs(b - a) for a, b in zip(rates[8:], rates[9:])) < 0.2 * max(rates)
    content = torch.load("stopped/checkpoint_7.pt", weights_only=True)
    assert content["segments"] == ((0, 24), (9, 48)) and content["config"]["epochs"] == 8
    with signal_after(20, signal.SIGINT):
        assert cli("train", "--resume-checkpoint", "again/checkpoint_last.pt", "--epochs", 8)[0] == 130
    assert cli("train", "--resume-checkpoint", "again/checkpoint_last.pt")[0] == 0
    assert same_state("again/checkpoint_7.pt", "stopped/checkpoint_7.pt")


def test_a_finished_run_says_so_and_can_be_extended(cli, refused, images, whole):
    line = refused("train", "--resume-checkpoint", "whole/checkpoint_3.pt")
    assert "is finished" in line and "--epochs 8" in line
    code, _, err = cli("train", "--resume-checkpoint", "whole/checkpoint_3.pt", "--epochs", 5)
    assert code == 0, err
    assert Path("whole/student_4.pt").exists() and metrics("whole")[-1]["step"] == 30


def test_another_machine_is_noted(cli, stopped):
    content = torch.load(LAST, weights_only=True)
    content["environment"] |= {"torch": "2.0.0", "threads": "64"}
    torch.save(content, LAST)
    _, out, _ = cli("train", "--resume-checkpoint", LAST)
    note = next(line for line in out.splitlines() if line.startswith("Note"))
    assert "torch 2.0.0 then" in note and "threads 64 then" in note and "bit" in note


def test_other_files_are_refused(refused, stopped, images):
    Path("text.pt").write_text("hello")
    content = torch.load(LAST, weights_only=True)
    content["method_state"]["regressor.weight"] = torch.zeros(3, 3)
    torch.save(content, "shape.pt")
    for path, message in (("text.pt", "text.pt"), ("missing.pt", "there is no file missing.pt"),
                          ("stopped", "is a folder"), ("shape.pt", "of another shape")):  # fmt: skip
        assert message in refused("train", "--resume-checkpoint", path)
