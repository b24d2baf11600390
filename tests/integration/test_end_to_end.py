"""The whole command line in processes of its own, on PNG and JPEG files: train, kill, resume, extract."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, command, metrics, start


def run(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_kill_resume_extract(images):
    killed = start("train", images, *TINY, "--epochs", 10, "--checkpoint-minutes", 1e-6, "--workers", 1)
    folder, deadline = Path("runs/images-data2vec"), time.monotonic() + 60
    while not (folder / "checkpoint_last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    step = torch.load(folder / "checkpoint_last.pt", weights_only=True)["step"]
    assert 0 < step < 60
    out = run("train", "--resume-checkpoint", folder / "checkpoint_last.pt", "--workers", 2)
    assert f"after step {step:,} of 60" in out and f"Done. The encoder is {folder}/student_9.pt" in out
    assert [line["step"] for line in metrics(folder)] == list(range(1, 61))
    out = run("extract", folder / "student_9.pt", images, "--output", "features.npz")
    assert "features 24 x 32" in out
    with np.load("features.npz") as file:
        assert file["features"].shape == (24, 32) and file["features"].std(axis=0).min() > 0
    assert sorted(p.suffix for p in images.rglob("*.*"))[0] == ".JPG"


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).with_name("data2vec-vision")
    out = subprocess.run([script, "train", "--help"], capture_output=True, text=True, check=True).stdout
    assert out == run("train", "--help")
    assert "0.1.0" in run("--version")


def test_on_a_terminal_there_is_a_bar(images):
    """A pseudo-terminal for stderr, as a person has it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    done = subprocess.Popen(command("train", images, *TINY, "--epochs", 2), stdout=subprocess.PIPE, stderr=theirs)
    done.communicate(timeout=120)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        text += part
    bar = next(part for part in reversed(text.decode().split("\r")) if "12/12" in part)
    assert "loss=" in bar and "lr=" in bar and "tau=" in bar and "waiting=" in bar, bar
