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

import data2vec_vision as d2v
from data2vec_vision import plan, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.plan import prepare
from data2vec_vision.schedules import Plan

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
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)  # dropout differs


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
        (
            ["--set", "crop_min=0.5"],
            "--set crop_min=0.5 contradicts stopped/checkpoint_last.pt, which has pixel_pct=0.125",
        ),
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


@pytest.mark.parametrize("stop", [9, 11, 12, 13])
def test_a_run_stopped_around_the_end_of_its_pixels_continues_bit_for_bit(cli, images, stop):
    """Twelve of 24 steps predict pixels; after each step is a line, and after the change new figures of health."""
    options = ["train", images, *TINY, *EPOCHS, "--set", "pixel_pct=0.5", "--checkpoint-out-dir"]
    cli(*options, "whole")
    with signal_after(stop, signal.SIGTERM):
        assert cli(*options, "stopped")[0] == 143
    assert cli("train", "--resume-checkpoint", LAST)[0] == 0
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))


def test_a_run_made_longer_in_its_pixels_has_pixels_for_its_share(cli, images):
    with signal_after(3, signal.SIGTERM):
        cli("train", images, *TINY, *EPOCHS, "--set", "pixel_pct=0.5", "--checkpoint-out-dir", "stopped")
    assert cli("train", "--resume-checkpoint", LAST, "--epochs", 8)[0] == 0
    phases = [line.get("phase") for line in metrics("stopped")]
    assert len(phases) == 48 and phases == sorted(phases, key=lambda p: p is None)
    progress = Plan(((0, 24), (3, 48)), max_lr=1.0, warmup=0.1).progress
    assert phases.count("pixels") == next(n for n in range(49) if progress(n) >= 0.5)


def test_trained_weights_do_not_begin_with_pixels(cli, images, whole):
    _, out, _ = cli("train", images, *TINY, "--epochs", 1, "--init", "whole/student_3.pt", "--checkpoint-out-dir", "on")
    assert "pixel" not in out and all("phase" not in line for line in metrics("on"))
    _, out, _ = cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "new")
    assert "--set pixel_pct=0.125 (an untrained teacher says little)" in out


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


def test_a_line_of_the_metrics_that_spans_the_stop_is_whole(cli, images):
    options = [*TINY, *EPOCHS, "--log-every", 4]
    cli("train", images, *options, "--checkpoint-out-dir", "whole")
    with signal_after(9, signal.SIGTERM):
        cli("train", images, *options, "--checkpoint-out-dir", "stopped")
    cli("train", "--resume-checkpoint", LAST)
    assert [line["step"] for line in metrics("stopped")] == [4, 8, 12, 16, 20, 24]
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_other_precisions_continue_bit_for_bit_too(cli, images, precision):
    """With fp16 the scale of the loss doubles every second step here, so it must be restored; one step is skipped."""
    original = torch.amp.GradScaler

    def scaler(device, enabled):
        return original(device, init_scale=2.0**4, growth_interval=2, enabled=enabled)

    spoil = Data2Vec.training_step

    def training_step(self, views, masks):
        out = spoil(self, views, masks)
        self.steps = getattr(self, "steps", 0) + 1
        return out._replace(loss=out.loss * float("nan")) if self.steps == 3 else out

    options = [*TINY, *EPOCHS, "--precision", precision]
    with mock.patch.object(train.torch.amp, "GradScaler", scaler):
        with mock.patch.object(Data2Vec, "training_step", training_step):
            cli("train", images, *options, "--checkpoint-out-dir", "whole")
            with signal_after(9, signal.SIGTERM):
                cli("train", images, *options, "--checkpoint-out-dir", "stopped")
        code, _, err = cli("train", "--resume-checkpoint", LAST)
    assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")
    assert untimed(metrics("stopped")) == untimed(metrics("whole")) and metrics("whole")[-1]["skipped"] == 1
    ours, theirs = (torch.load(f"{f}/checkpoint_3.pt", weights_only=True) for f in ("whole", "stopped"))
    assert ours["scaler"] == theirs["scaler"] and ours["skipped"] == theirs["skipped"] == 1
    if precision == "fp16":
        assert ours["scaler"]["scale"] > 2.0**5


