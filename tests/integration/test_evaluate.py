"""`evaluate`: figures that scikit-learn gives too, the files, the words, and what is refused."""

import contextlib
import csv
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, start
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import data2vec_vision as d2v
from data2vec_vision import evaluate as module
from data2vec_vision.evaluate import evaluate


@pytest.fixture
def student(cli, images):
    cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "run")
    return "run/student_0.pt"


@pytest.fixture
def photos():
    """Train and test folders of two classes that can be told apart, but not always, and a third that is noise."""
    random = np.random.default_rng(1)
    for part, count in (("train", 20), ("test", 8)):
        for name, brightness in (("dark", 70), ("light", 150), ("noise", None)):
            below = Path("photos", part, name)
            below.mkdir(parents=True)
            for n in range(count):
                low, high = (0, 256) if brightness is None else (brightness - 60, brightness + 60)
                pixels = random.integers(low, high, (3, 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((18, 18), Image.Resampling.BICUBIC).save(below / f"{n}.png")
    return Path("photos/train"), Path("photos/test")


FAST = ["--workers", 0, "--k", 5]


def features(cli, student, folder):
    assert cli("extract", student, folder, "--output", "f.npz", "--workers", 0)[0] == 0
    with np.load("f.npz") as file:
        return file["features"], [path.split("/")[0] for path in file["paths"]]


def test_figures_are_scikit_learns_and_the_terminal_says_what_the_file_holds(cli, student, photos):
    code, out, err = cli("evaluate", student, photos[0], "--test-path", photos[1], *FAST)
    assert code == 0, err
    report = json.loads(Path("run/student_0.evaluation.json").read_text())
    trained = report["results"]["trained encoder"]
    (x, y), (q, t) = (features(cli, student, part) for part in photos)
    knn = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(x, y)
    assert trained["knn"] == pytest.approx(100 * np.mean(knn.predict(q) == np.array(t)), abs=0.1)
    scaler = StandardScaler().fit(x.astype(float))
    linear = LogisticRegression(C=1 / (trained["penalty"] * len(x)), tol=1e-8, max_iter=10_000)
    right = linear.fit(scaler.transform(x), y).predict(scaler.transform(q)) == np.array(t)
    assert trained["linear"] == pytest.approx(100 * np.mean(right), abs=0.1)
    assert report["images"] == {"train": 60, "test": 24, "unreadable": {}} and report["classes"] == [
        "dark",
        "light",
        "noise",
    ]
    assert (
        report["checkpoint"] == student
        and report["method"] == "data2vec"
        and (report["epoch"], report["step"]) == (0, 6)
    )
    assert report["chance"] == pytest.approx(100 / 3) and set(report["versions"]) >= {"torch", "timm"}
    confusion = np.array(report["confusion"])
    assert confusion.sum(axis=1).tolist() == [8, 8, 8] and np.trace(confusion) / 0.24 == pytest.approx(
        trained["linear"]
    )
    for row in report["per_class"]:
        assert f"  {row['class']:<5}  {row['linear']:5.1f}  of 8" in out
    for name, values in report["results"].items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {name}  "))
        shown = [f"{values['knn']:.1f}", f"{values['linear']:.1f}"]
        for few in values["few_shot"].values():
            shown += [f"{few['mean']:.1f}", "±", f"{few['sd']:.1f}"]
        assert line.split()[len(name.split()) :] == shown
    assert list(report["results"]) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert " ".join(out.split()).count(report["verdict"]) == 1
    gain = trained["knn"] - report["results"]["untrained encoder"]["knn"]
    assert report["gain"]["knn"]["points"] == pytest.approx(gain, abs=1e-4)
    assert "Wrote run/student_0.evaluation.json and run/student_0.confusion.png." in out
    assert Image.open("run/student_0.confusion.png").size[0] > 3 * 34


def test_it_is_the_same_again_from_python_and_with_other_batches_and_workers(cli, student, photos):
    first = evaluate(student, str(photos[0]), k=5, workers=0, floors=False)
    assert first == json.loads(Path("run/student_0.evaluation.json").read_text())
    again = evaluate(student, str(photos[0]), k=5, workers=2, batch_size=7, floors=False)
    assert again["results"] == first["results"] and again["confusion"] == first["confusion"]
    other = evaluate(student, str(photos[0]), k=5, workers=0, floors=False, seed=1)
    assert other["results"] != first["results"]
    assert list(first["results"]) == ["trained encoder"] and first["verdict"] == ""
    assert (first["images"]["train"], first["images"]["test"]) == (48, 12)


def test_the_untrained_encoder_is_the_one_that_training_began_from(cli, images, student, photos):
    """Of a run whose rate is zero the two are the same, and so are their figures."""
    cli(
        "train", images, *TINY, "--epochs", 1, "--max-lr", "1e-30", "--checkpoint-out-dir", "still", "--weight-decay", 0
    )
    report = evaluate("still/student_0.pt", str(photos[0]), test_path=str(photos[1]), k=5, workers=0)
    trained, untrained = (report["results"][f"{name} encoder"] for name in ("trained", "untrained"))
    assert trained == untrained and report["gain"]["knn"]["points"] == 0.0
    assert report["verdict"].endswith(
        "it is not better than the untrained encoder, as far as these test images can tell."
    )
    assert "those that the run began from" in report["protocol"]["untrained encoder"]


def test_labels_from_a_csv_and_what_is_left_out_is_said(cli, student, photos):
    flat = Path("flat folder")
    flat.mkdir()
    with open("labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for n, path in enumerate(sorted(photos[0].rglob("*.png"))):
            name = f"bild {n} ü.png"
            shutil.copy(path, flat / name)
            rows.writerow([name if n % 2 else str((flat / name).resolve()), path.parent.name])
        rows.writerow(["gone.png", "dark"])
    shutil.copy(flat / "bild 0 ü.png", flat / "unlabelled.png")
    (flat / "bild 3 ü.png").write_text("no image")
    code, out, err = cli(
        "evaluate", student, flat, "--labels", "labels.csv", *FAST, "--json", "a.json", "--picture", "a.png"
    )
    assert code == 0, err
    report = json.loads(Path("a.json").read_text())
    assert report["images"]["train"] + report["images"]["test"] == 59 and report["classes"] == [
        "dark",
        "light",
        "noise",
    ]
    for words in (
        "1 image in flat folder without a label left out.",
        "1 row of labels.csv that name no image passed over.",
        "1 image that cannot be read left out, such as",
        "the test images are 20 % of each class, drawn under seed 0.",
    ):
        assert words in out
    assert [Path(path).name for path in report["images"]["unreadable"]] == ["bild 3 ü.png"]
    assert not Path("run/student_0.evaluation.json").exists()


def test_shots_that_a_class_has_no_images_for_are_left_out_and_that_is_said(cli, student, photos):
    for path in sorted(photos[0].glob("dark/*.png"))[7:]:
        path.unlink()
    code, out, err = cli("evaluate", student, photos[0], "--test-path", photos[1], *FAST, "--no-floors")
    assert code == 0, err
    report = json.loads(Path("run/student_0.evaluation.json").read_text())
    assert list(report["results"]["trained encoder"]["few_shot"]) == ["1", "5"]
    assert "10-shot left out: the smallest class has 7 training images." in out


def test_teachers_and_pools_differ_and_have_files_of_their_own(cli, student, photos):
    base = ["evaluate", "run/checkpoint_0.pt", photos[0], "--no-floors", *FAST]
    for options in ([], ["--encoder", "teacher"], ["--pool", "cls", "--json", "c.json", "--picture", "c.png"]):
        code, _, err = cli(*base, *options)
        assert code == 0, err
    files = ["run/checkpoint_0.evaluation.json", "run/checkpoint_0.teacher.evaluation.json", "c.json"]
    student, teacher, cls = (json.loads(Path(name).read_text()) for name in files)
    assert (student["pool"], teacher["encoder"], cls["pool"]) == ("mean", "teacher", "cls")
    assert Path("run/checkpoint_0.teacher.confusion.png").exists() and student["results"] != cls["results"]


def test_what_cannot_be_used_is_refused_before_any_work(refused, images, student, photos, monkeypatch):
    monkeypatch.setattr(module, "one_pass", None)  # no image is read
    Path("flat").mkdir()
    shutil.copy(next(photos[0].rglob("*.png")), "flat/a.png")
    shutil.copytree(photos[0] / "dark", "one/dark")
    Path("l.csv").write_text("path,label\nnowhere.png,cat\n")
    torch.save({"state_dict": {}}, "other.pt")
    Path("short.pt").write_bytes(Path(student).read_bytes()[:5000])
    broken = torch.load(student, weights_only=True)
    next(iter(broken["state_dict"].values())).fill_(float("nan"))
    torch.save(broken, "nan.pt")
    torch.save(broken | {"version": 99}, "new.pt")
    Path("folder.png").mkdir()
    for arguments, message in (
        (["none.pt", photos[0]], "there is no file none.pt"),
        (["run", photos[0]], "run is a folder; give one of the .pt files in it"),
        (["other.pt", photos[0]], "other.pt is no file of this tool"),
        (["short.pt", photos[0]], "short.pt cannot be read, it is damaged"),
        (["new.pt", photos[0]], "was written by a newer version"),
        (["nan.pt", photos[0]], "nan.pt is broken"),
        ([student, "nowhere"], "there is no folder nowhere"),
        ([student, "flat"], "have no labels: put each class into a folder of its own"),
        ([student, "one"], "all images in one are of one class, 'dark'"),
        ([student, "photos"], "are test and train, which are no classes"),
        ([student, photos[0], "--labels", "l.csv"], "none of the 1 paths in l.csv is an image"),
        ([student, photos[0], "--labels", "none.csv"], "there is no file none.csv"),
        ([student, photos[0], "--test-path", "one/dark"], "have no labels"),
        ([student, photos[0], "--test-pct", 1], "--test-pct 1 must be in (0, 1)"),
        ([student, photos[0], "--k", 49], "48 training images, fewer than --k 49; use --k 24 or less"),
        ([student, photos[0], "--encoder", "teacher", "--json", "none/a.json"], "there is no folder none"),
        ([student, photos[0], "--json", "flat"], "--json flat is a folder"),
        ([student, photos[0], "--picture", "folder.png"], "--picture folder.png is a folder"),
        ([student, photos[0], "--picture", "a.gif"], "must end in .png"),
        ([student, photos[0], "--json", "a.png", "--picture", "a.png"], "give two files"),
        ([student, photos[0], "--device", "gpu7"], "there is no device 'gpu7'"),
        ([student, photos[0], "--pool", "patch"], "Invalid value for '--pool'"),
    ):
        assert message in refused("evaluate", *arguments)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(refused, student, photos):
    os.chmod("run", 0o500)
    assert "say where to write with --json and --picture" in refused("evaluate", student, photos[0], *FAST)


def test_what_only_shows_with_the_images_read_is_refused_too(refused, student, photos, monkeypatch):
    original = module.feature_function

    def broken(*args):
        compute = original(*args)
        return lambda pixels: compute(pixels).clone().index_fill(0, torch.tensor([0]), float("nan"))

    monkeypatch.setattr(module, "feature_function", broken)
    line = refused("evaluate", student, photos[0], "--no-floors", *FAST, "--batch-size", 10)
    assert "the features of 7 of 60 images are not finite: run/student_0.pt is broken" in line
    for path in photos[0].glob("light/*.png"):
        path.write_text("x")
    monkeypatch.setattr(module, "feature_function", original)
    line = refused("evaluate", student, photos[0], "--test-path", photos[1], *FAST, "--k", 41)
    assert "40 training images, fewer than --k 41" in line
    for path in photos[0].glob("dark/*.png"):
        path.write_text("x")
    assert "training images in photos/train are of one class" in refused("evaluate", student, photos[0], *FAST)
    assert not list(Path("run").glob("*evaluation*")) and not list(Path("run").glob("*confusion*"))


def test_a_failed_write_leaves_the_old_files(cli, student, photos, monkeypatch):
    Path("run/student_0.confusion.png").write_text("precious")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    code, _, err = cli("evaluate", student, photos[0], "--no-floors", *FAST)
    assert code == 1 and "No space left on device; make room or write elsewhere" in err and len(err.splitlines()) == 1
    assert Path("run/student_0.confusion.png").read_text() == "precious" and not list(Path("run").glob(".student*"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")
def test_a_terminated_evaluation_leaves_nothing(student, photos):
    one = sorted(photos[0].rglob("*.png"))[0]
    for name in ("a", "b"):
        Path("many", name).mkdir(parents=True)
        for n in range(10_000):
            os.link(one, f"many/{name}/{n}.png")
    Path("tmp").mkdir()
    run = start("evaluate", student, "many", "--no-floors", "--workers", 1, TMPDIR=str(Path("tmp").resolve()))

    def has_begun():
        fds = Path(f"/proc/{run.pid}/fd")
        return any("tmp" in os.readlink(fd) and "deleted" in os.readlink(fd) for fd in fds.glob("*") if fd.is_symlink())

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if has_begun():
                break
        time.sleep(0.02)
    run.terminate()
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 143 and out.splitlines()[-1] == "Stopped; nothing was written", out
    assert not list(Path("run").glob("*evaluation*")) and not list(Path("tmp").iterdir())


def test_a_method_that_is_gone_and_a_file_of_ones_own(cli, photos, tiny_vit):
    d2v.save_encoder(d2v.MaskedVisionTransformer(tiny_vit()), "own.pt", "my_method.py")
    code, out, err = cli("evaluate", "own.pt", photos[0], *FAST)
    assert code == 0, err
    assert "by timm's initialisation, for the method my_method.py is no part of this package" in " ".join(out.split())


def test_many_classes_are_told_by_the_worst_and_the_pairs_most_confused(cli, student):
    random = np.random.default_rng(0)
    for n in range(14):
        Path(f"many/{n}").mkdir(parents=True)
        for m in range(6):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"many/{n}/{m}.png")
    code, out, err = cli("evaluate", student, "many", "--no-floors", *FAST)
    assert code == 0, err
    assert "The 10 worst classes, linear probe:" in out and "The 3 best:" in out and "Most often confused" in out
    report = json.loads(Path("run/student_0.evaluation.json").read_text())
    assert report["classes"][-1] == "13" and len(report["per_class"]) == 14


def test_what_the_command_reads_is_not_overwritten(refused, student, photos):
    Path("labels.csv").write_text("path,label\n")
    Path("labels.json").write_text("path,label\n")
    for options in (["--labels", "labels.json", "--json", "labels.json"],):
        assert "is a file that this command reads" in refused("evaluate", student, photos[0], *options)
    assert "must end in .json" in refused("evaluate", student, photos[0], "--json", student)
    assert Path("labels.json").read_text() == "path,label\n"


def test_lists_have_the_labels_of_their_folders(cli, refused, student, photos):
    for name, root in (("train.txt", photos[0]), ("test.txt", photos[1])):
        Path(name).write_text("".join(f"{path.resolve()}\n" for path in sorted(root.rglob("*.png"))))
    code, _, err = cli("evaluate", student, "train.txt", "--test-path", "test.txt", *FAST)
    assert code == 0, err
    lists = json.loads(Path("run/student_0.evaluation.json").read_text())
    cli("evaluate", student, photos[0], "--test-path", photos[1], *FAST)
    folders = json.loads(Path("run/student_0.evaluation.json").read_text())
    assert lists["results"] == folders["results"] and lists["classes"] == folders["classes"]
    assert "are training images of train.txt too" in refused(
        "evaluate", student, "train.txt", "--test-path", shutil.copy("train.txt", "again.txt"), *FAST
    )


def test_a_teacher_is_asked_of_a_checkpoint_only(refused, student, photos):
    for command in (["evaluate", student, photos[0]], ["extract", student, photos[0], "--output", "f.npz"]):
        assert "holds one encoder; --encoder teacher is for a checkpoint" in refused(*command, "--encoder", "teacher")
