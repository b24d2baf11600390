"""Images of one, three and five channels through the command line: train, resume, extract, evaluate, export, report."""

import io
import json

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY, same_state
from PIL import Image

import data2vec_vision as d2v
from data2vec_vision.config import TrainConfig
from data2vec_vision.dry_run import dry_run

RNG = np.random.default_rng(0)
TWO = [option for option in TINY if option != "--no-report"]


def pixels(n, channels):
    coarse = RNG.integers(0, 60_000, (6, 6, channels))
    return np.kron(coarse, np.ones((4, 5, 1))).astype(np.uint16) + np.uint16(n)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{channels: folder of twelve images in two classes}."""
    made = {}
    for channels in (1, 3, 5):
        root = made[channels] = tmp_path_factory.mktemp(f"channels{channels}")
        for n in range(12):
            place = root / "ab"[n % 2]
            place.mkdir(exist_ok=True)
            image = pixels(n, channels)
            if channels == 1:
                Image.fromarray(image[..., 0]).save(place / f"{n}.png")
            elif channels == 3:
                np.save(place / f"{n}.npy", image)
            else:
                tifffile.imwrite(place / f"{n}.tif", image, photometric="minisblack", planarconfig="contig")
    return made


@pytest.mark.parametrize(("channels", "method"), [(1, "data2vec"), (3, "ijepa"), (5, "mae")])
def test_a_run_of_any_number_of_channels_from_its_start_to_its_export(cli, folders, tmp_path, channels, method):
    folder, whole = folders[channels], tmp_path / "whole"
    options = [folder, "--method", method, "--normalize", "dataset", "--eval-path", folder, *TWO]
    options += ["--channels", channels] if channels != 3 else []
    code, out, err = cli("train", *options, "--epochs", 2, "--save-every", 1, "--checkpoint-out-dir", whole)
    assert code == 0, err
    assert f"Channels {channels}, normalised by mean" in out and "(measured on 12 images)" in out
    assert ("which need" in out) == (method == "data2vec")
    assert "left out" not in out  # no picture failed
    assert (whole / "report.html").stat().st_size > 20_000

    student = whole / "student_1.pt"
    encoder = d2v.load(student)
    assert encoder.transform.channels == channels and (whole / "config.json").exists()
    code, _, err = cli("extract", student, folder, "--output", tmp_path / "x.npz", "--workers", 0)
    assert code == 0, err
    file = np.load(tmp_path / "x.npz")
    assert len(file["paths"]) == 12
    image = d2v.open_image(folder / str(file["paths"][3]), channels)
    ours = encoder.embed(encoder.transform(image).unsqueeze(0))[0]
    np.testing.assert_allclose(file["features"][3], ours.detach().numpy(), atol=1e-5)
    code, out, err = cli("evaluate", student, folder, "--workers", 0, "--test-pct", 0.4, "--k", 4)
    assert code == 0 and "raw pixels" in out and "untrained encoder" in out, err
    formats = {"timm": "t", "huggingface": "h"} | ({"safetensors": "s", "onnx": "o.onnx"} if channels == 5 else {})
    for form, name in formats.items():
        code, out, err = cli("export", student, "--format", form, "--output", tmp_path / name)
        assert code == 0 and "differ from ours" in out, err
    config = json.loads((tmp_path / "t" / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [channels, 16, 16] and len(config["mean"]) == len(config["std"]) == channels
    assert json.loads((tmp_path / "h" / "config.json").read_text())["num_channels"] == channels


def test_a_resumed_run_is_the_run_that_was_not_stopped(cli, folders, tmp_path):
    options = [folders[5], "--channels", 5, *TINY, "--epochs", 2, "--save-every", 1]
    assert cli("train", *options, "--checkpoint-out-dir", tmp_path / "run")[0] == 0
    (tmp_path / "again").mkdir()
    first = tmp_path / "again" / "checkpoint_0.pt"
    first.write_bytes((tmp_path / "run" / "checkpoint_0.pt").read_bytes())
    code, out, err = cli("train", "--resume-checkpoint", first)
    assert code == 0 and "measured" not in out, err
    assert same_state(tmp_path / "run" / "checkpoint_1.pt", tmp_path / "again" / "checkpoint_1.pt")
    ours, theirs = (d2v.load(tmp_path / name / "student_1.pt").transform for name in ("run", "again"))
    assert ours == theirs and ours.mean != (0.0,) * 5


def test_what_cannot_be_meant_is_refused_in_a_line(refused, folders, tmp_path):
    out = ["--checkpoint-out-dir", tmp_path / "run", *TINY, "--epochs", 1]
    assert "give --channels 5, not 3" in refused("train", folders[5], *out)
    assert "give --channels 1, not 4" in refused("train", folders[1], "--channels", 4, *out)
    assert "give --normalize dataset" in refused("train", folders[5], "--channels", 5, "--normalize", "imagenet", *out)
    assert not (tmp_path / "run").exists()


def test_channels_and_normalisation_may_not_change_on_resume(cli, refused, folders, tmp_path):
    assert (
        cli("train", folders[1], "--channels", 1, *TINY, "--epochs", 1, "--checkpoint-out-dir", tmp_path / "run")[0]
        == 0
    )
    last = tmp_path / "run" / "checkpoint_last.pt"
    for option, value in (("--channels", 3), ("--normalize", "dataset")):
        assert f"{option} {value} contradicts" in refused("train", "--resume-checkpoint", last, option, value)


def test_files_of_other_channels_are_listed_with_what_would_read_them(cli, folders, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for n in range(12):
        Image.fromarray((pixels(n, 3) >> 8).astype(np.uint8)).save(mixed / f"{n:02}.png")
    tifffile.imwrite(mixed / "z.tif", pixels(0, 5), photometric="minisblack", planarconfig="contig")
    code, _, err = cli("train", mixed, *TINY, "--epochs", 1, "--checkpoint-out-dir", tmp_path / "run")
    assert code == 0, err
    assert "it has 5 channels; give --channels 5" in (tmp_path / "run" / "bad_files.txt").read_text()
    code, _, _ = cli("scan", mixed, "--json", tmp_path / "scan.json", "--workers", 0)
    assert code == 0 and "it has 5 channels; give --channels 5" in (tmp_path / "scan.json").read_text()


def test_a_dry_run_of_five_channels_draws_its_views(folders, tmp_path):
    sizes = dict(image_size=16, patch_size=4, hidden_dim=32, n_heads=2, n_encoders=1, batch_size=4, workers=0)
    config = TrainConfig(str(folders[5]), channels=5, checkpoint_out_dir=str(tmp_path / "run"), dry_run=True, **sizes)
    assert Image.open(io.BytesIO((dry_run(config) / "views.png").read_bytes())).mode == "RGB"


def test_a_large_tiff_and_jpeg_train_and_extract_without_being_decoded_whole(cli, tmp_path, monkeypatch):
    """Pillow's limit is made so low that they are beyond it."""
    root = tmp_path / "slides"
    root.mkdir()
    slide = np.kron(RNG.integers(0, 255, (16, 16, 3), np.uint8), np.ones((40, 40, 1), np.uint8))
    for n in range(4):
        tifffile.imwrite(root / f"{n}.tif", slide, tile=(64, 64), photometric="rgb", compression="jpeg")
        Image.fromarray(slide).save(root / f"{n}.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # of 409,600; twice that is the limit
    monkeypatch.setattr("data2vec_vision.images.LARGE_TIFF", 0)
    monkeypatch.setattr("data2vec_vision.arrays.KEPT_BYTES", 0)
    code, _, err = cli("train", root, *TWO, "--epochs", 1, "--checkpoint-out-dir", tmp_path / "run")
    assert code == 0 and not (tmp_path / "run" / "bad_files.txt").exists(), err
    code, _, err = cli("extract", tmp_path / "run/student_0.pt", root, "--output", tmp_path / "x.npz", "--workers", 0)
    assert code == 0, err
    features = torch.from_numpy(np.load(tmp_path / "x.npz")["features"])
    assert len(features) == 8 and torch.cosine_similarity(features[0], features[1], dim=0) > 0.9  # of one picture
