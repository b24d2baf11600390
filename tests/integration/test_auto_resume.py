"""One command line, given again and again, begins a run, goes on with it, and leaves it when it is finished."""

import os
import shutil
import signal
from pathlib import Path

from conftest import TINY, metrics, same_state
from test_resume import signal_after, untimed

from data2vec_vision import train

RUN = [*TINY, "--epochs", 4, "--dropout", 0.1, "--set", "pixel_pct=0.25", "--init", "first.pt"]
AUTO = ["--resume-checkpoint", "auto"]


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).rglob("*") if p.is_file()}


def test_the_command_that_began_a_run_resumes_it(cli, refused, images):
    """In the default folder; stopped in an epoch, in a new process's stead told apart by nothing but the files."""
    cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "before")
    Path("before/student_0.pt").rename("first.pt")
    assert cli("train", images, *RUN, "--checkpoint-out-dir", "whole")[0] == 0
    folder = Path("runs/images-data2vec")
    with signal_after(9, signal.SIGTERM):
        code, out, err = cli("train", images, *RUN, *AUTO)
    assert code == 143 and f"There is no checkpoint in {folder} to go on with; a fresh run begins." in out, err
    assert "--seed 1 contradicts runs/images-data2vec/checkpoint_last.pt" in refused(
        "train", images, *RUN, *AUTO, "--seed", 1
    )
    with signal_after(14, signal.SIGTERM):
        code, out, err = cli("train", images, *RUN, *AUTO)
    assert code == 143 and f"The newest checkpoint in {folder} is checkpoint_last.pt, of step 9;" in out, err
    shutil.copytree(folder, "torn")
    last, torn = folder / "checkpoint_last.pt", Path("torn/checkpoint_last.pt")
    torn.write_bytes(torn.read_bytes()[:-1000])
    before = files("torn")
    line = refused("train", images, *RUN, *AUTO, "--checkpoint-out-dir", "torn")
    assert f"none of the checkpoints in torn can be read: {torn} cannot be read" in line and files("torn") == before
    assert cli("train", images, *RUN, *AUTO)[0] == 0
    assert same_state("whole/checkpoint_3.pt", folder / "checkpoint_3.pt")
    assert untimed(metrics(folder)) == untimed(metrics("whole"))
    before = files(folder)
    code, out, err = cli("train", images, *RUN, *AUTO)
    assert code == 0 and f"Nothing is left to do: the run in {last} is finished" in out and not err
    assert files(folder) == before
    code, out, err = cli("train", images, *RUN[:-6], "--epochs", 5, *AUTO)
    assert code == 0 and "after step 24 of 30" in out, err


def test_a_command_with_a_config_resumes_too(cli, refused, images):
    """A `--config` beside a checkpoint is refused otherwise; here it is what the run was begun with."""
    run = ["train", images, "--config", "given.json", "--checkpoint-out-dir", "run", *AUTO]
    cli("train", images, *TINY, "--epochs", 2, "--method", "mae", "--checkpoint-out-dir", "whole")
    Path("whole/config.json").rename("given.json")
    with signal_after(9, signal.SIGINT):
        assert cli(*run)[0] == 130
    assert "--dropout 0.5 contradicts" in refused(*run, "--dropout", 0.5)
    Path("other.json").write_text(Path("given.json").read_text().replace('"seed": 0', '"seed": 1'))
    assert "--seed 1 contradicts" in refused(*run[:3], "other.json", *run[4:])
    assert cli(*run)[0] == 0
    assert same_state("whole/checkpoint_1.pt", "run/checkpoint_1.pt")


def test_sigusr1_saves_and_the_run_goes_on(cli, images, monkeypatch):
    """Nothing else saves before the run dies in its tenth step; then the file is one to go on with."""
    options = ["train", images, *TINY, "--epochs", 2, *AUTO, "--checkpoint-out-dir"]
    before = signal.getsignal(signal.SIGUSR1)
    cli(*options, "whole")
    assert signal.getsignal(signal.SIGUSR1) is before  # a process that this one starts would ignore it too
    original = train.training_steps

    def dies(*arguments):
        for step in original(*arguments):
            if step.number in (5, 8):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert step.number < 10
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_steps", dies)
        code, out, _ = cli(*options, "run")
    assert code == 1
    said = [line for line in out.splitlines() if "SIGUSR1" in line]
    assert said == [f"Saved after step {step}, as SIGUSR1 asks: run/checkpoint_last.pt" for step in (5, 8)]
    code, out, err = cli(*options, "run")
    assert code == 0 and "after step 8 of 12" in out, err
    assert same_state("whole/checkpoint_1.pt", "run/checkpoint_1.pt")
