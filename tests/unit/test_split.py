"""Which images teach and which test."""

import numpy as np
import pytest
from PIL import Image

from data2vec_vision.errors import InputError
from data2vec_vision.labels import UNLABELLED
from data2vec_vision.split import labelled_images, listed, stratified_split


def folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (4, 4)).save(root / name / f"{n}.png")
    return str(root)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_every_class_is_split_and_nothing_is_lost_or_twice(share):
    numbers = np.random.default_rng(0).permutation(np.repeat([UNLABELLED, 0, 1, 2, 3, 5], [7, 1, 2, 10, 100, 33]))
    stay, held = stratified_split(numbers, share, seed=0)
    assert np.array_equal(np.sort(np.concatenate([stay, held])), np.flatnonzero(numbers >= 0))
    assert np.all(np.diff(stay) > 0) and np.all(np.diff(held) > 0)
    count = np.bincount(numbers[held], minlength=6)
    assert count[0] == 0 and count[1] == 1  # one image stays, of two one is held out
    for n, c in ((10, 2), (100, 3), (33, 5)):
        assert count[c] == min(max(1, np.round(n * share)), n - 1)


def test_the_split_is_a_function_of_the_seed():
    numbers = np.repeat([0, 1], 50)
    first, again, other = (stratified_split(numbers, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first != list(range(10)) + list(range(50, 60))  # drawn, not the first ones


def test_classes_with_one_image_train_and_are_named(tmp_path):
    images = labelled_images(folder(tmp_path / "in", a=5, b=1, c=10), None, None, 0.2, 0)
    assert images.classes == ["a", "b", "c"] and "b" in images.notes[0] and len(images.notes) == 1
    assert images.train.numbers.tolist() == [0] * 4 + [1] + [2] * 8 and images.test.numbers.tolist() == [0, 2, 2]
    names = {part.images.name(i) for part in images.parts for i in range(len(part.images))}
    assert len(names) == 16
    with images.test.images.open(0) as file:
        assert Image.open(file).size == (4, 4) and file.name.endswith(images.test.images.name(0))


def test_a_test_folder_has_the_classes_of_the_training_folder(tmp_path):
    train, test = folder(tmp_path / "train", a=2, c=3), folder(tmp_path / "test", b=4, c=1)
    (tmp_path / "train/flat.png").write_bytes((tmp_path / "train/a/0.png").read_bytes())
    images = labelled_images(train, None, test, 0.2, 0)
    assert images.train.numbers.tolist() == [0, 0, 1, 1, 1] and images.test.numbers.tolist() == [1]
    assert images.notes[0] == f"1 image in {train} without a label left out."
    assert images.notes[1] == f"4 images in {test} of classes that do not train, b, left out."
    assert images.split == f"the test images are those in {test}"


def test_a_csv_labels_both_folders(tmp_path):
    train, test = folder(tmp_path / "train", x=2), folder(tmp_path / "test", y=2)
    (tmp_path / "l.csv").write_text("path,label\nx/0.png,cat\nx/1.png,dog\ny/0.png,dog\ny/9.png,dog\n")
    images = labelled_images(train, str(tmp_path / "l.csv"), test, 0.2, 0)
    assert images.train.numbers.tolist() == [0, 1] and images.test.numbers.tolist() == [1]
    assert images.notes[1] == f"1 row of {tmp_path}/l.csv that name no image passed over."


def test_what_cannot_be_split_is_refused(tmp_path):
    one, flat = folder(tmp_path / "one", a=5), folder(tmp_path / "singles", a=1, b=1)
    pair, other = folder(tmp_path / "pair", a=2, b=2), folder(tmp_path / "other", q=2)
    (tmp_path / "l.csv").write_text("path,label\na/0.png,cat\nb/0.png,dog\n")
    same = folder(tmp_path / "same", a=2)
    for arguments, message in (
        ((one, None, None, 0.2), "all images in .* are of one class, 'a'"),
        ((flat, None, None, 0.2), "has one image only, .* use --test-path"),
        ((pair, None, None, 0.0), r"--test-pct 0 must be in \(0, 1\)"),
        ((pair, None, None, 1.0), "--test-pct 1 must be"),
        ((pair, None, None, float("nan")), "--test-pct nan must be"),
        ((pair, None, other, 0.2), "no image in .*other is of a class that .*pair has: there q, here a, b"),
        ((pair, None, pair, 0.2), "lie in one another"),
        ((pair, None, str(tmp_path / "pair/a"), 0.2), "lie in one another"),
        ((str(tmp_path / "pair/../pair/a"), None, pair, 0.2), "in one class|lie in one another|have no labels"),
        ((pair, str(tmp_path / "l.csv"), same, 0.2), "fits an image in .*pair and one in .*same; write absolute paths"),
    ):
        with pytest.raises(InputError, match=message):
            labelled_images(*arguments, seed=0)


def test_folders_whose_names_begin_alike_do_not_lie_in_one_another(tmp_path):
    train, test = folder(tmp_path / "data", a=2, b=2), folder(tmp_path / "data-test", a=1)
    assert len(labelled_images(train, None, test, 0.2, 0).test.images) == 1


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "a, b" and listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed(["a\nb"]) == "a\\nb"
