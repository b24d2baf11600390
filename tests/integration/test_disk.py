"""A disk that takes no more, in earnest: one line, earlier files as they were, and a run that goes on after room is made."""

import errno
import os
import resource
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import TINY, same_state

from data2vec_vision import train

RUN = [*TINY, "--epochs", 3, "--save-every", 1, "--checkpoint-out-dir"]


@contextmanager
def largest_file(size):
    """What `ulimit -f` does."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def at_save(number, happens, monkeypatch):
    """Let something happen just before the run saves for the `number`th time."""
    original, count = train.save, []

    def save(*args):
        count.append(1)
        if len(count) == number:
            happens()
        original(*args)

    monkeypatch.setattr(train, "save", save)


def failed(result, *words):
    """The one line of a run that failed."""
    code, _, err = result
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("Error: cannot write to ") and "Traceback" not in err, err
    assert all(word in line for word in words), line
    return line


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.pt")}


def goes_on(cli, folder):
    """The command resumes, and ends as the run that nothing happened to."""
    assert not [*Path(folder).glob(".*tmp")]
    code, _, err = cli("train", "--resume-checkpoint", f"{folder}/checkpoint_last.pt")
    assert code == 0 and same_state("whole/checkpoint_2.pt", f"{folder}/checkpoint_2.pt"), err


@pytest.fixture
def whole(cli, images):
    assert cli("train", images, *RUN, "whole")[0] == 0


def test_a_limit_of_file_sizes(cli, images, whole, monkeypatch):
    size = os.path.getsize("whole/checkpoint_last.pt") // 2
    before = {}
    with monkeypatch.context() as patch, ExitStack() as limits:
        at_save(2, lambda: (before.update(content("run")), limits.enter_context(largest_file(size))), patch)
        result = cli("train", images, *RUN, "run")
    line = failed(result, "File too large", "ulimit -f", "--resume-checkpoint")
    with largest_file(1000):  # nor is there room when it is resumed
        again = cli("train", "--resume-checkpoint", "run/checkpoint_last.pt")
    failed(again, "File too large", "ulimit -f")
    assert before.items() <= content("run").items() and "inline_container" not in line
    goes_on(cli, "run")


def test_a_full_disk(cli, images, whole, small_disk, monkeypatch):
    filler, before = small_disk / "filler", {}

    def fill():
        before.update(content(small_disk / "run"))
        with open(filler, "wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(file.fileno(), bytes(4096))

    with monkeypatch.context() as patch:
        at_save(2, fill, patch)
        failed(cli("train", images, *RUN, small_disk / "run"), "No space left on device", "make room", "--resume-ch")
    assert content(small_disk / "run") == before
    filler.unlink()
    goes_on(cli, small_disk / "run")


def test_a_disk_that_becomes_read_only(cli, images, whole, monkeypatch):
    """As the system says it; a disk that is in use cannot be made so for a test."""
    opened = open

    def refusing(path, mode="r", *args, **options):
        if Path(path).parent.name == "run" and "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, mode, *args, **options)

    with monkeypatch.context() as patch:
        at_save(2, lambda: patch.setattr("builtins.open", refusing), patch)
        result = cli("train", images, *RUN, "run")
    failed(result, "Read-only file system; make it writable", "--resume-checkpoint")
    goes_on(cli, "run")


def test_a_folder_that_goes_away(cli, images, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_save(3, lambda: shutil.move("run", "gone"), patch)
        failed(cli("train", images, *RUN, "run"), "the folder is gone")
    assert not os.path.exists("run")
    shutil.move("gone", "run")
    goes_on(cli, "run")


def test_no_room_for_a_line_of_metrics(cli, images, whole, small_disk, monkeypatch):
    """Between two checkpoints."""
    filler = small_disk / "filler"

    def fill():
        with open(filler, "wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(file.fileno(), bytes(4096))
        with open(small_disk / "run/metrics.jsonl", "a") as file, pytest.raises(OSError, match="No space left"):
            while True:  # the rest of its last block
                os.write(file.fileno(), b" ")

    original = train.save
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda *args: (original(*args), args[4] == 6 and fill()))
        failed(cli("train", images, *RUN, small_disk / "run"), "No space left on device", "make room", "--resume-ch")
    filler.unlink()
    goes_on(cli, small_disk / "run")
