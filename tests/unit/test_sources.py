"""Folders of images as users have them: any depth, any format, any mode, damaged files in between."""

import errno
import json
import os
import pickle
import random
import sys
import tarfile
from hashlib import blake2b
from io import BytesIO

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data2vec_vision import cache, tables
from data2vec_vision import folders as folders_module
from data2vec_vision import index as index_module
from data2vec_vision.errors import InputError
from data2vec_vision.images import Picture, image_suffixes
from data2vec_vision.sources import ImageFolder, ImageList, open_source, read_image


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_finds_images_at_any_depth_in_any_case_and_nothing_else(tmp_path):
    wanted = ["a.JPG", "b.Png", "deep/er/c.jpeg", "deep/d.tif", "e.webp", "f.bmp", "g.gif", "sp ace/ü.jpg"]
    touch(tmp_path, *wanted, ".hidden.png", ".cache/x.png", "deep/._a.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "labels.csv").write_text("x")
    assert names(open_source(tmp_path)) == sorted(wanted)


def test_order_is_that_of_the_sorted_paths(tmp_path):
    touch(tmp_path, "a/x.png", "a-b/x.png", "a.png", "a0/x.png", "b.png", "a/b/x.png", "B.png")
    found = names(ImageFolder(tmp_path))
    assert found == sorted(found) and len(found) == 7


def test_pipes_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "pipe.png", tmp_path / "link.png")
    touch(tmp_path, "a.png")
    assert names(open_source(tmp_path)) == ["a.png"]


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    touch(tmp_path / "elsewhere", "x.png")
    touch(tmp_path / "photos", "a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "link")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "loop")
    assert names(ImageFolder(tmp_path / "photos")) == ["a.png", "link/x.png"]


def test_a_name_that_is_no_unicode_is_kept(tmp_path):
    touch(tmp_path, "a.png")
    try:
        os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system wants Unicode names")
    source = ImageFolder(tmp_path)
    assert os.fsencode(source.name(0)) == b"\xff.png" and isinstance(read_image(source, 0), Image.Image)


def test_the_index_is_buffers_not_strings_and_travels(tmp_path):
    touch(tmp_path, *(f"{n}.png" for n in range(100)))
    source = ImageFolder(tmp_path)
    assert len(pickle.dumps(source)) < 100 * 20 + 1500
    again = pickle.loads(pickle.dumps(source))
    assert names(again) == names(source) and again.fingerprint() == source.fingerprint()


def test_the_fingerprint_changes_with_any_name(tmp_path):
    touch(tmp_path, "a.png", "bc.png")
    before = ImageFolder(tmp_path).fingerprint()
    os.rename(tmp_path / "bc.png", tmp_path / "bd.png")
    assert ImageFolder(tmp_path).fingerprint() != before


def test_unusable_paths_are_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "file.png").write_text("x")
    for path, message in (("none", "there is no folder"), ("empty", "it is empty"), ("texts", "1 files in it, but none is"),
                          ("file.png", "is a file, not a folder")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / path)


def test_formats_that_pillow_cannot_decode_are_not_taken_for_images():
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2"} <= suffixes
    assert not {".pdf", ".eps", ".h5", ".mpg", ".wmf", ".txt"} & suffixes


def roundtrip(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Picture.of(file).image()


def grey_levels(dtype):
    return np.linspace(0, np.iinfo(dtype).max, 64).astype(dtype).reshape(8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    if mode == "LAB":
        image = Image.new("LAB", (8, 8), (128, 128, 128))
    else:
        image = image.convert(mode)
    kind = "JPEG" if mode == "YCbCr" else "TIFF" if mode in ("CMYK", "LAB") else "PNG"
    if mode == "HSV":
        kind, image = "PNG", image.convert("RGB")
    decoded = roundtrip(image, kind)
    assert decoded.mode == "RGB" and decoded.size == (8, 8)


def test_transparent_pixels_are_white_also_in_a_palette():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    decoded = roundtrip(image)
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 1)) == (10, 20, 30)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 1), 1)
    decoded = roundtrip(palette, transparency=0)
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 1)) == (10, 20, 30)


