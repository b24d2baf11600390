"""`extract`: features in the order of the paths, whatever the workers and the batch, from every kind of file."""

import contextlib
import os
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, start
from PIL import Image

import data2vec_vision as d2v
from data2vec_vision import extract as extract_module


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
        teacher = d2v.load("run/checkpoint_0.pt", which="teacher").embed(pixels)
    for options, expected in (
        (["--pool", "cls"], encoded.prefix[:, 0]),
        (["--pool", "patch"], encoded.tokens),
        (["--layer", 1], hidden[0].mean(1)),
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
    monkeypatch.setattr(extract_module, "CHUNK", 5)
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
    one = sorted(images.rglob("*.png"))[0]
    for folder, count in (("few", 96), ("many", 960)):
        Path(folder).mkdir()
        for n in range(count):
            os.link(one, f"{folder}/{n:04}.png")

    def peak(folder):
        tracemalloc.start()
        extract_module.extract(student, str(folder), "f.npz", workers=0, batch_size=4, pool="patch")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak("few")
    assert peak("many") < peak("few") + 200_000
    assert len(most) > 240 and max(most) <= 2


def test_nothing_half_written_is_left_behind(cli, images, student, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    Path("f.npz").write_text("precious")
    monkeypatch.setattr(extract_module.shutil, "copyfileobj", fail)
    code, _, err = cli("extract", student, images, "--output", "f.npz")
    assert code == 1 and "No space left on device" in err and "make room" in err
    assert Path("f.npz").read_text() == "precious" and not list(Path().glob(".f*"))


def is_writing(pid):
    """Whether the process has begun with its features: the temporary file of an .npz has no name."""
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            name = os.readlink(link)
            if str(Path.cwd()) in name and ("(deleted)" in name or ".npy" in name):
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("output", ["f.npz", "f.npy"])
def test_a_terminated_extract_leaves_nothing(student, images, output):
    one = sorted(images.rglob("*.png"))[0]
    Path("many").mkdir()
    for n in range(20_000):
        os.link(one, f"many/{n:05}.png")
    run = start("extract", student, "many", "--output", output, "--workers", 1)
    deadline = time.monotonic() + 60
    while not is_writing(run.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.terminate()
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 143 and out.splitlines()[-1] == "Stopped; nothing was written", out
    assert not list(Path().glob("*.np*")) and not list(Path().glob(".f*"))


def test_what_cannot_be_used_is_refused(refused, cli, images, student):
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/a.png").write_text("no image")
    for arguments, message in (
        ([student, images, "--output", "f.csv"], "must end in .npz or .npy"),
        ([student, images, "--output", "none/f.npz"], "there is no folder none"),
        ([student, "nowhere", "--output", "f.npz"], "there is no folder nowhere"),
        ([student, "empty", "--output", "f.npz"], "it is empty"),
        ([student, "bad", "--output", "f.npz"], "none of the 1 images in bad can be read"),
        (["none.pt", images, "--output", "f.npz"], "there is no file none.pt"),
        ([student, images, "--output", "f.npz", "--layer", 3], "--layer 3 is more than the 2 blocks"),
        ([student, images, "--output", "f.npz", "--layer", 1, "--pool", "cls"], "--layer gives patch tokens"),
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
