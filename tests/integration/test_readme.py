"""README.md as a newcomer would follow it: its Python runs as printed, its commands have the options they use."""

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

import data2vec_vision as d2v
from data2vec_vision.__main__ import cli
from data2vec_vision.methods.data2vec import Data2Vec

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(?:python -m data2vec_vision) (\w+.*)$", README, re.MULTILINE)


@pytest.fixture
def names(cli):
    """The files that README's text has made by then, and the names its snippets share."""
    torch.manual_seed(0)
    d2v.save_encoder(Data2Vec("vit_small_patch16_224").student, "student_99.pt", method="data2vec")
    assert cli("sample", "samples")[0] == 0
    options = "--method mae --image-size 28 --patch-size 14 --hidden-dim 32 --n-encoders 1 --epochs 1 --checkpoint-out-dir mae"
    assert cli("train", "samples", *options.split())[0] == 0
    Path("mae/checkpoint_0.pt").rename("checkpoint_99.pt")
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    Path("photos").mkdir()
    Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC).save("photo.jpg")
    Image.open("photo.jpg").save("photos/photo.png")
    assert cli("extract", "student_99.pt", "photos", "--output", "features.npz")[0] == 0
    assert cli("export", "student_99.pt", "--format", "timm", "--output", "exported")[0] == 0
    return {}


def test_the_python_runs_as_printed(names):
    assert len(SNIPPETS) == 9
    results, fine_tuned = [], None
    for snippet in SNIPPETS:
        exec(snippet, names)
        if "features" in snippet:
            results.append(names["features"])
        if "model.transform(image)" in snippet:
            images = names["images"]
        if "local-dir:exported" in snippet:
            fine_tuned = names["model"]
    assert fine_tuned.head.out_features == 10 and fine_tuned.head.weight.std() > 0
    extracted, by_patches, by_image = results[:3]
    assert extracted.shape == (1, 384) and names["paths"].tolist() == ["photo.png"]
    assert by_patches.shape == (1, 196, 384) and names["hidden_states"].shape == (12, 1, 196, 384)
    assert torch.equal(by_patches, by_image)
    assert names["embedding"].shape == (1, 384)
    np.testing.assert_allclose(names["embedding"].detach().numpy(), extracted, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(names["loss"]) and names["answers"].shape == (8, 3, 64)
    assert Image.open("reconstruction.png").width > 3 * 144
    with torch.no_grad():
        by_timm = names["vit"].eval().forward_features(images)
    torch.testing.assert_close(by_timm[:, 1:], by_image.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_have_their_options(line):
    name, *arguments = shlex.split(line, comments=True)
    command = cli.commands[name]
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_the_two_commands_come_first_and_ci_calls_them():
    first = README.split("```")[1]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_file_tree_names_every_file():
    tree = README.split("## The code")[1]
    package = ROOT / "data2vec_vision"
    missing = [p.name for p in package.rglob("*.py") if p.name not in tree and p.name not in ("__init__.py", "make.py")]
    assert missing == []


def test_nothing_is_left_to_be_filled_in():
    for name in ("README.md", "benchmarks/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert not re.search(r"@[A-Z]+@|<!--|TODO", (ROOT / name).read_text()), name


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
