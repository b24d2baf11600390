"""Rows that a killed run left: only those that were surely written are gone on with, and only by the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data2vec_vision.errors import InputError
from data2vec_vision.partial import NPY_HEADER, Partial

SETTINGS = {"weights": "abc", "--pool": "mean", "--layer": None}
TARGET = Path("f.npy")


def rows(first, count=2):
    return np.arange(3 * first, 3 * (first + count), dtype=np.float32).reshape(count, 3)


def begun(**settings):
    return Partial(TARGET, [3], SETTINGS | settings)


def left_behind():
    """Four rows of five images, as a run that ended leaves them."""
    partial = begun()
    with pytest.raises(RuntimeError), partial.opened(resume=False):
        partial.add(rows(0), {})
        partial.add(rows(2), {4: "no image"})
        raise RuntimeError
    return partial


def test_rows_are_gone_on_with():
    left_behind()
    partial = begun()
    with partial.opened(resume=True):
        assert (partial.progress.images, partial.progress.rows, partial.progress.bad) == (5, 4, {4: "no image"})
        partial.add(rows(4, 1), {})
        partial.finish()
        partial.complete(rename=True)
    np.testing.assert_array_equal(np.load(TARGET), rows(0, 5))
    assert not partial.path.exists() and not partial.notes.exists()


def test_rows_that_were_never_noted_are_cut_off():
    """A kill between a row and its note, in the middle of a row too."""
    path = left_behind().path
    with open(path, "ab") as file:
        file.write(b"half a row")
    partial = begun()
    with partial.opened(resume=True):
        assert os.path.getsize(path) == NPY_HEADER + 4 * 4 * 3
        partial.add(rows(4), {})
        partial.finish()
        partial.complete(rename=True)
    np.testing.assert_array_equal(np.load(TARGET), rows(0, 6))


def test_what_is_noted_is_on_the_disk(monkeypatch):
    """The note comes after the rows, and after the disk has them."""
    partial, noted, synced = begun(), [], []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    replace = os.replace

    def note(source, name):
        noted.append(json.loads(Path(source).read_text())["rows"])
        assert NPY_HEADER + 12 * noted[-1] in synced
        replace(source, name)

    monkeypatch.setattr("os.replace", note)
    with partial.opened(resume=False):
        partial.add(rows(0), {})
        partial.add(rows(2), {})
        assert noted == [2]  # the first rows at once, the next after SAVE_SECONDS
    assert noted == [2, 4]


def test_without_resume_it_starts_again(capfd):
    left_behind()
    partial = begun()
    with partial.opened(resume=False):
        assert "stopped after 5 images" in capfd.readouterr().out and partial.progress.rows == 0
        assert os.path.getsize(partial.path) == NPY_HEADER


def test_other_settings_are_refused_by_name_and_lose_nothing():
    left_behind()
    for settings, message in (
        ({"--pool": "cls"}, "begun with --pool mean, and this command has --pool cls; give the same"),
        ({"--layer": 3}, "begun with no --layer, and this command has --layer 3"),
        ({"weights": "xyz"}, "begun with other weights; give the same, or leave out --resume to start again"),
    ):
        with pytest.raises(InputError, match=message), begun(**settings).opened(resume=True):
            pass
    with begun().opened(resume=True):
        pass


@pytest.mark.parametrize("damage", ["", "[]", '{"rows": 3}', '{"settings": {}, "rows": 9, "images": 7}', "\udcff"])
def test_damaged_notes_are_told_and_do_not_hinder_a_new_start(damage):
    partial = left_behind()
    partial.notes.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="f.npy.partial.json is damaged: .*leave out --resume"):
        begun().opened(resume=True).__enter__()
    with begun().opened(resume=False):
        pass


def test_rows_that_went_missing_are_told():
    partial = left_behind()
    os.truncate(partial.path, NPY_HEADER + 40)
    with pytest.raises(InputError, match="shorter than it says"), begun().opened(resume=True):
        pass


def test_nothing_is_kept_of_a_run_without_rows():
    partial = begun()
    with partial.opened(resume=False):
        partial.add(np.empty((0, 3), np.float32), {0: "no image"})
    assert not partial.path.exists() and not partial.notes.exists()


def test_rows_that_are_not_finite_are_counted_and_the_first_image_named():
    partial = begun()
    with partial.opened(resume=False):
        partial.add(rows(0), {1: "no image"})
        spoilt = rows(2, 3)
        spoilt[1, 2], spoilt[2, 0] = np.nan, np.inf
        partial.add(spoilt, {3: "no image", 4: "no image"})  # so that the rows are of images 5, 6, 7
        assert (partial.progress.not_finite, partial.progress.first_not_finite) == (2, 6)
    with begun().opened(resume=True):
        pass


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_two_processes_do_not_write_one_output():
    left_behind()
    code = "import fcntl; f = open('.f.npy.partial', 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "locked\n"
    for resume in (False, True):
        with pytest.raises(InputError, match="another process is writing f.npy; wait for it"):
            begun().opened(resume).__enter__()
    other.communicate("done\n")
    partial = begun()
    with partial.opened(resume=True):
        assert partial.progress.rows == 4


def test_what_a_killed_write_left_is_cleared_away():
    for name in (".f.npy.123.tmp", ".f.npy.x.tmp", ".g.npy.123.tmp", ".f.npy.partial.json.9.tmp"):
        Path(name).touch()
    with begun().opened(resume=False):
        pass
    assert [path.name for path in Path().glob(".*.tmp")] == [".g.npy.123.tmp"]


def test_a_full_disk_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(
        InputError, match="the features take 12 kB, and 24 kB while they are written, but . has only 20"
    ):
        begun().check_room(1000, room=1)
    begun().check_room(1000, room=0)
