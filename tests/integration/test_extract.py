"""`extract`: features in the order of the paths, whatever the workers and the batch, from every kind of file."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import data2vec_vision as d2v
from data2vec_vision import extract as extract_module
from data2vec_vision import partial, writers

FORMATS = list(writers.FORMATS)


@pytest.fixture
def student(cli, images):
    cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "run")
    return "run/student_0.pt"


def by_hand(images, path, which="student"):
    """Names and features by the public API, image by image."""
    encoder = d2v.load(path, which=which)
    names = sorted(str(p.relative_to(images)) for p in images.rglob("*.*"))
    with torch.no_grad():
        tokens = [encoder(encoder.transform(Image.open(images / n)).unsqueeze(0)).features[0] for n in names]
    return names, torch.stack(tokens)


def test_npz_holds_features_and_paths_in_sorted_order(cli, images, student):
    code, out, err = cli("extract", student, images, "--output", "f.npz")
    assert code == 0 and "features 24 x 32 (data2vec)" in out and 'numpy.load("f.npz")["features"]' in out, err
    names, tokens = by_hand(images, student)
    with np.load("f.npz", allow_pickle=False) as file:
        assert file["paths"].tolist() == names and file["features"].dtype == np.float32
        np.testing.assert_allclose(file["features"], tokens.mean(1).numpy(), rtol=1e-5, atol=1e-6)


def test_npy_holds_the_features_and_a_text_file_the_paths(cli, images, student):
    code, _, err = cli("extract", student, images, "--output", "f.npy")
    assert code == 0, err
    names, tokens = by_hand(images, student)
    np.testing.assert_allclose(np.load("f.npy", mmap_mode="r"), tokens.mean(1).numpy(), rtol=1e-5, atol=1e-6)
    assert Path("f.paths.txt").read_text().splitlines() == names


@pytest.mark.parametrize("options", [["--workers", 0], ["--workers", 2], ["--batch-size", 5], ["--batch-size", 1]])
def test_workers_and_batches_do_not_matter(cli, images, student, options):
    cli("extract", student, images, "--output", "f.npz", *options)
    _, tokens = by_hand(images, student)
    np.testing.assert_allclose(np.load("f.npz")["features"], tokens.mean(1).numpy(), rtol=1e-5, atol=1e-6)


def test_pools_layers_and_encoders(cli, images, student):
    encoder = d2v.load(student)
    pixels = torch.stack([encoder.transform(Image.open(images / n)) for n in by_hand(images, student)[0]])
    with torch.no_grad():
        encoded, hidden = encoder.encode(pixels), encoder(pixels).hidden_states
        prefix = [state[1] for state in encoder.vit.forward_intermediates(
            pixels, return_prefix_tokens=True, norm=False, intermediates_only=True)]  # fmt: skip
        teacher = d2v.load("run/checkpoint_0.pt", which="teacher").embed(pixels)
    for options, expected in (
        (["--pool", "cls"], encoded.prefix[:, 0]),
        (["--pool", "patch"], encoded.tokens),
        (["--pool", "grid"], encoded.tokens.reshape(24, 4, 4, 32)),
        (["--layer", 1], hidden[0].mean(1)),
        (["--layer", -1], hidden[1].mean(1)),
        (["--layer", -2, "--pool", "grid"], hidden[0].reshape(24, 4, 4, 32)),
        (["--layer", 1, "--pool", "cls"], prefix[0][:, 0]),
        (["--layer", 2, "--pool", "cls"], prefix[1][:, 0]),
        (["--layer", 2, "--pool", "patch"], hidden[1]),
    ):
        cli("extract", student, images, "--output", "f.npz", *options)
        np.testing.assert_allclose(np.load("f.npz")["features"], expected.numpy(), rtol=1e-4, atol=1e-5)
    for path in (["run/teacher_0.pt"], ["run/checkpoint_0.pt", "--encoder", "teacher"]):
        cli("extract", path[0], images, "--output", "f.npz", *path[1:])
        np.testing.assert_allclose(np.load("f.npz")["features"], teacher.numpy(), rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_left_out_and_listed_never_replaced(cli, images, student):
    names, tokens = by_hand(images, student)
    (images / names[7]).write_text("no image")
    (images / names[23]).write_bytes(b"")
    code, out, _ = cli("extract", student, images, "--output", "f.npz", "--batch-size", 4)
    assert code == 0 and "2 images could not be read and are left out; f.bad_files.txt lists them" in out
    kept = [i for i in range(24) if i not in (7, 23)]
    with np.load("f.npz") as file:
        assert file["paths"].tolist() == [names[i] for i in kept]
        np.testing.assert_allclose(file["features"], tokens[kept].mean(1).numpy(), rtol=1e-5, atol=1e-6)
    listed = Path("f.bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [names[7], names[23]] and all(
        line.split("\t")[1] for line in listed
    )


def test_paths_are_written_in_chunks(cli, images, student, monkeypatch):
    monkeypatch.setattr(writers, "CHUNK", 5)
    cli("extract", student, images, "--output", "f.npz")
    assert np.load("f.npz")["paths"].tolist() == by_hand(images, student)[0]


def test_memory_does_not_grow_with_the_number_of_images(student, images, monkeypatch):
    """Python's and numpy's peak for ten times the images grows by their names, not by their features of 1.8 MB.

    Torch's memory is not in that peak, so the feature tensors alive are counted.
    """
    alive, most, original = weakref.WeakSet(), [], extract_module.feature_function

    def feature_function(*args):
        compute = original(*args)

        def counted(pixels):
            features = compute(pixels)
            alive.add(features)
            most.append(len(alive))
            return features

        return counted

    monkeypatch.setattr(extract_module, "feature_function", feature_function)
    monkeypatch.setattr(writers, "BLOCK", 2**15)
    one = sorted(images.rglob("*.png"))[0]
    for folder, count in (("few", 96), ("many", 960)):
        Path(folder).mkdir()
        for n in range(count):
            os.link(one, f"{folder}/{n:04}.png")

    def peak(folder):
        tracemalloc.start()
        extract_module.extract(student, folder, "f.npz", workers=0, batch_size=4, pool="patch")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak("few")
    assert peak("many") < peak("few") + 200_000
    assert len(most) > 240 and max(most) <= 2


def kept():
    """What an extraction to f.* has left beside its output."""
    return sorted(path.name for path in Path().glob(".f*"))


def interrupted(monkeypatch, act, at=3):
    """Before the feature function computes its batch number `at`, `act` is called, once; returns the batches' sizes."""
    sizes, original = [], extract_module.feature_function

    def feature_function(*args):
        compute = original(*args)

        def counted(pixels):
            sizes.append(len(pixels))
            if len(sizes) == at:
                act()
            return compute(pixels)

        return counted

    monkeypatch.setattr(extract_module, "feature_function", feature_function)
    return sizes


