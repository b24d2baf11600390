"""`scan`: what it says, writes and refuses, and that `train` and `extract` take its list."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from data2vec_vision import scan as scan_module
from data2vec_vision.scan import scan
from data2vec_vision.sources import open_source


@pytest.fixture
def mixed(images):
    """24 images, a copy, a near duplicate, a blank one, three that cannot be read, and two files of other kinds."""
    first = sorted(images.rglob("*.png"))[0]
    Image.open(first).resize((200, 200), Image.Resampling.BICUBIC).save(images / "large.png")
    shutil.copy(images / "large.png", images / "zz copy.png")
    Image.open(images / "large.png").resize((100, 100)).save(images / "small.jpg", quality=80)
    Image.new("RGB", (20, 20), "white").save(images / "white.png")
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("no image")
    (images / "cut.png").write_bytes((images / "large.png").read_bytes()[:3000])
    (images / "labels.csv").write_text("x")
    (images / "notes").write_text("x")
    return images


def test_the_table_says_what_is_there_and_ends_with_the_command_to_train(cli, mixed):
    code, out, err = cli("scan", mixed, "--workers", 0)
    assert code == 0 and err == "", err
    rows = {line[:11].strip(): line[12:] for line in out.splitlines() if line[:11].strip()}
    assert rows["Images"].startswith(f"31 in {mixed}, ")
    assert rows["Unreadable"] == "3 (9.7 %)" and "empty.png: cannot identify image file: it is empty" in out
    assert "2 files beside them that are no images: " in out and ".csv 1" in out and "no suffix 1" in out
    assert rows["Duplicates"] == "1 exact copy of 1 file" and "large.png = zz copy.png" in out
    assert "class0/000.png ~ large.png ~ 1 more" in out and rows["Blank"] == "1 image of a single colour: white.png"
    assert rows["Formats"] == "JPEG 19, PNG 9" and rows["Modes"] == "all RGB"
    assert "ImageNet's: 0.485 0.456 0.406" in rows["Mean"] and "to 200 x 200" in rows["Sizes"]
    assert "leaves out 3 unreadable and 1 copies" in rows["To clean"]
    assert f"scan {mixed} --picture alike.png" in rows["To judge"]
    assert out.splitlines()[-1].startswith("To train    python -m data2vec_vision train ")
    assert rows["To train"].endswith("--image-size 20 --patch-size 4 --hidden-dim 192 --n-encoders 6 --batch-size 16")
    assert "--image-size 20: the median short side is 20 px" in rows["Suggested"]


def test_json_has_everything(cli, mixed):
    code, _, err = cli("scan", mixed, "--json", "found.json", "--workers", 0)
    assert code == 0, err
    found = json.loads(Path("found.json").read_text())
    assert (found["images"], found["readable"]) == (31, 28)
    assert [bad["path"] for bad in found["unreadable"]] == ["cut.png", "empty.png", "text.jpg"]
    assert all(bad["reason"] for bad in found["unreadable"])
    assert found["duplicates"] == [["large.png", "zz copy.png"]] and found["blank"] == ["white.png"]
    alike = {group["first"]: [other["path"] for other in group["others"]] for group in found["near_duplicates"]}
    assert sum(alike.values(), [*alike]).count("zz copy.png") == 0
    assert any({"large.png", "small.jpg"} <= {first, *others} for first, others in alike.items())
    pixels = [np.asarray(Image.open(p).convert("RGB")).reshape(-1, 3) / 255 for p in sorted(mixed.rglob("*.*"))
              if p.name not in ("cut.png", "empty.png", "text.jpg", "labels.csv")]  # fmt: skip
    np.testing.assert_allclose(found["mean"], np.mean([p.mean(axis=0) for p in pixels], axis=0), atol=1e-5)
    assert found["sizes"]["largest"] == [200, 200] and found["sizes"]["square"] == pytest.approx(8 / 28, abs=0.2)
    assert found["skipped"] == {".csv": 1, "": 1} and found["formats"] == {"JPEG": 19, "PNG": 9}
    assert found["suggested"]["image-size"] == 20 and found["train"].endswith("--batch-size 16")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(mixed, workers):
    alone, many = scan(str(mixed), workers=0), scan(str(mixed), workers=workers)
    np.testing.assert_array_equal(alone.survey.records, many.survey.records)
    np.testing.assert_allclose(alone.survey.moments, many.survey.moments, rtol=1e-12)
    assert alone.survey.bad == many.survey.bad and alone.survey.formats == many.survey.formats


def lines(path="clean.txt"):
    return Path(path).read_text().splitlines()


def test_the_list_is_what_is_clean_and_says_what_it_leaves_out(cli, mixed):
    everything = sorted(str(p.relative_to(mixed.parent)) for p in mixed.rglob("*.*") if p.suffix != ".csv")
    bad = [f"images/{name}" for name in ("cut.png", "empty.png", "text.jpg")]
    code, out, err = cli("scan", mixed, "--write-list", "clean.txt", "--workers", 0)
    assert code == 0 and "27 of 31 images, without 3 unreadable, 1 exact copies" in out, err
    assert "near duplicates are in it; --drop-near-duplicates leaves them out" in out
    assert lines() == [name for name in everything if name not in (*bad, "images/zz copy.png")]
    assert "train clean.txt --image-size" in out.splitlines()[-1] and "To clean" not in out
    cli("scan", mixed, "--write-list", "clean.txt", "--keep-duplicates", "--workers", 0)
    assert lines() == [name for name in everything if name not in bad]
    _, out, _ = cli("scan", mixed, "--write-list", "clean.txt", "--drop-near-duplicates", "--workers", 0)
    assert "near duplicates\n" in out and not {"images/small.jpg", "images/zz copy.png"} & set(lines())
    assert "images/large.png" in lines() or "near" in out


def test_train_and_extract_take_the_list_and_a_scan_of_it_is_clean(cli, mixed):
    cli("scan", mixed, "--write-list", "clean.txt", "--workers", 0)
    code, out, err = cli("train", "clean.txt", *TINY, "--epochs", 1, "--checkpoint-out-dir", mixed / "run")
    assert code == 0 and "27 in clean.txt" in out and "could not be read" not in out, err  # also into that folder
    code, _, err = cli("extract", mixed / "run" / "student_0.pt", "clean.txt", "--output", "f.npz")
    assert code == 0 and np.load("f.npz")["paths"].tolist() == lines(), err
    code, _, err = cli("train", "clean.txt", *TINY, "--epochs", 1, "--dry-run")
    assert code == 0 and Path("runs/clean-data2vec/views.png").exists(), err
    code, out, err = cli("train", "--resume-checkpoint", mixed / "run" / "checkpoint_0.pt", "--epochs", 2)
    assert code == 0 and "Resumed" in out, err
    _, out, _ = cli("scan", "clean.txt", "--workers", 0)
    assert "27 in clean.txt" in out and "Unreadable  none\nDuplicates  none\n" in out and "To clean" not in out


def test_the_command_it_ends_with_runs(cli, mixed):
    _, out, _ = cli("scan", mixed, "--write-list", "a clean list.txt", "--workers", 0)
    words = shlex.split(out.splitlines()[-1].removeprefix("To train"))
    code, out, err = cli(*words[3:], "--dry-run", "--workers", 0)
    assert code == 0 and "27 in a clean list.txt" in out, err


def test_images_that_are_not_below_the_list_are_listed_by_absolute_paths(cli, images):
    Path("lists").mkdir()
    cli("scan", images, "--write-list", "lists/clean.txt", "--workers", 0)
    assert all(os.path.isabs(line) for line in lines("lists/clean.txt")) and len(lines("lists/clean.txt")) == 24
    code, _, err = cli("scan", "lists/clean.txt", "--write-list", images / "clean.txt", "--workers", 0)
    assert code == 0 and all(line.startswith("class") for line in lines(images / "clean.txt")), err


def test_a_name_with_a_line_break_is_refused_before_the_work(refused, images, monkeypatch):
    sorted(images.rglob("*.png"))[0].rename(images / "two\nlines.png")
    monkeypatch.setattr(scan_module, "look_at_all", None)
    line = refused("scan", images, "--write-list", "clean.txt")
    assert "'two\\nlines.png' has a line break, which a list cannot hold; rename that file" in line


def test_when_training_would_end_on_the_folder_the_command_is_for_a_clean_list(cli, images):
    for path in sorted(images.rglob("*.png"))[:3]:
        path.write_text("no image")
    _, out, _ = cli("scan", images, "--workers", 0)
    assert f"scan {images} --write-list clean.txt   # leaves out 3 unreadable" in out
    assert "train clean.txt --image-size" in out.splitlines()[-1]


def test_the_picture_has_a_pair_of_each_group(cli, mixed):
    code, out, err = cli("scan", mixed, "--picture", "pairs.png", "--workers", 0)
    assert code == 0 and "groups of duplicates, a pair of each" in out and "To judge" not in out, err
    page = np.asarray(Image.open("pairs.png"))
    assert page.shape[1] > 400 and (page == scan_module.COPY).all(axis=2).any()
    assert (page == scan_module.ALIKE).all(axis=2).any()


def test_no_picture_without_duplicates(cli, tmp_path):
    (tmp_path / "few").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / "few" / "a.png")
    code, out, _ = cli("scan", "few", "--picture", "pairs.png", "--workers", 0)
    assert code == 0 and "no duplicates to draw, so pairs.png was not written" in out
    assert not Path("pairs.png").exists()


def test_what_cannot_be_used_is_refused(refused, images):
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    Path("folder.json").mkdir()
    for arguments, message in (
        (["nowhere"], "there is no folder nowhere"),
        (["empty"], "it is empty"),
        (["bad"], "none of the 1 images in bad can be read; the first: cannot identify image file"),
        (["none.txt"], "the list none.txt cannot be read: No such file or directory"),
        ([images, "--json", "found.txt"], "must end in .json"),
        ([images, "--json", "folder.json"], "is a folder; give a file"),
        ([images, "--json", "none/found.json"], "there is no folder none; make it first"),
        ([images, "--write-list", "clean.csv"], "must end in .txt or .list"),
        ([images, "--picture", images / "a.png"], "would become one of the images"),
        ([images, "--picture", "a.jpg"], "must end in .png"),
        ([images, "--keep-duplicates"], "add --write-list FILE"),
        ([images, "--drop-near-duplicates"], "add --write-list FILE"),
        ([images, "--write-list", "c.txt", "--keep-duplicates", "--drop-near-duplicates"], "contradict each other"),
    ):
        assert message in refused("scan", *arguments, "--workers", 0)
    assert not list(Path().glob("*.txt"))


def test_a_failing_disk_leaves_the_old_file(cli, images, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    Path("found.json").write_text("precious")
    monkeypatch.setattr(scan_module, "to_json", fail)
    code, _, err = cli("scan", images, "--json", "found.json", "--workers", 0)
    assert code == 1 and "No space left on device; make room or choose another place" in err
    assert Path("found.json").read_text() == "precious" and not list(Path().glob(".found*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_scan_ends_at_once_and_writes_nothing(cli, images, monkeypatch, number, code):
    original, looked_at = scan_module.Chunks.__getitem__, []

    def signalled(self, chunk):
        if not looked_at:
            os.kill(os.getpid(), number)
        looked_at.append(chunk)
        return original(self, chunk)

    monkeypatch.setattr(scan_module.Chunks, "__getitem__", signalled)
    assert len(scan_module.Chunks(open_source(images))) == 2
    result, _, err = cli("scan", images, "--json", "found.json", "--workers", 0)
    assert result == code and err == "Stopped; nothing was written\n" and looked_at == [0]
    assert not list(Path().glob("*.json")) and not list(Path().glob(".found*"))


def test_a_worker_that_dies_ends_the_scan_in_words(cli, images, monkeypatch):
    def die(self, number):
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(scan_module.Chunks, "__getitem__", die)
    code, _, err = cli("scan", images, "--workers", 1)
    assert code == 1 and "a process that reads images was killed, for want of memory perhaps; try --workers 0" in err
