"""Decoded images in memory are those of the files."""

import multiprocessing
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data2vec_vision import ramcache as module
from data2vec_vision.data import MicroBatches, Stream, StreamDataset, make_loader
from data2vec_vision.errors import Unreadable
from data2vec_vision.methods.data2vec import BlockMasks
from data2vec_vision.ramcache import RamCache, estimate, fill
from data2vec_vision.sources import open_source, opened_picture
from data2vec_vision.transforms import Views, augmentation


def taken(images):
    """Bytes of the pixels, by opening each."""
    return sum(3 * Image.open(path).width * Image.open(path).height for path in images.rglob("*.*"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block", [1, 5000, 1 << 20])
def test_it_holds_the_pixels_of_every_image(images, workers, block, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(module, "BLOCK", block)
    source = open_source(images)
    cache = fill(source, workers, 1e9)
    assert isinstance(cache, RamCache) and cache.nbytes == taken(images) == estimate(source)
    assert len(cache.blocks) == {1: 24, 5000: 8}.get(block, len(cache.blocks))
    for index in range(24):
        with opened_picture(source, index) as picture, cache.opened(index) as kept:
            assert kept.size == picture.size and torch.equal(kept.pixels(), picture.pixels())
            assert kept.image().tobytes() == picture.image().tobytes()
            box = [(1, 2, 10, 12)]
            assert torch.equal(kept.crops(box, [(8, 8)])[0], picture.crops(box, [(8, 8)])[0])


@pytest.mark.parametrize("context", [None, *multiprocessing.get_all_start_methods()])
def test_a_stream_from_memory_is_that_from_files(images, context):
    source = open_source(images)
    (images / source.name(7)).write_bytes(b"no image")

    def batches(cache, context=None):
        dataset = StreamDataset(source, Views(augmentation((16, 16), color_jitter=0.4)), BlockMasks((4, 4), 10), 0, 4)
        if cache:
            dataset.opened = cache.opened
        micro = MicroBatches(Stream(24, 0), 4, 1, 0, 6)
        return list(make_loader(dataset, micro, 0 if context is None else 1, pin=False, context=context))

    cache = fill(source, 0, 1e9)
    for path in () if context else images.rglob("*.*"):  # memory is all that it needs
        path.rename(path.with_suffix(".gone"))
    from_memory = batches(cache, context)
    for path in images.rglob("*.gone"):
        path.rename(
            images
            / next(
                n for n in map(source.name, range(24)) if n.startswith(str(path.relative_to(images).with_suffix("")))
            )
        )
    for a, b in zip(batches(None), from_memory, strict=True):
        assert torch.equal(a.views[0], b.views[0]) and a.bad == b.bad
    assert any(7 in b.bad for b in from_memory)


def test_unreadable_images_keep_their_reason(images):
    source = open_source(images)
    (images / source.name(3)).write_bytes(b"")
    cache = fill(source, 0, 1e9)
    with pytest.raises(Unreadable, match="it is empty"):
        cache.picture(3)
    with pytest.raises(Unreadable, match="it is empty"), opened_picture(source, 3):
        pass


def test_what_does_not_fit_is_left_in_its_files(images, monkeypatch):
    source = open_source(images)
    assert fill(source, 0, taken(images) - 1) == taken(images)
    assert isinstance(fill(source, 0, taken(images)), RamCache)
    monkeypatch.setattr(module, "estimate", lambda source: 10)  # headers that tell little
    monkeypatch.setattr(module, "CHUNK", 6)
    expected = fill(source, 0, taken(images) / 2)
    assert expected == pytest.approx(taken(images), rel=0.2)


def test_workers_that_are_not_forked_share_what_shared_memory_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SHARED", str(tmp_path))
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for method, workers, expected in (("fork", 2, 2 * free), ("spawn", 0, 2 * free), ("spawn", 2, free)):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        assert module.shareable(2 * free, workers) == expected
    assert module.shareable(5, 2) == 5


def test_nothing_readable_is_no_error_here(images):
    """The run itself counts unreadable images and ends."""
    for path in images.rglob("*.*"):
        path.write_bytes(b"no image")
    cache = fill(open_source(images), 0, 1e9)
    assert len(cache.bad) == 24 and cache.nbytes == 0
