"""What a scan says: settings that follow from the images, and a clean list."""

from collections import Counter

import numpy as np
import pytest

from data2vec_vision.config import TrainConfig, check
from data2vec_vision.inventory import Findings, counted, per_second, percent, shown, suggest
from data2vec_vision.survey import Survey

GB = 10**9


@pytest.mark.parametrize(
    ("short_side", "device", "size", "patch", "width"),
    [(3000, "cuda", 224, 16, 384), (224, "cuda", 224, 16, 384), (223, "cuda", 208, 16, 384), (100, "cuda", 96, 16, 384),
     (95, "cuda", 88, 8, 192), (64, "cuda", 64, 8, 192), (32, "cuda", 32, 4, 192), (28, "cpu", 28, 4, 192),
     (5, "cpu", 8, 4, 192), (1, "cpu", 8, 4, 192), (3000, "cpu", 96, 16, 192)],
)  # fmt: skip
def test_sizes_follow_the_images_and_are_accepted_by_train(short_side, device, size, patch, width):
    options, reasons = suggest(short_side, 100_000, device, 64 * GB)
    assert (options["image-size"], options["patch-size"], options["hidden-dim"]) == (size, patch, width)
    assert reasons.keys() == {"image-size", "batch-size"}
    check(TrainConfig(input_path="x", **{name.replace("-", "_"): value for name, value in options.items()}))


@pytest.mark.parametrize(
    ("n_images", "device", "memory", "batch", "reason"),
    [(10**6, "cuda", 64 * GB, 256, "more is seldom needed"), (10**6, "cpu", 64 * GB, 64, "on a CPU more gains nothing"),
     (1000, "cuda", 64 * GB, 32, "16 steps an epoch of 1,000 images"), (10**6, "cuda", 8 * GB, 32, "a quarter of 8.0 GB"),
     (1, "cuda", 64 * GB, 16, "the least that is of use, for 1 image"), (10**6, "cuda", 1, 16, "the least")],
)  # fmt: skip
def test_the_batch_is_bounded_by_images_memory_and_device(n_images, device, memory, batch, reason):
    options, reasons = suggest(224, n_images, device, memory)
    assert options["batch-size"] == batch and reasons["batch-size"].startswith(reason)


def test_a_clean_list_has_what_can_be_read_and_one_of_each():
    survey = Survey.of(8)
    survey.records["width"] = 1
    survey.records["width"][6] = 0
    alike = [(0, np.array([3, 7]), np.array([2, 5]))]
    found = Findings(None, "photos", survey, [np.array([1, 4, 5])], alike, 1.0, 1)
    assert found.kept().tolist() == [0, 1, 2, 3, 7]
    assert found.kept(keep_duplicates=True).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert found.kept(drop_alike=True).tolist() == [0, 1, 2]
    assert (found.exact_copies, found.near_duplicates) == (2, 2)


def test_numbers_and_names_as_people_read_them():
    assert [percent(x) for x in (0, 0.00001, 0.012, 0.5, 1)] == ["0 %", "less than 0.1 %", "1.2 %", "50 %", "100 %"]
    assert [per_second(x) for x in (7.9, 94.2, 1987, 12_345)] == ["7", "94", "1,900", "12,000"]
    assert shown("a\nb\udcff ü.png") == "a\\nb\\udcff ü.png"
    assert len(shown("x" * 500)) < 62 and shown("x" * 500 + ".png").endswith("x.png")
    assert counted(Counter(PNG=3)) == "all PNG" and counted(Counter(PNG=3, JPEG=1000)) == "JPEG 1,000, PNG 3"
