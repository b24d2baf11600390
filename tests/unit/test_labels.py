"""Labels from folders and from csv files as people write them."""

import numpy as np
import pytest
from PIL import Image

from data2vec_vision.errors import InputError
from data2vec_vision.labels import in_order, labels_of
from data2vec_vision.sources import open_source


def folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, format="PNG")
    return open_source(root)


def by_name(source, labels):
    return {source.name(i): labels.classes[n] if n >= 0 else None for i, n in enumerate(labels.numbers)}


@pytest.fixture
def source(tmp_path):
    return folder(tmp_path / "in", "b c/1.png", "ü/deep/2.png", "0.png", "b c/2.png")


def test_the_first_folder_is_the_class_and_an_image_without_folder_has_none(source):
    labels = labels_of(source)
    assert labels.classes == ["b c", "ü"] and labels.numbers.dtype == np.int64
    assert by_name(source, labels) == {"0.png": None, "b c/1.png": "b c", "b c/2.png": "b c", "ü/deep/2.png": "ü"}
    assert labels.counts().tolist() == [2, 1]


def test_classes_that_are_given_keep_their_numbers_and_others_are_unknown(source):
    labels = labels_of(source, classes=["a", "ü"])
    assert by_name(source, labels) == {"0.png": None, "b c/1.png": None, "b c/2.png": None, "ü/deep/2.png": "ü"}
    assert labels.unknown == ["b c"] and labels.of_unknown == 2


def test_classes_are_sorted_and_whole_numbers_by_their_value():
    assert in_order({"10", "9", "07"}) == ["07", "9", "10"]
    assert in_order({"10", "9", "b"}) == ["10", "9", "b"]
    assert in_order({"²", "1"}) == ["1", "²"]  # a digit for Python, of which it makes no number


def test_a_csv_labels_by_relative_and_absolute_paths(source, tmp_path):
    rows = [
        "label , PATH,other",  # in any order and case
        "cat,b c/1.png,x",
        f'"dog, small",{tmp_path}/in/ü/deep/2.png,x',
        "cat,./b c//1.png,again",
        ",b c/2.png,no label",
        "07,0.png",
        "cat,missing.png,x",
        "",
    ]
    for start in ("", "\ufeff"):  # Excel writes a byte order mark
        (tmp_path / "l.csv").write_text(start + "\n".join(rows), encoding="utf-8")
        labels = labels_of(source, str(tmp_path / "l.csv"))
        assert by_name(source, labels) == {
            "0.png": "07", "b c/1.png": "cat", "b c/2.png": None, "ü/deep/2.png": "dog, small"
        }  # fmt: skip
        assert labels.rows == 6 and labels.used_rows.tolist() == [0, 1, 2, 3, 4]


def test_names_with_line_breaks_and_names_that_are_no_unicode_are_found(tmp_path):
    try:
        source = folder(tmp_path / "in", "a\nb.png", "c\udcff.png")
    except OSError:
        pytest.skip("this file system wants Unicode names")
    (tmp_path / "l.csv").write_bytes(b'path,label\n"a\nb.png",x\nc\xff.png,y\n')
    labels = labels_of(source, str(tmp_path / "l.csv"))
    assert by_name(source, labels) == {"a\nb.png": "x", "c\udcff.png": "y"}


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"path,label\nx.png,cat\ny.png,cat\n",
            "none of the 2 paths in l.csv is an image of .*'x.png', the folder '0.png'",
        ),
        (b"file,label\n0.png,cat\n", "l.csv needs a first line that names the columns path and label, .* 'file,label'"),
        (b"path;label\n0.png;cat\n", "separated by commas; it has 'path;label'"),
        (b"", "needs a first line"),
        (b"path,label\n", "l.csv has a header but no rows"),
        (b"path,label\n0.png\n", "l.csv, line 2: 1 columns, the header has 2"),
        (b"path,label\n0.png,cat\n0.png,dog\n", "l.csv, line 3: 0.png is 'dog' here and 'cat' further up"),
        (b"path,label\n0.png,\n", "no image of .* has a label in l.csv"),
        (b"PK\x03\x04\x00\x00", "needs a first line|cannot be read as csv"),
        (b"path,label\n\x00\xff\xfe,\x00\n", "none of the 1 paths|cannot be read as csv"),
        (b'path,label\n"0.png,cat\n' + b"x" * 200_000, "cannot be read as csv: .*field larger"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(source, tmp_path, content, message):
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        labels_of(source, "l.csv")
    assert "\n" not in str(caught.value)


def test_what_has_no_labels_is_refused(tmp_path):
    flat, parts = folder(tmp_path / "flat", "a.png"), folder(tmp_path / "parts", "train/a/1.png", "Test/a/2.png")
    for source, file, message in (
        (flat, None, "have no labels: put each class into a folder of its own, or give a csv"),
        (parts, None, "are Test and train, which are no classes; give .* as --test-path"),
        (flat, str(tmp_path / "flat"), "flat is a folder; give a csv as --labels"),
        (flat, "none.csv", "there is no file none.csv"),
    ):
        with pytest.raises(InputError, match=message):
            labels_of(source, file)