def full_disk(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_resumed_extraction_writes_the_bytes_of_one_that_was_never_stopped(cli, images, student, monkeypatch, suffix):
    command = ["extract", student, images, "--output", f"f{suffix}", "--batch-size", 5, "--workers", 0]
    names = by_hand(images, student)[0]
    (images / names[7]).write_text("no image")
    assert cli(*command)[0] == 0
    expected = {path.name: path.read_bytes() for path in Path().glob("f.*")}
    assert len(expected) == (2 if writers.FORMATS[suffix].holds_paths else 3)
    for name in expected:
        os.remove(name)
    sizes = interrupted(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, _, err = cli(*command)
    assert code == 130 and err.splitlines()[-1] == (
        "Stopped after 15 of 24 images; the same command with --resume goes on"
    )
    assert not list(Path().glob("f.*")) and kept() == [f".f{suffix}.partial", f".f{suffix}.partial.json"]
    code, out, err = cli(*command, "--resume")
    assert code == 0 and "1 image could not be read and is left out" in out, err
    assert sizes == [5, 4, 5, 5, 4]
    assert {path.name: path.read_bytes() for path in Path().glob("f.*")} == expected and not kept()


def test_a_full_disk_leaves_the_old_output_and_rows_to_go_on_with(cli, images, student, monkeypatch):
    Path("f.npz").write_text("precious")
    command = ["extract", student, images, "--output", "f.npz", "--batch-size", 5, "--workers", 0]
    with monkeypatch.context() as patch:
        patch.setattr(writers.Table, "chunks", full_disk)
        code, _, err = cli(*command)
        assert code == 1 and "No space left on device" in err and "make room" in err and "--resume goes on" in err
    assert Path("f.npz").read_text() == "precious" and kept() == [".f.npz.partial", ".f.npz.partial.json"]
    sizes = interrupted(monkeypatch, lambda: None)
    assert cli(*command, "--resume")[0] == 0 and sizes == []
    np.testing.assert_allclose(
        np.load("f.npz")["features"], by_hand(images, student)[1].mean(1).numpy(), rtol=1e-5, atol=1e-6
    )
    with monkeypatch.context() as patch:  # before anything is worth keeping
        patch.setattr(partial.Partial, "add", full_disk)
        code, _, err = cli(*command)
        assert code == 1 and "--resume" not in err and not kept()


SLOW = """
import sys, time
from data2vec_vision import partial
from data2vec_vision.__main__ import main

def slow(self, *args):
    add(self, *args)
    time.sleep(0.05)

add, partial.Partial.add = partial.Partial.add, slow
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_extraction_leaves_no_output_and_can_be_resumed(cli, student, images, number):
    one = sorted(images.rglob("*.png"))[0]
    Path("many").mkdir()
    for n in range(200):
        os.link(one, f"many/{n:05}.png")
    command = ["extract", student, "many", "--output", "f.npy", "--workers", "1", "--batch-size", "1"]
    run = subprocess.Popen([sys.executable, "-c", SLOW, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path(".f.npy.partial.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(number)
    _, err = run.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert run.returncode == 143 and re.fullmatch(
            "Stopped after [0-9]+ of 200 images; the same command with --resume goes on", err.splitlines()[-1]
        )
    assert kept() == [".f.npy.partial", ".f.npy.partial.json"] and not list(Path().glob("f.*"))
    assert cli(*command, "--resume")[0] == 0 and not kept()
    features = np.load("f.npy")
    assert features.shape == (200, 32) and (features == features[0]).all()


def test_a_stop_before_the_first_rows_leaves_nothing(cli, images, student, monkeypatch):
    original = extract_module.image_loader
    monkeypatch.setattr(
        extract_module, "image_loader", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or original(*args)
    )
    code, _, err = cli("extract", student, images, "--output", "f.csv")
    assert code == 143 and err.splitlines()[-1] == "Stopped; nothing was written"
    assert not kept() and not list(Path().glob("f.*"))


def test_rows_of_something_else_are_not_gone_on_with(cli, refused, images, student, monkeypatch):
    command = ["extract", student, images, "--output", "f.npz", "--workers", 0]
    with monkeypatch.context() as patch:
        interrupted(patch, lambda: os.kill(os.getpid(), signal.SIGINT), at=2)
        assert cli(*command, "--batch-size", 5)[0] == 130
    for options, message in (
        ([], "begun with --batch-size 5, and this command has --batch-size 64; give the same, or leave out --resume"),
        (["--batch-size", 5, "--layer", 1], "begun with no --layer, and this command has --layer 1; give the same"),
        (["--batch-size", 5, "--pool", "patch"], "begun with --pool mean, and this command has --pool patch"),
        (["--batch-size", 5, "--precision", "bf16"], "begun with --precision fp32"),
    ):
        assert message in refused(*command, "--resume", *options)
    other = [command[0], "run/teacher_0.pt", *command[2:]]
    assert "was begun with other weights; give the same" in refused(*other, "--resume", "--batch-size", 5)
    next(images.rglob("*.png")).rename(images / "another.png")
    assert "was begun with other images; give the same" in refused(*command, "--resume", "--batch-size", 5)
    code, out, _ = cli(*command)
    assert code == 0 and "stopped after 10 images; --resume would have gone on" in out and not kept()
    code, out, _ = cli(*command, "--resume")
    assert code == 0 and "There is nothing to resume for f.npz; starting with the first image." in out


def test_features_that_are_not_finite_are_told(cli, refused, images, student):
    content = torch.load(student)
    content["state_dict"]["pos_embed"][:] = float("nan")
    torch.save(content, "broken.pt")
    code, _, err = cli("extract", "broken.pt", images, "--output", "f.npz")
    assert code == 1 and "makes no feature that is finite: its weights are not finite, pos_embed for one" in err
    assert not kept() and not Path("f.npz").exists()


def test_an_image_whose_features_are_not_finite_is_named(cli, images, student, monkeypatch):
    original = extract_module.feature_function
    names = by_hand(images, student)[0]
    (images / names[5]).write_text("no image")

    def feature_function(*args):
        compute, calls = original(*args), []

        def spoilt(pixels):
            calls.append(1)
            features = compute(pixels).clone()
            if len(calls) == 2:  # images 4 to 7 without 5
                features[1, 3] = float("inf")
            return features

        return spoilt

    monkeypatch.setattr(extract_module, "feature_function", feature_function)
    code, out, _ = cli("extract", student, images, "--output", "f.npz", "--batch-size", 4)
    assert code == 0 and f"1 row holds numbers that are not finite, the first that of {names[6]};" in out
    assert np.isfinite(np.load("f.npz")["features"]).all(1).sum() == 22


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s != ".csv"])
def test_a_grid_is_loaded_as_the_last_line_says(cli, images, student, suffix):
    import pyarrow.parquet
    import safetensors.torch

    names = {"numpy": np, "torch": torch, "pyarrow": pyarrow, "safetensors": safetensors}
    code, out, err = cli("extract", student, images, "--output", f"f{suffix}", "--pool", "grid")
    assert code == 0 and out.splitlines()[-1].startswith("Load: "), err
    grid = np.asarray(eval(out.splitlines()[-1].removeprefix("Load: "), names))
    expected = by_hand(images, student)[1].reshape(24, 4, 4, 32).numpy()
    np.testing.assert_allclose(grid, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used_is_refused(refused, cli, images, student):
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    for arguments, message in (
        ([student, images, "--output", "f.txt"], "must end in .npz, .npy, .parquet, .csv, .pt or .safetensors"),
        ([student, images, "--output", "f.csv", "--pool", "grid"], "a line of a .csv is one vector, not the patches"),
        ([student, images, "--output", "none/f.npz"], "there is no folder none"),
        ([student, "nowhere", "--output", "f.npz"], "there is no folder nowhere"),
        ([student, "empty", "--output", "f.npz"], "it is empty"),
        ([student, "bad", "--output", "f.npz"], "none of the 1 images in bad can be read"),
        (["none.pt", images, "--output", "f.npz"], "there is no file none.pt"),
        ([student, images, "--output", "f.npz", "--layer", 3], "--layer 3 is more than the 2 blocks"),
        ([student, images, "--output", "f.npz", "--layer", -3], "--layer -3 is more than the 2 blocks"),
        ([student, images, "--output", "f.npz", "--layer", 0], "--layer counts from 1; give 1 to 2, or -1"),
        ([student, images, "--output", "f.npz", "--device", "gpu7"], "there is no device 'gpu7' here; there is cpu"),
        ([student, images], "Missing option '--output'"),
    ):
        assert message in refused("extract", *arguments)
    assert not Path("f.npz").exists()


def test_an_image_from_a_camera_held_sideways_has_the_same_features_in_python(cli, student):
    """`open_image` sees what `extract` sees: upright, and transparency over white."""
    Path("odd").mkdir()
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save("odd/a.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 255, (20, 30, 4), np.uint8), "RGBA").save("odd/b.png")
    cli("extract", student, "odd", "--output", "f.npz")
    model = d2v.load(student)
    for name, features in zip(("odd/a.jpg", "odd/b.png"), np.load("f.npz")["features"], strict=True):
        with torch.no_grad():
            ours = model.embed(model.transform(d2v.open_image(name)).unsqueeze(0))[0]
        torch.testing.assert_close(torch.from_numpy(features), ours, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_is_not_overwritten_and_old_lists_of_bad_files_go(cli, refused, images, student):
    before = Path(student).read_bytes()
    assert "is a file that this command reads" in refused("extract", student, images, "--output", student)
    assert Path(student).read_bytes() == before
    (images / "bad.png").write_text("no image")
    cli("extract", student, images, "--output", "f.npz")
    assert Path("f.bad_files.txt").exists()
    (images / "bad.png").unlink()
    cli("extract", student, images, "--output", "f.npz")
    assert not Path("f.bad_files.txt").exists()


def test_a_stop_leaves_features_and_paths_as_they_were(cli, images, student, monkeypatch):
    from data2vec_vision import writers

    cli("extract", student, images, "--output", "f.safetensors")
    features, paths = Path("f.safetensors").read_bytes(), Path("f.paths.txt").read_bytes()
    next(images.rglob("*.png")).unlink()
    form = writers.FORMATS[".safetensors"]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(writers.FORMATS, ".safetensors", dataclasses.replace(form, write=full))
    assert cli("extract", student, images, "--output", "f.safetensors")[0] == 1
    assert (Path("f.safetensors").read_bytes(), Path("f.paths.txt").read_bytes()) == (features, paths)
