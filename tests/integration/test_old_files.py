"""Files of every released version load, give the features that they gave, and continue their run.

tests/golden/make_files.py has the command that made them; a release adds a folder and changes none.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics

import data2vec_vision
import data2vec_vision as d2v
from data2vec_vision import checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
RELEASED = sorted(GOLDEN.glob("files_of_*"))


def write_images(folder):
    spec = importlib.util.spec_from_file_location("make_files", GOLDEN / "make_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_images(folder)


def test_every_release_of_the_changelog_has_its_files():
    changelog = (GOLDEN.parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert data2vec_vision.__version__ in released
    assert {folder.name for folder in RELEASED} == {f"files_of_{version}" for version in released}


@pytest.mark.parametrize("files", RELEASED, ids=lambda folder: folder.name)
def test_old_files_load_extract_and_go_on(cli, tmp_path, files):
    expected = json.loads((files / "expected.json").read_text())
    for name, kind in (("student_1.pt", checkpoint.STUDENT), ("checkpoint_0.pt", checkpoint.TRAINING)):
        content = torch.load(files / name, weights_only=True)
        assert (content["format"], content["version"]) == (kind, 1)
    images = write_images(tmp_path / "images")

    encoder = d2v.Data2Vec.from_pretrained(files / "student_1.pt")
    pictures = torch.stack([encoder.transform(d2v.open_image(images / f"{n}.png")) for n in range(8)])
    with torch.no_grad():
        features = encoder.embed(pictures, encoder.pool).numpy()
    np.testing.assert_allclose(features, expected["features"], atol=1e-4)
    code, _, err = cli("extract", files / "student_1.pt", images, "--output", tmp_path / "features.npz")
    assert code == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "features.npz")["features"], expected["features"], atol=1e-4)

    (tmp_path / "run").mkdir()
    shutil.copy(files / "checkpoint_0.pt", tmp_path / "run")
    code, _, err = cli("train", "--resume-checkpoint", tmp_path / "run" / "checkpoint_0.pt", images)
    assert code == 0, err
    losses = {str(line["step"]): line["loss"] for line in metrics(tmp_path / "run") if "loss" in line}
    # Steps 3 and 4: what else there is, was computed before the checkpoint.
    assert losses == {step: pytest.approx(expected["losses"][step], rel=1e-3) for step in ("3", "4")}
