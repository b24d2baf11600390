"""Folders of images as users have them: any depth, any format, any mode, damaged files in between."""

import os
import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from data2vec_vision import folders as folders_module
from data2vec_vision.errors import InputError
from data2vec_vision.images import decode, image_suffixes
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
    return decode(file)


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
