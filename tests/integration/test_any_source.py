"""Every kind of input through the command line: the same run, the same features, exact resume, one line for what is wrong."""

import json
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, metrics, same_state
from PIL import Image
from test_resume import signal_after, untimed

from data2vec_vision.config import TrainConfig, from_json, inputs_of, name_of, to_json
from data2vec_vision.plan import prepare


@pytest.fixture
def shards(images):
    """The 24 images in three tars, with files beside them that are no images."""
    Path("shards").mkdir()
    files = sorted(path for path in images.rglob("*") if path.is_file())
    for number in range(3):
        with tarfile.open(f"shards/{number:03}.tar", "w") as archive:
            for path in files[number::3]:
                archive.add(path, path.relative_to(images))
            archive.add(__file__, "notes.json")
    return Path("shards")


@pytest.fixture
def zipped(images):
    with zipfile.ZipFile("images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in images.rglob("*.*"):
            archive.write(path, f"./{path.relative_to(images)}")
    return Path("images.zip")


RUN = [*TINY, "--epochs", 2, "--dropout", 0.1]


def test_a_folder_and_a_zip_of_it_train_alike(cli, images, zipped):
    assert cli("train", images, *RUN, "--checkpoint-out-dir", "a")[0] == 0
    code, out, err = cli("train", zipped, *RUN, "--workers", 2, "--checkpoint-out-dir", "b")
    assert code == 0 and "24 in images.zip (.jpg .png .jpeg)" in out, err
    assert same_state("a/checkpoint_1.pt", "b/checkpoint_1.pt")


def test_a_run_on_shards_stopped_in_the_middle_continues_bit_for_bit(cli, shards):
    assert cli("train", "shards/*.tar", *RUN, "--checkpoint-out-dir", "whole")[0] == 0
    with signal_after(4, signal.SIGTERM):
        code, _, err = cli("train", "shards/*.tar", *RUN, "--workers", 2, "--checkpoint-out-dir", "stopped")
    assert code == 143, err
    shutil.rmtree(".cache")
    code, out, err = cli("train", "--resume-checkpoint", "stopped/checkpoint_last.pt", "--workers", 2)
    assert code == 0 and "after step 4 of 12" in out, err
    assert same_state("whole/checkpoint_1.pt", "stopped/checkpoint_1.pt")
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))
    with tarfile.open("shards/000.tar", "a") as archive:
        archive.add("shards/../images/class0/000.png", "new.png")
    code, _, err = cli("train", "--resume-checkpoint", "stopped/checkpoint_last.pt", "--epochs", 9)
    assert code == 2 and "shards/*.tar has changed since the checkpoint: 24 images then, 25 now" in err


def test_several_inputs_are_kept_by_the_configuration_and_resumed(cli, images, zipped):
    code, out, err = cli("train", "images.zip", "images/class0", *RUN, "--save-every", 1)
    assert code == 0 and "32 in images.zip, images/class0" in out, err
    assert "extract runs/images-and-1-more-data2vec/student_1.pt images.zip images/class0 --output" in out
    folder = Path("runs/images-and-1-more-data2vec")
    assert json.loads((folder / "config.json").read_text())["input_path"] == ["images.zip", "images/class0"]
    code, out, err = cli("train", "--config", folder / "config.json", "--checkpoint-out-dir", "again")
    assert code == 0, err
    assert same_state(folder / "checkpoint_1.pt", "again/checkpoint_1.pt")
    code, out, err = cli(
        "train", "images/class0", "images.zip", "--resume-checkpoint", "again/checkpoint_1.pt", "--epochs", 3
    )
    assert code == 0 and "after step 16 of 24" in out, err
    assert cli("report", folder)[0] == 0
    assert "train images.zip images/class0 --image-size" in (folder / "report.html").read_text()


def test_a_single_input_is_a_string_as_in_files_from_before(images):
    config = TrainConfig(input_path=("a", "b"))
    assert TrainConfig(**from_json(json.loads(to_json(config)), "x")) == config
    assert json.loads(to_json(TrainConfig(input_path="a")))["input_path"] == "a"
    assert from_json({"input_path": ["a"]}, "x") == {"input_path": "a"} == from_json({"input_path": "a"}, "x")
    assert inputs_of("a") == inputs_of(["a"]) == ("a",) and inputs_of("") == inputs_of(()) == TrainConfig().inputs == ()
    assert len(prepare(TrainConfig((str(images / "class0"), str(images / "class1")), device="cpu")).source) == 16
    for given, name in ((("x/photos",), "photos"), (("x/s/*.tar",), "s"), (("x/s-{0..9}.tar", "y"), "x-and-1-more")):
        assert name_of(given) == name


