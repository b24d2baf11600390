"""The pass over the images, the untrained twin, raw pixels."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data2vec_vision import features as module
from data2vec_vision import methods
from data2vec_vision.checkpoint import load_encoder, save_encoder
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError, RunFailed
from data2vec_vision.features import check_room, one_pass, pixel_shape, raw_pixels, refuse_not_finite, untrained_twin
from data2vec_vision.plan import prepare
from data2vec_vision.vit import MaskedVisionTransformer

TINY = dict(image_size=32, patch_size=8, hidden_dim=32, n_heads=2, n_encoders=2, batch_size=4, device="cpu", workers=0)


def started(images, **settings):
    """A run before its first step, and the content of the student file that it would write."""
    job = prepare(TrainConfig(str(images), **settings))
    save_encoder(job.method.student, "s.pt", job.config.method, config=vars(job.config), epoch=0)
    return job.method.student, *load_encoder("s.pt")


def same(a, b):
    a, b = a.vit.state_dict(), b.vit.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", methods.names())
def test_the_untrained_twin_is_the_encoder_before_the_first_step(images, method):
    first, encoder, content = started(images, method=method, seed=5, **TINY)
    before = torch.get_rng_state()
    twin, words = untrained_twin(encoder, content, seed=0)
    assert same(twin, first) and "seed 5, those that the run began from" in words
    assert torch.equal(torch.get_rng_state(), before) and not twin.training
    assert (twin.transform, twin.pool) == (encoder.transform, encoder.pool)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"])
@pytest.mark.parametrize("method", ["msn", "mae"])
def test_so_it_is_for_models_of_timm(images, model, method, monkeypatch):
    """siglip draws numbers for a pooling that the encoder does not have."""
    import timm

    original = timm.create_model
    small = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: original(name, **(kwargs | small)))
    first, encoder, content = started(images, method=method, model=model, image_size=32, batch_size=4, device="cpu")
    assert same(untrained_twin(encoder, content, seed=0)[0], first)


def test_what_began_from_other_weights_or_knows_no_run_has_a_random_twin(images, tiny_vit):
    _, encoder, content = started(images, **TINY)
    content["config"]["init"] = "other.pt"
    assert "; the run itself began from other weights" in untrained_twin(encoder, content, 0)[1]
    save_encoder(MaskedVisionTransformer(tiny_vit()), "own.pt", "my_method.py")
    encoder, content = load_encoder("own.pt")
    twin, words = untrained_twin(encoder, content, 3)
    assert (
        words
        == "weights drawn with seed 3, by timm's initialisation, for the method my_method.py is no part of this package"
    )
    assert not same(twin, encoder)


def test_raw_pixels_are_the_image_at_most_32_pixels_wide():
    small, large = (
        torch.randint(256, (2, 3, 28, 20), dtype=torch.uint8),
        torch.full((1, 3, 64, 48), 7, dtype=torch.uint8),
    )
    assert pixel_shape((28, 20)) == (3, 28, 20) and torch.equal(raw_pixels(small), small.flatten(1).float())
    assert pixel_shape((64, 20)) == (3, 32, 20) and raw_pixels(large).shape == (1, 3 * 32 * 32)
    torch.testing.assert_close(raw_pixels(large), torch.full((1, 3072), 7.0))
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    halved = F.avg_pool2d(ramp.float(), 2)  # what shrinking to half makes of a ramp, but for the edges
    torch.testing.assert_close(raw_pixels(ramp).view(1, 3, 32, 32)[..., 1:-1], halved[..., 1:-1])


class Batches(list):
    dataset = range(5)


def test_one_pass_keeps_rows_in_order_on_the_disk(monkeypatch):
    batches = Batches([(torch.arange(6.0).view(2, 3), {}), (None, {2: "bad"}), (torch.ones(1, 3), {4: "worse"})])
    calls, mapped, memmap = [], [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, shape: mapped.append(shape) or memmap(*a, shape=shape))
    rows, bad = one_pass(batches, {"a": lambda x: x, "b": lambda x: x[:, :1] * 2}, lambda: calls.append(1))
    assert bad == {2: "bad", 4: "worse"} and len(calls) == 3
    assert rows["a"].tolist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1]] and rows["b"].tolist() == [[0], [6], [2]]
    assert mapped == [(3, 3), (3, 1)]


def test_unreadable_images_alone_are_refused():
    with pytest.raises(InputError, match="none of the 5 images can be read; the first: bad"):
        one_pass(Batches([(None, dict.fromkeys(range(5), "bad"))]), {"a": lambda x: x}, lambda: None)


def test_a_full_disk_ends_in_one_line(monkeypatch, tiny_vit):
    encoder = MaskedVisionTransformer(tiny_vit())  # 32 numbers wide, images of 16 px: 768 pixels
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4 * (2 * 32 + 768) * 10))
    check_room(10, encoder, floors=True)
    with pytest.raises(InputError, match="features take 37 kB, but .* has only 33 kB free; set TMPDIR .*--no-floors"):
        check_room(11, encoder, floors=True)
    check_room(11, encoder, floors=False)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", Full)
    with pytest.raises(RunFailed, match="No space left on device; make room or set TMPDIR"):
        one_pass(Batches([(torch.ones(1, 3), {})]), {"a": lambda x: x}, lambda: None)


def test_features_that_are_not_finite_are_counted():
    train, test = torch.zeros(5, 3), torch.zeros(4, 3)
    refuse_not_finite(train, test, "s.pt")
    train[1, 1], train[1, 2], test[3, 0] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(InputError, match="the features of 2 of 9 images are not finite: s.pt is broken"):
        refuse_not_finite(train, test, "s.pt")
