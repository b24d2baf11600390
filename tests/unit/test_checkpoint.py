"""Files: whole or not there, loadable by this library and by timm, and never run."""

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from data2vec_vision import checkpoint
from data2vec_vision.contents import CONTENT, STUDENT, TRAINING
from data2vec_vision.errors import InputError
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer, build_vit


@pytest.fixture
def student(tiny_vit, tmp_path):
    """An encoder and the file it was saved to."""
    encoder = MaskedVisionTransformer(tiny_vit(global_pool="avg"), mask_token=True).eval()
    encoder.transform = ImageTransform((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path = tmp_path / "student_3.pt"
    checkpoint.save_encoder(encoder, path, "data2vec", epoch=3)
    return encoder, path


def test_a_student_file_gives_back_the_encoder_and_its_transform(student):
    encoder, path = student
    loaded, content = checkpoint.load_encoder(path)
    images = torch.randn(2, 3, 16, 16)
    assert not loaded.training and content["epoch"] == 3 and content["method"] == "data2vec"
    assert torch.equal(loaded(images).features, encoder(images).features)
    query = torch.tensor([[1], [2]])
    assert torch.equal(loaded.encode(images, query=query).tokens, encoder.encode(images, query=query).tokens)
    assert loaded.transform == encoder.transform and loaded.pool == "mean"


def test_timm_loads_a_student_file(tmp_path):
    encoder = MaskedVisionTransformer(build_vit("vit_tiny_patch16_224", img_size=32)).eval()
    path = tmp_path / "student_0.pt"
    checkpoint.save_encoder(encoder, path, "data2vec")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, checkpoint_path=str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.forward_features(images)[:, 1:], encoder(images).features, rtol=1e-5, atol=1e-5)


def test_from_pretrained_knows_whose_file_it_is(student, tmp_path):
    encoder, path = student
    images = torch.randn(2, 3, 16, 16)
    features, hidden_states = Data2Vec.from_pretrained(path)(images)
    assert features.shape == (2, 16, 32) and hidden_states.shape == (3, 2, 16, 32)
    other = tmp_path / "other.pt"
    checkpoint.save_encoder(encoder, other, "msn")
    with pytest.raises(ValueError, match="was trained with msn"):
        Data2Vec.from_pretrained(other)


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name, save in (
        ("a.pt", lambda f: torch.save({"state_dict": Bomb()}, f)),
        ("b.pt", lambda f: pickle.dump(Bomb(), f)),
    ):
        with open(tmp_path / name, "wb") as file:
            save(file)
        with pytest.raises(InputError, match="would run code when loaded; it was not loaded"):
            checkpoint.load_encoder(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_refused_in_one_line(student, tmp_path):
    _, path = student
    whole = path.read_bytes()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.pt").mkdir()
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "dict.pt")
    for name in ("text.pt", "empty.pt", "cut.pt", "folder.pt", "tensor.pt", "dict.pt", "missing.pt"):
        with pytest.raises(InputError) as error:
            checkpoint.load_encoder(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_weights_that_do_not_fit_their_description_and_newer_files_are_refused(student, tmp_path):
    _, path = student
    content = torch.load(path, weights_only=True)
    content["state_dict"]["norm.weight"] = torch.zeros(7)
    torch.save(content, tmp_path / "shape.pt")
    with pytest.raises(InputError, match="do not fit its own description"):
        checkpoint.load_encoder(tmp_path / "shape.pt")
    torch.save(torch.load(path, weights_only=True) | {"version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="written by a newer version"):
        checkpoint.load_encoder(tmp_path / "new.pt")
    with pytest.raises(InputError, match="holds an encoder only"):
        checkpoint.read_training(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    with checkpoint.atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), checkpoint.atomic_write(path) as file:
        file.write(b"half of the new")
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_readers_of_a_file_being_replaced_see_the_old_or_the_new_one(tmp_path):
    path, seen, stop = tmp_path / "file", set(), threading.Event()
    path.write_bytes(b"0" * 100_000)

    def read():
        while not stop.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 50):
        with checkpoint.atomic_write(path) as file:
            file.write(str(n % 10).encode() * 100_000)
    stop.set()
    reader.join()
    assert seen == {(100_000, 1)}


def training(step):
    """What a training checkpoint must have, of a run that has done so many steps."""
    return dict.fromkeys(CONTENT[TRAINING], 0) | {"step": step}


def test_the_checkpoint_of_an_epoch_stays_when_the_last_one_moves_on(tmp_path):
    checkpoint.save_training(tmp_path, training(1))
    checkpoint.keep_training(tmp_path, 4)
    checkpoint.save_training(tmp_path, training(2))
    assert checkpoint.read(tmp_path / "checkpoint_4.pt")["step"] == 1
    assert checkpoint.read(tmp_path / "checkpoint_last.pt")["step"] == 2
    checkpoint.save_training(tmp_path, training(3))
    checkpoint.keep_training(tmp_path, 4)
    assert checkpoint.read(tmp_path / "checkpoint_4.pt")["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_4.pt", "checkpoint_last.pt"]


def test_on_a_file_system_without_links_the_checkpoint_is_written_twice(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.save_training(tmp_path, training(1))
    checkpoint.keep_training(tmp_path, 4)
    assert checkpoint.read(tmp_path / "checkpoint_4.pt")["step"] == 1


@pytest.mark.parametrize("kind", ["student", "timm .pt", "timm .safetensors", "wrapped"])
def test_init_starts_from_weights(student, tiny_vit, tmp_path, kind):
    """From a student file or timm weights, with the last norm on either side of the pooling, of another image size."""
    encoder, path = student
    weights = {name: t.clone() for name, t in encoder.vit.state_dict().items()}
    if kind == "timm .pt":
        path = tmp_path / "w.pt"
        weights = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: t for k, t in weights.items()}
        torch.save(weights | {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}, path)
    elif kind == "timm .safetensors":
        path = tmp_path / "w.safetensors"
        save_file(weights, path)
    elif kind == "wrapped":
        path = tmp_path / "w.pt"
        torch.save({"model": weights}, path)
    for arguments in ({}, {"global_pool": "avg"}):
        vit = tiny_vit(img_size=24, **arguments)
        start = checkpoint.load_weights(vit, path)
        assert torch.equal(vit.blocks[1].mlp.fc1.weight, encoder.vit.blocks[1].mlp.fc1.weight)
        assert vit.pos_embed.shape == (1, 37, 32)
        if kind == "student":
            assert start.normalization == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
            assert torch.equal(start.mask_token, encoder.mask_token)
        else:
            assert start == checkpoint.Start({}, None)


def test_init_of_another_architecture_is_refused_by_the_first_misfit(student, tiny_vit, tmp_path):
    _, path = student
    with pytest.raises(InputError, match="encoder of another size: .* 32.* there, .* 64.* here"):
        checkpoint.load_weights(tiny_vit(embed_dim=64), path)
    with pytest.raises(InputError, match="lacks blocks.3"):
        checkpoint.load_weights(tiny_vit(depth=4), path)
    with pytest.raises(InputError, match="there is no file"):
        checkpoint.load_weights(tiny_vit(), tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        checkpoint.load_weights(tiny_vit(), tmp_path / "bad.safetensors")


def test_a_damaged_file_is_refused_whatever_its_bytes(student, tmp_path):
    """Cut anywhere, or with bytes overwritten: each is an InputError, or loads because the bytes were padding."""
    whole = bytearray(Path(student[1]).read_bytes())
    rng, refused = np.random.default_rng(0), 0
    for n in range(60):
        data = bytearray(whole)
        if n < 20:
            data = data[: rng.integers(len(data))]
        else:
            for at in rng.integers(0, len(data), 200):
                data[at] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(data)
        try:
            checkpoint.load(tmp_path / "damaged.pt")
        except InputError:
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize("kind", [STUDENT, TRAINING])
def test_a_file_that_lacks_something_names_it(tmp_path, kind):
    torch.save({"format": kind, "version": 1, "method": "data2vec"}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="is damaged: it lacks"):
        checkpoint.load(tmp_path / "a.pt")
    torch.save({"format": kind, "version": 99}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="written by a newer version"):
        checkpoint.load(tmp_path / "a.pt")
