"""KnnProbe: the accuracy of an encoder in training, with nothing of the training touched."""

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from data2vec_vision import evaluate as module
from data2vec_vision.errors import InputError
from data2vec_vision.evaluate import KnnProbe
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.split import stratified_split
from data2vec_vision.vit import MaskedVisionTransformer

CPU = torch.device("cpu")


def noise_images(folder, count, side=16):
    """`count` small images of noise in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for n in range(count):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"n{n}.png")


@pytest.fixture
def encoder(tiny_vit):
    return MaskedVisionTransformer(tiny_vit())


def by_hand(images, encoder, k, seed=0, pool="mean"):
    names = sorted(str(p.relative_to(images)) for p in images.rglob("*.*"))
    with torch.no_grad():
        features = torch.cat(
            [encoder.embed(encoder.transform(Image.open(images / n)).unsqueeze(0), pool) for n in names]
        )
    labels = np.array([int(n.split("/")[0].removeprefix("class")) for n in names])
    train, test = map(torch.from_numpy, stratified_split(labels, 0.2, seed))
    labels = torch.from_numpy(labels)
    return accuracy(knn_classify(features[train], labels[train], features[test], k)[0], labels[test])


@pytest.mark.parametrize("kept", [10**9, 0])
def test_it_is_the_knn_accuracy_of_a_stratified_fifth(images, encoder, kept, monkeypatch):
    noise_images(images / "class1" / "deeper", 10)  # deeper folders are of the same class
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    for seed, k, pool in ((0, 3, "mean"), (7, 5, "cls")):
        probe = KnnProbe(str(images), encoder.transform, k=k, seed=seed, workers=0)
        assert probe.probe(encoder.eval(), CPU, pool=pool) == pytest.approx(by_hand(images, encoder, k, seed, pool))


def test_images_are_decoded_once_where_they_fit_in_memory(images, encoder, monkeypatch):
    probe = KnnProbe(str(images), encoder.transform, k=3, workers=0)
    before = probe.probe(encoder, CPU)
    for path in images.rglob("*.*"):
        os.remove(path)
    assert probe.probe(encoder, CPU) == before


def test_images_that_go_while_it_runs_give_no_accuracy(images, encoder, monkeypatch, capsys):
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    probe = KnnProbe(str(images), encoder.transform, k=3, workers=0)
    os.remove(next(images.rglob("*.png")))
    assert math.isnan(probe.probe(encoder, CPU)) and "can no longer be read" in capsys.readouterr().out


def test_training_is_left_as_it_was(images, encoder):
    encoder.train()
    encoder.vit.blocks[1].eval()  # a frozen block
    for block in encoder.vit.blocks:
        block.attn.fused_attn = False
    modes = [m.training for m in encoder.modules()]
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()
    KnnProbe(str(images), encoder.transform, k=3, workers=0).probe(encoder, CPU, "bf16")
    assert [m.training for m in encoder.modules()] == modes
    assert not any(block.attn.fused_attn for block in encoder.vit.blocks)
    assert torch.equal(torch.get_rng_state(), random[0]) and np.random.get_state()[1].tolist() == random[1]
    encoder(torch.randn(1, 3, 16, 16)).features.sum().backward()  # no tensor of inference mode is left in it


def test_it_is_evaluated_without_dropout(images, tiny_vit):
    encoder = MaskedVisionTransformer(tiny_vit(proj_drop_rate=0.9)).train()
    probe = KnnProbe(str(images), encoder.transform, k=3, workers=0)
    assert len({probe.probe(encoder, CPU) for _ in range(5)}) == 1


def test_broken_weights_give_no_number(images, encoder):
    encoder.vit.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    assert math.isnan(KnnProbe(str(images), encoder.transform, k=3, workers=0).probe(encoder, CPU))


def test_it_is_said_once_what_is_left_out_and_when_k_is_too_large(images, encoder, capsys):
    (images / "class0/000.png").write_text("no image")
    probe = KnnProbe(str(images), encoder.transform, k=20, workers=0)
    assert probe.k == 18 and len(probe.labels) == 23  # 8, 8 and 7 images, of which 2, 2 and 1 test
    probe.probe(encoder, CPU)
    said = capsys.readouterr().out
    assert said.count("k = 18") == 1 and said.count("1 of the labelled images") == 1


def test_of_many_images_some_are_drawn_by_seed(images, encoder):
    probes = [KnnProbe(str(images), encoder.transform, k=3, max_images=15, seed=s, workers=0) for s in (0, 0, 1)]
    assert [len(p.labels) for p in probes] == [15, 15, 15]
    first, again, other = ([int(b.sum()) for b in p._batches] for p in probes)
    assert first == again != other


def test_folders_that_cannot_be_used_are_refused(images, encoder, tmp_path):
    def refused(path, message, **options):
        with pytest.raises(InputError, match=message):
            KnnProbe(str(path), encoder.transform, workers=0, **options)

    refused(images / "class0", "have no labels")
    refused(tmp_path / "none", "there is no folder")
    noise_images(tmp_path / "one" / "a", 5)
    refused(tmp_path / "one", "has readable images of 1 class; it takes two or more")
    for name in ("a", "b"):
        noise_images(tmp_path / "single" / name, 1)
    refused(tmp_path / "single", "has no class with two images")
    for path in images.rglob("*.*"):
        path.write_text("x")
    refused(images, "readable images of 0 classes")