def test_a_tau_that_is_more_than_the_rule_gives_can_be_typed_and_resumed(cli, images):
    options = [*TINY, *EPOCHS, "--tau-initial", 0.999, "--checkpoint-out-dir", "stopped"]
    with signal_after(9, signal.SIGTERM):
        _, out, _ = cli("train", images, *options)
    assert "--tau-end 0.999 (as --tau-initial" in out
    assert cli("train", "--resume-checkpoint", LAST)[0] == 0
    assert {line["tau"] for line in metrics("stopped")} == {0.0, 0.999}


def test_changed_images_are_allowed_for_one_call_only(cli, refused, images, stopped):
    extra = next(images.rglob("*.png"))
    shutil.copy(extra, images / "extra.png")
    with signal_after(12, signal.SIGTERM):
        assert cli("train", "--resume-checkpoint", LAST, "--allow-changed-images")[0] == 143
    shutil.copy(extra, images / "another.png")
    assert "25 images then, 26 now" in refused("train", "--resume-checkpoint", LAST)


def test_both_encoders_keep_the_normalisation_of_the_weights_they_start_from(cli, images, whole):
    content = torch.load("whole/student_3.pt", weights_only=True)
    content["transform"] |= {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    torch.save(content, "other.pt")
    with signal_after(9, signal.SIGTERM):
        cli("train", images, *TINY, *EPOCHS, "--init", "other.pt", "--save-every", 1, "--checkpoint-out-dir", "stopped")
    cli("train", "--resume-checkpoint", LAST)
    for path in ("student_0.pt", "teacher_0.pt", "student_3.pt", "teacher_3.pt"):
        assert d2v.load(f"stopped/{path}").transform.mean == (0.5, 0.5, 0.5), path


def test_a_run_may_start_from_a_training_checkpoint_with_its_mask_token(images, whole):
    content = torch.load("whole/student_3.pt", weights_only=True)
    for path in ("whole/student_3.pt", "whole/checkpoint_3.pt"):
        config = TrainConfig(input_path=str(images), image_size=16, patch_size=4, hidden_dim=32, n_heads=2, n_encoders=2,
                             init=path)  # fmt: skip
        method = prepare(config).method
        for encoder in method.encoders.values():
            assert torch.equal(encoder.mask_token, content["mask_token"])
            assert torch.equal(encoder.vit.norm.weight, content["state_dict"]["norm.weight"])


def test_a_library_call_checks_what_differs_from_the_defaults(images, stopped):
    with pytest.raises(InputError, match="--epochs 2 contradicts"):
        train.train(TrainConfig(resume_checkpoint=LAST, epochs=2))
    train.train(TrainConfig(resume_checkpoint=LAST, epochs=5))
    assert metrics("stopped")[-1]["step"] == 30


def test_what_a_killed_write_left_and_spoilt_lines_are_cleared_away(cli, stopped):
    Path("stopped/.checkpoint_last.pt.123.tmp").write_bytes(b"half")
    Path("stopped/.notes.tmp").write_text("the user's own")
    with open("stopped/metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write('no json\n[1]\n{"step": null}\n{"step": 10, "lo\udcff": 1}\n')
    code, _, err = cli("train", "--resume-checkpoint", LAST)
    assert code == 0, err
    assert [p.name for p in Path("stopped").glob(".*.tmp")] == [".notes.tmp"] and len(metrics("stopped")) == 24


def test_bad_files_that_were_mended_do_not_end_the_run_that_goes_on(cli, images):
    """Two of 24 are allowed. One with a name that is no Unicode is among them."""
    paths = sorted(images.rglob("*.png"))
    odd = os.fsencode(images) + b"/\xff.png"
    os.rename(paths[0], odd)
    kept = Path(os.fsdecode(odd)).read_bytes()
    for path in (odd, paths[1]):
        with open(path, "wb") as file:
            file.write(b"no image")
    with signal_after(9, signal.SIGTERM):
        cli("train", images, *TINY, *EPOCHS, "--checkpoint-out-dir", "stopped")
    assert len(Path("stopped/bad_files.txt").read_bytes().splitlines()) == 2
    for path in (odd, paths[1]):
        with open(path, "wb") as file:
            file.write(kept)
    for path in paths[2:4]:
        path.write_bytes(b"no image")
    code, _, err = cli("train", "--resume-checkpoint", LAST)
    assert code == 0, err
    assert len(Path("stopped/bad_files.txt").read_bytes().splitlines()) == 4


def test_a_knob_that_follows_from_the_data_is_said_and_stays_with_the_run(cli, refused, images):
    run = ["train", images, *TINY, "--method", "msn", "--set", "head_dim=32", "--epochs", 1]
    code, out, _ = cli(*run, "--checkpoint-out-dir", "run")
    assert code == 0 and "--set n_prototypes=64 (for 24 images)" in out
    stored = torch.load("run/checkpoint_0.pt", weights_only=True)
    assert stored["config"]["set"] == ("head_dim=32", "n_prototypes=64")
    assert len(stored["method_state"]["prototypes.weight"]) == 64
    longer = ["--resume-checkpoint", "run/checkpoint_last.pt", "--epochs"]
    assert cli("train", *longer, 2, "--set", "head_dim=32")[0] == 0  # what was typed, without what followed
    doubled = [*longer, 3, "--set", "head_dim=16", "--set", "head_dim=32"]  # the last counts
    assert "--set head_dim=16 contradicts" in refused("train", *doubled[:-2])
    assert cli("train", *doubled)[0] == 0
    assert "--set n_prototypes=8 contradicts" in refused("train", *longer, 4, "--set", "n_prototypes=8")
    code, out, _ = cli(*run, "--set", "n_prototypes=8", "--checkpoint-out-dir", "typed")
    assert code == 0 and "n_prototypes=64" not in out


def test_what_was_restored_does_not_stay_in_memory(stopped):
    """Weights and moments are the method's and the optimizer's by then."""
    job = plan.restore(TrainConfig(resume_checkpoint=LAST), {})
    train.optimizer_and_scaler(job)
    assert not [value for value in job.restored.values() if isinstance(value, dict) and "0" in str(value.keys())]
    assert {"optimizer", "method_state", "encoders"}.isdisjoint(job.restored) and job.restored["window"]


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("dies_at", ["save_encoder", "keep_training"])
def test_a_run_killed_between_two_files_of_an_epoch_writes_the_rest(cli, images, whole, monkeypatch, epoch, dies_at):
    """Also after the last step; and `auto` never meets encoders without a checkpoint."""

    class Killed(BaseException):
        """Nothing of ours catches it, as nothing catches SIGKILL."""

    def killed(*args, **more):
        raise Killed

    original, count = train.save, []

    def save(*args):
        count.append(1)
        with monkeypatch.context() as patch:
            if len(count) == epoch + 1:
                patch.setattr(train.checkpoint, dies_at, killed)
            original(*args)

    options = [*TINY, *EPOCHS, "--dropout", 0.1, "--save-every", 1, "--keep", 9, "--checkpoint-out-dir", "cut"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", save)
        cli("train", images, *options)
    code, _, err = cli("train", images, *options, "--resume-checkpoint", "auto")
    assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "cut/checkpoint_3.pt")
    names = {path.name for path in Path("cut").glob("*.pt")}
    assert names == {f"{kind}_{n}.pt" for kind in ("student", "teacher", "checkpoint") for n in range(4)} | {
        "checkpoint_last.pt"
    }
