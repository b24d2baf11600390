"""Each file of features is read back by the library that its users read it with: equal bits, names as they were."""

import csv
import json
import tracemalloc

import numpy as np
import pytest
import torch

from data2vec_vision import writers
from data2vec_vision.errors import InputError
from data2vec_vision.partial import NPY_HEADER, npy_header
from data2vec_vision.writers import FORMATS, Table, check_format, load_line, paths_file

NAMES = [
    "a.png",
    "with, comma.png",
    'a "quoted" one.png',
    "two\nlines.png",
    "back\rslash\\.png",
    "föö 猫.png",
    "NA.png",
]
ABOUT = {"method": "mae", "pool": "mean", "layer": None, "image_size": [16, 16]}


@pytest.fixture
def table(tmp_path):
    """table(shape, names) -> random rows, among them the extremes of float32."""

    def build(shape=(6,), names=NAMES):
        rows = np.random.default_rng(0).standard_normal((len(names), *shape)).astype("<f4")
        digits = np.nextafter(np.float32(1000), np.float32(np.inf))  # needs all 9
        rows.reshape(-1)[:6] = [np.nan, -np.inf, 1e-45, np.finfo("f4").max, -0.0, digits]
        path = tmp_path / "rows.npy"
        path.write_bytes(npy_header("<f4", list(rows.shape)) + rows.tobytes())
        return rows, Table(path, list(shape), len(names), lambda: iter(names), ABOUT, lambda: None)

    return build


def written(tmp_path, suffix, table):
    path = tmp_path / f"f{suffix}"
    with open(path, "wb") as file:
        FORMATS[suffix].write(file, table)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(writers, "BLOCK", 48)  # 2 rows of 6 at a time, of the 7
    monkeypatch.setattr(writers, "ROW_GROUP", 72)
    monkeypatch.setattr(writers, "CHUNK", 3)


def test_the_header_is_numpys(tmp_path):
    assert len(npy_header("<f4", [2, 3])) == NPY_HEADER
    (tmp_path / "a.npy").write_bytes(npy_header("<f4", [2, 3]) + np.arange(6, dtype="<f4").tobytes())
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(6, dtype="f4").reshape(2, 3))


def test_npz(tmp_path, table):
    rows, content = table()
    with np.load(written(tmp_path, ".npz", content), allow_pickle=False) as file:
        assert sorted(file) == ["about", "features", "paths"]
        np.testing.assert_array_equal(file["features"], rows)
        assert file["paths"].tolist() == NAMES and json.loads(file["about"].item()) == ABOUT


def test_csv_gives_back_the_very_floats_and_names(tmp_path, table):
    rows, content = table()
    with open(written(tmp_path, ".csv", content), newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["path", *(f"f{n}" for n in range(6))]
    assert [line[0] for line in lines] == NAMES
    np.testing.assert_array_equal(np.array([line[1:] for line in lines]).astype("f4"), rows)


def test_parquet(tmp_path, table):
    from pyarrow import parquet

    rows, content = table((2, 3))
    path = written(tmp_path, ".parquet", content)
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 3 and file.schema_arrow.names == ["path", "features"]
    assert str(file.schema_arrow.field("features").type) == "fixed_size_list<element: float>[6]"
    assert json.loads(file.schema_arrow.metadata[b"shape"]) == [2, 3]
    assert json.loads(file.schema_arrow.metadata[b"about"]) == ABOUT
    read = parquet.read_table(path)
    assert read["path"].to_pylist() == NAMES
    np.testing.assert_array_equal(np.array(read["features"].to_pylist(), "f4").reshape(7, 2, 3), rows)


def test_pt(tmp_path, table):
    rows, content = table((2, 3))
    for mmap in (False, True):
        read = torch.load(written(tmp_path, ".pt", content), weights_only=True, mmap=mmap)
        np.testing.assert_array_equal(read["features"].numpy(), rows)
        assert read["paths"] == NAMES and read["about"] == ABOUT


def test_safetensors(tmp_path, table):
    from safetensors import safe_open

    rows, content = table((1, 2, 3))
    with safe_open(written(tmp_path, ".safetensors", content), "np") as file:
        np.testing.assert_array_equal(file.get_tensor("features"), rows)
        assert file.metadata() == {"method": "mae", "pool": "mean", "layer": "null", "image_size": "[16, 16]"}


def test_names_that_are_no_unicode_are_kept_where_the_format_can(tmp_path, table):
    names = ["a\udcff.png", "b.png"]
    _, content = table(names=names)
    assert np.load(written(tmp_path, ".npz", content))["paths"].tolist() == names
    assert torch.load(written(tmp_path, ".pt", content), weights_only=True)["paths"] == names
    with paths_file(tmp_path / "f.npy", iter(names)):
        assert not (tmp_path / "f.paths.txt").exists()
    assert (tmp_path / "f.paths.txt").read_bytes() == b"a\xff.png\nb.png\n"


def test_formats_that_are_utf8_throughout_stay_readable_and_say_what_they_changed(tmp_path, table, capfd):
    from pyarrow import parquet

    _, content = table(names=["a\udcff.png", "b.png"])
    assert parquet.read_table(written(tmp_path, ".parquet", content))["path"].to_pylist() == ["a\\xff.png", "b.png"]
    assert capfd.readouterr().out == "note: of 1 name that is not UTF-8, odd bytes are written as \\xNN\n"
    lines = written(tmp_path, ".csv", content).read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == ["path", "a\\xff.png", "b.png"]
    assert "1 name that is not UTF-8" in capfd.readouterr().out


@pytest.mark.parametrize("suffix", [s for s, form in FORMATS.items() if form.write])
def test_equal_features_make_equal_files_at_any_time(tmp_path, table, suffix, monkeypatch):
    _, content = table()
    first = written(tmp_path, suffix, content).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert written(tmp_path, suffix, content).read_bytes() == first


@pytest.mark.parametrize("suffix", [s for s, form in FORMATS.items() if form.write])
def test_memory_does_not_grow_with_the_rows(tmp_path, table, suffix, monkeypatch):
    """Python's and numpy's peak for 20 times the rows, of 2 MB, grows at most by a list of their names."""
    monkeypatch.setattr(writers, "BLOCK", 2**14)
    monkeypatch.setattr(writers, "ROW_GROUP", 2**14)

    def peak(count):
        content = table((256,), [f"{n:05}.png" for n in range(count)])[1]
        tracemalloc.start()
        written(tmp_path, suffix, content)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)
    assert peak(2000) < peak(100) + 400_000


@pytest.mark.parametrize("suffix", [s for s, form in FORMATS.items() if form.write])
def test_writing_can_be_stopped(tmp_path, table, suffix):
    def stop():
        raise KeyboardInterrupt

    _, content = table()
    content.stop = stop
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, suffix, content)


def test_a_name_with_quotes_is_loaded_too(tmp_path):
    path = tmp_path / 'a "b"\n c.npy'
    np.save(path, np.arange(3))
    assert eval(load_line(path, [3]), {"numpy": np}).tolist() == [0, 1, 2]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"f.parquet needs pyarrow: pip install pyarrow"):
        check_format(tmp_path / "f.parquet", None)