def test_sixteen_bits_are_scaled_not_clipped():
    levels = grey_levels(np.uint16)
    decoded = np.asarray(roundtrip(Image.fromarray(levels)))
    assert (decoded == (levels >> 8)[..., None]).all()
    wide = np.asarray(roundtrip(Image.fromarray(levels.astype(np.int32)), "TIFF"))
    assert (wide == (levels >> 8)[..., None]).all()


def test_floats_are_stretched_to_their_range():
    values = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    decoded = np.asarray(roundtrip(Image.fromarray(values), "TIFF"))[..., 0]
    assert decoded.min() == 0 and decoded.max() == 255 and (np.diff(decoded.ravel().astype(int)) >= 0).all()


def test_the_camera_orientation_is_applied():
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 4, 4))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = roundtrip(image, "JPEG", exif=exif, quality=95)
    assert decoded.size == (4, 8)
    assert decoded.getpixel((2, 1))[2] > 200 and decoded.getpixel((2, 6))[0] > 200


def test_a_file_that_cannot_be_read_gives_its_reason_in_one_line(tmp_path):
    touch(tmp_path, "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    jpeg = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(jpeg, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (tmp_path / "cut.png").write_bytes(whole[:40])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "noise.png").write_bytes(whole[:20] + bytes(range(200)))
    os.symlink(tmp_path / "nowhere", tmp_path / "broken-link.png")
    source = ImageFolder(tmp_path)
    for index, name in enumerate(names(source)):
        result = read_image(source, index)
        if name == "good.png":
            assert isinstance(result, Image.Image)
        else:
            assert isinstance(result, str) and result and "\n" not in result, name


def listed(tmp_path, text, name="list.txt"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(tmp_path / name)


def test_a_list_has_its_images_in_sorted_order_relative_to_its_folder_or_absolute(tmp_path):
    touch(tmp_path, "photos/b.png", "photos/a.png", "a-b/x.png", "elsewhere/ü ü.dat")
    lines = ["photos/b.png", f"{tmp_path}/elsewhere/ü ü.dat", "photos/a.png", "a-b/x.png"]
    source = listed(tmp_path, "\n".join(lines))
    assert isinstance(source, ImageList) and source.root == str(tmp_path)
    assert names(source) == sorted(lines)
    assert all(isinstance(read_image(source, index), Image.Image) for index in range(4))
    assert names(listed(tmp_path, "\n".join(sorted(lines)) + "\n", "again.LIST")) == names(source)


def test_lines_are_relative_to_the_list_wherever_the_command_runs(tmp_path):
    touch(tmp_path, "here/a.png")
    source = listed(tmp_path, "a.png\n", "here/list.txt")
    assert isinstance(read_image(source, 0), Image.Image) and source.root == str(tmp_path / "here")


def test_lines_of_other_editors_and_of_find(tmp_path):
    touch(tmp_path, "a.png", "b b.png", "c.png")
    source = listed(tmp_path, b"\xef\xbb\xbf./b b.png\r\n\r\n./a.png\r\nc.png")
    assert names(source) == ["a.png", "b b.png", "c.png"]
    assert source.fingerprint() == ImageFolder(tmp_path).fingerprint()


def test_a_list_can_hold_names_that_are_no_unicode(tmp_path):
    touch(tmp_path, "a.png")
    source = listed(tmp_path, b"\xff.png\na.png\n")
    assert [os.fsencode(name) for name in names(source)] == [b"a.png", b"\xff.png"]


def test_a_list_is_buffers_too_and_a_sorted_one_is_never_held_as_lines(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{n:03}.png" for n in range(100)))
    text = "".join(f"{n:03}.png\n" for n in range(100))
    monkeypatch.setattr(folders_module, "in_order", None)
    source = listed(tmp_path, text)
    assert len(pickle.dumps(source)) < 100 * 20 + 1500
    assert names(pickle.loads(pickle.dumps(source))) == text.split()
    with pytest.raises(TypeError):  # as it would be for a list that is not sorted
        listed(tmp_path, text + "000.PNG\n")


def test_missing_files_and_folders_in_a_list_are_unreadable_images(tmp_path):
    touch(tmp_path, "a.png", "folder.png/x.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = listed(tmp_path, "a.png\nfolder.png\ngone.png\npipe.png\n")
    results = [read_image(source, index) for index in range(4)]
    assert isinstance(results[0], Image.Image) and results[2] == "no such file, or a link to one"
    assert results[1] == results[3] == "this is a folder or a device, not a file"


def test_unusable_lists_are_refused_in_words(tmp_path):
    touch(tmp_path, "a.png")
    for text, message in (
        (b"", "is empty; write the path of an image in each line"),
        (b"\n\r\n", "is empty"),
        (b"a.png\n./a.png\n", "'a.png' more than once; sort -u"),
        ("a.png\n".encode("utf-16"), "line 1 holds a zero byte; save it as UTF-8"),
        (b"b.png\nc.png\n", "of the first 2 files .* none exists, such as .*b.png; paths .* relative to"),
    ):
        with pytest.raises(InputError, match=message):
            listed(tmp_path, text)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_source(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    touch(tmp_path, "folder.txt/a.png")
    assert names(open_source(tmp_path / "folder.txt")) == ["a.png"]


def test_what_would_become_an_image_of_the_next_run(tmp_path):
    touch(tmp_path, "photos/a.png")
    os.symlink(tmp_path / "photos", tmp_path / "link")
    folder, some = ImageFolder(tmp_path / "link"), listed(tmp_path / "photos", "a.png\n")
    for path in ("photos/new/x.png", "link/x.png"):
        assert folder.would_take_in(tmp_path / path) and not some.would_take_in(tmp_path / path)
    assert not folder.would_take_in(tmp_path / "photos2")


def test_files_passed_over_are_counted_by_suffix_and_the_suffixes_are_bounded(tmp_path, monkeypatch):
    touch(tmp_path, "a.png")
    for name in ("a.txt", "b.TXT", "c.csv", "README", "scan.1", "scan.2"):
        (tmp_path / name).write_text("x")
    assert ImageFolder(tmp_path).skipped == {".txt": 2, ".csv": 1, "": 1, ".1": 1, ".2": 1}
    monkeypatch.setattr(folders_module, "SUFFIXES", 2)
    assert ImageFolder(tmp_path).skipped.total() == 6 and len(ImageFolder(tmp_path).skipped) == 3


def test_the_fingerprint_of_a_folder_stays_what_it_was(tmp_path):
    """So that a run from before can be resumed: a hash of the offsets and of all names."""
    touch(tmp_path, "b/c.png", "a.png")
    ends, together = np.array([0, 5, 12], np.int64), b"a.pngb/c.png"
    expected = blake2b(ends.tobytes() + together, digest_size=16).hexdigest()
    assert ImageFolder(tmp_path).fingerprint() == expected
    assert listed(tmp_path, "./a.png\nb/c.png\n").fingerprint() == expected


def test_a_large_folder_is_sorted_by_parts(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{part}/{n}.png" for part in ("a", "a-b", "b") for n in range(10)), "a.png", "a0.png")
    whole = names(ImageFolder(tmp_path))
    monkeypatch.setattr(index_module, "RUN", 3)
    assert names(ImageFolder(tmp_path)) == whole == sorted(whole)
    lines = [*whole]
    random.Random(0).shuffle(lines)
    assert names(listed(tmp_path, "\n".join(lines))) == whole


def test_a_csv_lists_images_in_the_column_of_that_name_or_else_in_the_first(tmp_path):
    touch(tmp_path, "photos/b.png", "photos/a, b.png", "c.png")
    wanted = ["c.png", "photos/a, b.png", "photos/b.png"]
    for text in ('id, Path ,x\n1,photos/b.png,\n2,"photos/a, b.png",y\n\n3,./c.png,z\n', 'filename\nc.png\n"photos/a, b.png"\nphotos/b.png\n',
                 'photos/b.png,1\n"photos/a, b.png",2\nc.png,3\n', "image,path\nno,c.png\nno,photos/b.png\nno,\"photos/a, b.png\"\n"):  # fmt: skip
        source = listed(tmp_path, text, "list.csv")
        assert names(source) == wanted and source.root == str(tmp_path)
        assert isinstance(read_image(source, 1), Image.Image)
    for text, message in (("a,path\n1\n", "line 2: there is no column 2"), ("c.png\nc.png\n", "more than once; leave one"),
                          ("path\n", "is empty"), ("c.png\n\0\n", "cannot be read as csv|zero byte")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            listed(tmp_path, text, "list.csv")


def tar(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            data = BytesIO()
            Image.new("RGB", (4, 4)).save(data, "PNG")
            entry = tarfile.TarInfo(member)
            entry.size = len(data.getvalue())
            archive.addfile(entry, BytesIO(data.getvalue()))
    return path


def test_shards_are_one_source_in_the_order_of_their_names(tmp_path):
    tar(tmp_path / "s/x-001.tar", "b.png", "a.png", "a.json", "a.cls")
    tar(tmp_path / "s/x-010.tar")
    tar(tmp_path / "s/x-002.tar", "a.png")
    wanted = ["x-001.tar/a.png", "x-001.tar/b.png", "x-002.tar/a.png"]
    for pattern in (
        "s/*.tar",
        "s/x-*.tar",
        "s/x-{001..002}.tar",
        "s/x-{002,001}.tar",
        "s/x-00[12].tar",
        f"{tmp_path}/s/*.tar",
        "s",
    ):
        source = open_source(pattern)
        assert names(source) == wanted and source.skipped == {".json": 1, ".cls": 1}, pattern
        assert all(isinstance(read_image(source, i), Image.Image) for i in range(3))
        assert source.path(2) == f"{tmp_path}/s/x-002.tar/a.png"
    assert names(open_source("s/x-{002..002}.tar")) == ["x-002.tar/a.png"]
    assert names(open_source("{s,s}/x-{002,010}.tar")) == ["s/x-002.tar/a.png"]
    prints = {open_source(p).fingerprint() for p in ("s/*.tar", "s", "s/x-002.tar", "s/x-00*2.tar", "s/x-00*1.tar")}
    assert len(prints) == 4


def test_a_boundary_between_shards_is_part_of_the_fingerprint(tmp_path):
    tar(tmp_path / "s/1.tar", "a.png", "b.png")
    tar(tmp_path / "s/2.tar", "c.png")
    tar(tmp_path / "t/1.tar", "a.png")
    tar(tmp_path / "t/2.tar", "b.png", "c.png")
    assert open_source("s").fingerprint() != open_source("t").fingerprint()


def test_a_folder_with_an_image_is_a_folder_of_images(tmp_path):
    tar(tmp_path / "p/1.tar", "a.png")
    assert names(open_source("p")) == ["1.tar/a.png"] and open_source("p").would_take_in("p/run/x.png")
    assert not open_source("p/*.tar").would_take_in("p/x.png")
    touch(tmp_path, "p/z.png")
    assert names(open_source("p")) == ["z.png"]


def test_patterns_that_cannot_be_used_are_refused_in_words(tmp_path):
    tar(tmp_path / "s/1.tar", "a.png")
    tar(tmp_path / "s/none.tar", "a.txt")
    touch(tmp_path, "s/x.png")
    for pattern, message in (
        ("s/*.zip", "nothing is named like"),
        ("s/{1..5}.tar", "there is no file s/2.tar, s/3.tar, s/4.tar and 1 more"),
        ("s/*", "stands for s/x.png too, but a pattern is for archives"),
        ("s/n*.tar", "no images in the 1 archives in .*: 1 files"),
        ("s/none.tar", "no images in .*: 1 files"),
        ("gone.tar", "gone.tar cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(pattern)
    touch(tmp_path, "[1]*/a.png")
    assert names(open_source("[1]*")) == ["a.png"]  # a folder may be named so


def test_several_inputs_are_one_source_whatever_their_order(tmp_path):
    touch(tmp_path, "b/2.png", "b/1.png", "a/1.png", "elsewhere/z.png")
    tar(tmp_path / "c.tar", "1.png")
    tar(tmp_path / "s/1.tar", "1.png")
    (tmp_path / "l.txt").write_text("elsewhere/z.png\n")
    given = ["b/", "./a", "c.tar", "s/*.tar", "l.txt"]
    source = open_source(given)
    assert names(source) == ["a/1.png", "b/1.png", "b/2.png", "c.tar/1.png", "l.txt/elsewhere/z.png", "s/1.tar/1.png"]
    assert all(isinstance(read_image(source, i), Image.Image) for i in range(6)) and len(source) == 6
    assert [source.path(i) for i in (0, 4)] == [f"{tmp_path}/a/1.png", f"{tmp_path}/elsewhere/z.png"]
    again = open_source(tuple(reversed(given)))
    assert names(again) == names(source) and again.fingerprint() == source.fingerprint()
    assert open_source(["a", "b"]).fingerprint() != open_source(["a", "elsewhere"]).fingerprint()
    assert open_source(["a", "b"]).would_take_in("b/x.png") and not open_source(["a", "b"]).would_take_in("x.png")
    assert not source.are_files and open_source(["a", "l.txt"]).are_files
    assert names(open_source(["a"])) == ["1.png"]


def test_an_input_that_is_given_twice_is_refused(tmp_path):
    touch(tmp_path, "a/b/1.png", "a-b/1.png")
    tar(tmp_path / "s/1.tar", "1.png")
    os.symlink(tmp_path / "a", tmp_path / "link")
    for given in (
        ["a", "a"],
        ["a", "./a/"],
        ["a", "a-b", "a/b"],
        ["link", "a"],
        ["s/1.tar", "s/*.tar"],
        ["s", "s/1.tar"],
    ):
        with pytest.raises(InputError, match="are one, or one lies in the other, so that images would count twice"):
            open_source(given)
    assert len(open_source(["a", "a-b"])) == 2
    (tmp_path / "l.txt").write_text("a-b/1.png\n")
    assert len(open_source(["a", "l.txt"])) == 2
    with pytest.raises(InputError, match="l.txt lists images of a-b, such as .*/a-b/1.png, so that they would count"):
        open_source(["a-b", "l.txt"])


def saved_table(path, rows, chunk=None, **options):
    """A table with a column of images: (bytes, path) each, or None."""
    table = pyarrow.table({"label": list(range(len(rows))), "image": pyarrow.array(
        [row and {"bytes": row[0], "path": row[1]} for row in rows],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))})  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=chunk)
        return
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=chunk)


def image_bytes(colour):
    data = BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(data, "PNG")
    return data.getvalue()


def test_parts_of_a_data_set_that_are_taken_together_are_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cache, "_said", set())
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        saved_table(tmp_path / "data" / f"{name}.parquet", [(image_bytes(number), "1.png")])
    assert len(open_source(tmp_path)) == 3
    said = capfd.readouterr().err
    assert f"{tmp_path} has the parts test and train, which are taken together; a pattern gives one: " in said
    pattern = said.split("'")[1]
    assert len(open_source(pattern)) == 2
    assert len(open_source(tmp_path / "data" / "train-*.parquet")) == 2 and capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_tables_of_images(tmp_path, suffix):
    rows = [(image_bytes(n), f"x/{n}.png" if n % 2 else None) for n in range(10)]
    rows[4], rows[6] = None, (None, "elsewhere.png")
    for chunk in (3, None):
        path = tmp_path / f"{chunk}{suffix}"
        saved_table(path, rows, chunk)
        for source in (open_source(path), open_source(path)):
            assert names(source) == [f"{n:08}" + (".png" if n % 2 or n == 6 else "") for n in range(10)]
            found = [read_image(source, i) for i in (*range(10), 2, 9, 0)]
            assert found[4] == found[6] == "there are no bytes in its row"
            assert [im.getpixel((0, 0))[0] for im in found if not isinstance(im, str)] == [
                0,
                1,
                2,
                3,
                5,
                7,
                8,
                9,
                2,
                9,
                0,
            ]
        os.utime(path, ns=(1, 1))
        assert "has changed" in read_image(source, 0)
    assert names(open_source(tmp_path))[9:11] == [f"3{suffix}/00000009.png", f"None{suffix}/00000000"]


def test_tables_that_cannot_be_used_are_refused_in_words(tmp_path, monkeypatch):
    rows = [(image_bytes(n), None) for n in range(3)]
    saved_table(tmp_path / "z.arrow", rows, options=pyarrow.ipc.IpcWriteOptions(compression="zstd"))
    parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "n.parquet")
    saved_table(tmp_path / "c.arrow", rows)
    saved_table(tmp_path / "c.parquet", rows)
    for name in ("c.arrow", "c.parquet"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-90])
    for name, message in (("z.arrow", "is compressed; write it without"), ("n.parquet", "no column of images, .* it has a, b"),
                          ("c.parquet", "copy or make it again"), ("c.arrow", "copy or make it again")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / name)
    saved_table(tmp_path / "big.parquet", rows)
    monkeypatch.setattr(tables, "LARGEST_GROUP", 10)
    with pytest.raises(InputError, match="row_group_size=100"):
        open_source(tmp_path / "big.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow; pip install 'data2vec_vision.hf.'"):
        open_source(tmp_path / "n.parquet")


def test_what_save_to_disk_writes(tmp_path, capfd):
    """As the library datasets lays it out: a folder with state.json, or one such folder for each part."""
    for part, colours in (("train", (1, 2, 3)), ("test", (4,))):
        files = [f"data-{n:05}-of-{len(colours):05}.arrow" for n in range(len(colours))]
        for name, colour in zip(files, colours):
            saved_table(tmp_path / "hf" / part / name, [(image_bytes(colour), None)])
        (tmp_path / "hf" / part / "cache-x.arrow").write_text("x")
        (tmp_path / "hf" / part / "dataset_info.json").write_text("{}")
        (tmp_path / "hf" / part / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": f} for f in files]})
        )
    for folder in ("hf", "hf/train"):
        (tmp_path / "hf/dataset_dict.json").write_text('{"splits": ["test", "train"]}')
        source = open_source(folder)
        assert [read_image(source, i).getpixel((0, 0))[0] for i in range(len(source))] == [1, 2, 3]
        assert source.would_take_in("hf/train/run") and names(source)[0].endswith("data-00000-of-00003.arrow/00000000")
    assert "hf has several parts; the images are those of train." in capfd.readouterr().err
    for text, message in (('{"splits": ["test", "more"]}', "has the parts test, more; give the folder of one"),
                          ('{"splits": ["more"]}', "has no part more"), ("[]", "no data set that can be read")):  # fmt: skip
        (tmp_path / "hf/dataset_dict.json").write_text(text)
        with pytest.raises(InputError, match=message):
            open_source("hf")
    (tmp_path / "hf/train/data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match="there is no file hf/train/data-00001-of-00003.arrow"):
        open_source("hf/train")


def test_too_many_open_files_are_no_images_fault(tmp_path, monkeypatch):
    """Else a run would go on with other images, and an extraction leave them out."""
    touch(tmp_path, "a.png")
    source = open_source(tmp_path)

    def full(path, mode="r"):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(source, 0)