def test_features_of_all_kinds_line_up(cli, images, zipped, shards):
    assert cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "a")[0] == 0
    found = {}
    for name, given in (
        ("folder", ["images"]),
        ("zip", ["images.zip"]),
        ("shards", ["shards"]),
        ("both", ["images", "images.zip"]),
    ):
        code, _, err = cli("extract", "a/student_0.pt", *given, "--output", f"{name}.npz", "--workers", 2)
        assert code == 0, err
        file = np.load(f"{name}.npz")
        found[name] = dict(zip(file["paths"].tolist(), file["features"]))
    assert list(found["folder"]) == list(found["zip"])
    for name, row in found["folder"].items():
        assert np.array_equal(row, found["zip"][name])
        for other in (f"images/{name}", f"images.zip/{name}"):
            np.testing.assert_allclose(found["both"][other], row, rtol=1e-4, atol=1e-5)
    assert {name.split("/", 1)[1] for name in found["shards"]} == set(found["folder"]) and len(found["shards"]) == 24


def test_class_folders_teach_inside_archives(cli, images, zipped, shards):
    assert cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "a")[0] == 0
    with zipfile.ZipFile("deep.zip", "w") as archive:
        for path in images.rglob("*.*"):
            archive.write(path, f"all/{path.relative_to(images)}")
    accuracy = {}
    for given in (images, zipped, "deep.zip", shards, "shards/*.tar"):
        code, _, err = cli(
            "evaluate", "a/student_0.pt", given, "--no-floors", "--json", "e.json", "--picture", "e.png", "--k", 3
        )
        assert code == 0, err
        report = json.loads(Path("e.json").read_text())
        assert report["images"]["train"] == 18 and len(report["classes"]) == 3, report["classes"]
        accuracy[str(given)] = report["results"]
    assert accuracy[str(images)] == accuracy["images.zip"] == accuracy["deep.zip"]
    Path("labels.csv").write_text("path,label\n" + "".join(
        f"{shard}/{path.relative_to(images)},{n % 2}\n" for n, path in enumerate(sorted(images.rglob("*.*"))) for shard in
        ("000.tar", "001.tar", "002.tar")))  # fmt: skip
    code, out, err = cli("evaluate", "a/student_0.pt", shards, "--labels", "labels.csv", "--no-floors", "--k", 3)
    assert code == 0 and "48 rows of labels.csv that name no image passed over" in out, err


def test_scan_looks_into_archives_and_says_that_a_list_cannot_name_their_images(cli, refused, images, zipped):
    (images / "class0" / "bad.png").write_text("x")
    shutil.copy(images / "class0" / "000.png", images / "class0" / "copy.png")
    code, out, err = cli("scan", zipped, images, "--workers", 0, "--json", "a.json")
    assert code == 0 and "50 in images.zip, " in out and "train images.zip " in out and "--write-list" not in out, err
    found = json.loads(Path("a.json").read_text())
    assert (
        found["input"] == ["images.zip", str(images)]
        and len(found["duplicates"]) == 24
        and len(found["unreadable"]) == 1
    )
    assert "a list names files" in refused("scan", zipped, "--write-list", "list.txt")
    code, out, err = cli("scan", "images/class0", "images/class1", "--workers", 0, "--write-list", "list.txt")
    assert code == 0 and len(Path("list.txt").read_text().splitlines()) == 16, err
    code, out, _ = cli("scan", "list.txt", "--workers", 0)
    assert code == 0 and "Unreadable  none" in out


def test_what_cannot_be_used_is_one_line(refused, images, zipped, shards):
    Path("cut.zip").write_bytes(zipped.read_bytes()[:-100])
    Path("x.tar.gz").write_bytes(b"")
    for given, message in ((["cut.zip"], "damaged or cut short"), (["x.tar.gz"], "gunzip x.tar.gz makes x.tar"),
                           (["images", "images/class0"], "one lies in the other"), (["s-{0..3}.tar"], "there is no file s-0.tar"),
                           (["images", "nowhere"], "there is no folder nowhere")):  # fmt: skip
        assert message in refused("train", *given, *TINY)
    assert "inside the folder of the images" in refused("train", "shards", *TINY, "--checkpoint-out-dir", "shards/run")
    refused("extract", "none.pt", "--output", "x.npz")


def test_damaged_members_are_listed_and_do_not_end_a_run(cli, images):
    with zipfile.ZipFile("p.zip", "w") as archive:
        for path in sorted(images.rglob("*.*")):
            archive.write(path, path.name)
        archive.writestr("z.png", b"no image")
    code, out, err = cli("train", "p.zip", *TINY, "--epochs", 1, "--checkpoint-out-dir", "a", "--workers", 2)
    assert code == 0 and "1 image could not be read" in out, err
    assert Path("a/bad_files.txt").read_text().startswith("z.png\t")


def test_the_picture_of_an_archive(cli, zipped):
    """--dry-run draws views of its images."""
    assert cli("train", zipped, *TINY, "--dry-run")[0] == 0
    assert Image.open(next(Path("runs").rglob("*.png"))).width > 10
