"""What a run says of the machine, of the time it takes, and of what ended it."""

import dataclasses
import errno
import re
from pathlib import Path

import pytest
import torch

from data2vec_vision import messages
from data2vec_vision.config import TrainConfig
from data2vec_vision.plan import prepare
from data2vec_vision.run import duration, size
from data2vec_vision.sources import open_source
from data2vec_vision.vit import forward_flops


@pytest.fixture
def job(images):
    return prepare(
        TrainConfig(input_path=str(images), image_size=16, patch_size=4, hidden_dim=32, n_encoders=2, batch_size=4)
    )


def test_unused_gpus_are_pointed_out(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(messages, "device_name", lambda device: "cuda:0")
    assert "GPUs" not in messages.describe(job)
    text = messages.describe(dataclasses.replace(job, device=torch.device("cuda", 0)))
    assert "4 GPUs found, using 1; all 4: torchrun --nproc-per-node 4 -m data2vec_vision train" in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "GPUs found" not in messages.describe(dataclasses.replace(job, device=torch.device("cuda", 0)))


def test_a_long_run_on_a_cpu_gets_a_smaller_setting_with_its_time(job):
    assert messages.advice_if_long(job, 3600) == ""
    big = prepare(TrainConfig(input_path=job.config.input_path, epochs=100, device="cpu"))
    text = messages.advice_if_long(big, 50 * 3600)
    assert text.startswith("That is long for a CPU. About ") and "\n" not in text
    hours = re.search(r"About (?:(\d+) h )?(\d+) min", text)
    assert int(hours[1] or 0) < 2 and "instead of --model" not in text
    named = dataclasses.replace(big, config=dataclasses.replace(big.config, model="vit_small_patch16_224"))
    assert messages.advice_if_long(named, 50 * 3600) == text + " instead of --model"
    assert messages.advice_if_long(dataclasses.replace(big, device=torch.device("cuda")), 50 * 3600) == ""


def test_small_images_are_not_blown_up(job):
    icons = prepare(TrainConfig(input_path=job.config.input_path, image_size=32, patch_size=4, device="cpu"))
    text = messages.advice_if_long(icons, 20 * 3600)
    assert "--image-size 32 --patch-size 4 --hidden-dim" in text


def test_a_run_that_no_smaller_setting_makes_short_is_told_so(job):
    """This run's model is smaller than all that could be proposed."""
    text = messages.advice_if_long(
        dataclasses.replace(job, config=dataclasses.replace(job.config, epochs=1)), 30 * 3600
    )
    assert text.startswith("That is long for a CPU, and so would be every smaller setting") and "About" not in text


def test_the_time_of_the_smaller_setting_follows_from_the_multiplications():
    """Half the width and a quarter of the patches are about a sixteenth of the work, a bit less attention apart."""
    assert forward_flops(49, 192, 12) < forward_flops(196, 384, 12) / 16
    assert forward_flops(49, 192, 12) > forward_flops(196, 384, 12) / 20


def test_the_estimate_names_the_end(job):
    assert messages.estimate(job, 90).startswith("About 90 s to go, until ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "try --batch-size 2 --grad-accum 2, the same images a step"),
        (MemoryError(), "not enough for batches of 4"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough for batches of 4"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write to runs/images-data2vec: No space left"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "try --workers"),
        (KeyError("x"), "KeyError: 'x' (the traceback is in error.txt)"),
    ],
)
def test_failures_say_what_to_try_in_one_line(job, error, expected):
    text = messages.failure(error, job, Path("error.txt"))
    assert expected in text and "\n" not in text


def test_durations_and_sizes_are_said_as_people_say_them():
    assert [duration(s) for s in (5, 99, 120, 3540, 3600, 12_000, 200_000)] == [
        "5 s", "99 s", "2 min", "59 min", "1 h 0 min", "3 h 20 min", "2 d 7 h"]  # fmt: skip
    assert [size(n) for n in (999, 1500, 2_500_000, 3.2e9, 5e12)] == ["999 bytes", "2 kB", "2 MB", "3.2 GB", "5.0 TB"]


def test_what_makes_loading_faster_is_what_this_run_does_not_do_yet(job, monkeypatch):
    monkeypatch.setattr(messages, "cores", lambda: 8)

    def text(**settings):
        return messages.slow_loading(dataclasses.replace(job, config=dataclasses.replace(job.config, **settings)), 0.43)

    assert text(workers=3) == "Waiting for images takes 43 % of the time. Faster: --workers 8, or --cache ram."
    assert text(workers=8) == "Waiting for images takes 43 % of the time. Faster: --cache ram."
    assert "Faster: a faster disk, or a machine with more cores." in text(workers=8, cache="ram")
    small = text(workers=8, cache="ram", image_size=6)  # the images have sides of 20 px
    assert small.endswith("images made smaller beforehand, to a short side of about 12 px.")
    monkeypatch.setattr(messages, "free_memory", lambda: 1000)
    assert "--cache ram" not in text(workers=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "--workers 2" in text(workers=1)


def test_archives_beside_images_are_pointed_out(job, images):
    assert "beside archives" not in messages.describe(job)
    (images / "more.tar").write_bytes(b"")
    text = messages.describe(dataclasses.replace(job, source=open_source(images)))
    assert "beside archives that are not looked into (1 .tar); give them as inputs of their own" in text
