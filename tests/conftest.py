"""What the tests share: tiny encoders and folders of real image files."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_vision.vit import build_vit

torch.set_num_threads(1)  # tiny tensors; and the tests run side by side


@pytest.fixture
def tiny_vit():
    """Builds a ViT of 3 blocks for images of 16 px in 16 patches; keyword arguments as for timm."""

    def build(**arguments):
        torch.manual_seed(0)
        defaults = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
        return build_vit(**(defaults | arguments))

    return build


def write_images(folder: Path, count: int = 24, side: int = 20) -> Path:
    """Photos-like files in class folders: smooth noise, PNG and JPEG, lower and upper case suffixes."""
    random = np.random.default_rng(0)
    for number in range(count):
        below = folder / f"class{number % 3}"
        below.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side + number % 5, side), Image.Resampling.BICUBIC)
        image.save(below / f"{number:03}{('.png', '.jpg', '.JPG', '.jpeg')[number % 4]}")
    return folder


@pytest.fixture(scope="session")
def make_images():
    """make_images(folder) writes 24 small images below it."""
    return write_images


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of 24 small images."""
    return write_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing a test writes lands in the checkout."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / ".cache"))
    assert os.getcwd() == str(tmp_path)


@pytest.fixture
def bounded_memory(request):
    """Asking for more memory than the test's module says, ROOM bytes beyond what this process has, fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + request.module.ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
