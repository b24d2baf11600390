"""What is noted of each image, and the sums over all of them, against numpy on the decoded pixels."""

import os

import numpy as np
import pytest
from PIL import Image

from data2vec_vision import survey as survey_module
from data2vec_vision.sources import open_source, read_image
from data2vec_vision.survey import ANIMATED, DEEP, GREY_IN_COLOUR, TRANSPARENT, TURNED, Chunks, Survey


def survey_of(path):
    source = open_source(path)
    survey = Survey.of(len(source))
    chunks = Chunks(source)
    for number in reversed(range(len(chunks))):  # the order of arrival does not matter
        survey.add(chunks[number])
    return source, survey


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_mean_and_std_are_those_of_all_pixels_with_each_image_weighing_the_same(images):
    source, survey = survey_of(images)
    pixels = [np.asarray(read_image(source, i), np.float64).reshape(-1, 3) / 255 for i in range(len(source))]
    mean = np.mean([p.mean(axis=0) for p in pixels], axis=0)
    square = np.mean([(p**2).mean(axis=0) for p in pixels], axis=0)
    ours = survey.mean_std()
    np.testing.assert_allclose(ours[0], mean, rtol=1e-12)
    np.testing.assert_allclose(ours[1], np.sqrt(square - mean**2), rtol=1e-10)
    assert len({p.shape for p in pixels}) > 1


def test_records_have_size_content_and_look(images):
    source, survey = survey_of(images)
    assert len(source) > survey_module.CHUNK  # so that there are two chunks
    for index in range(len(source)):
        record, image = survey.records[index], read_image(source, index)
        assert (record["width"], record["height"]) == image.size and not record["blank"]
        assert record["look"].tolist() == survey_module.look(image).tolist()
    assert survey.formats == {"JPEG": 18, "PNG": 6} and survey.modes == {"RGB": 24} and not survey.bad
    assert survey.bytes == sum(os.path.getsize(images / source.name(i)) for i in range(24)) and survey.seconds > 0


def test_content_is_that_of_the_file_not_of_the_picture(tmp_path):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    Image.open(tmp_path / "a.png").save(tmp_path / "c.bmp")
    Image.fromarray(noise(8, 8, 3, seed=1)).save(tmp_path / "d.png")
    records = survey_of(tmp_path)[1].records
    assert (records["content"][0] == records["content"][1]).all()
    assert len(np.unique(records["content"], axis=0)) == 3


def save_odd(folder, name):
    """One image of a kind, and the traits that it has."""
    image = Image.fromarray(noise(12, 20, 3))
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / name, exif=exif)
    elif name == "upright.jpg":
        exif = Image.Exif()
        exif[0x0112] = 1
        image.save(folder / name, exif=exif)
    elif name == "grey.png":
        image.convert("L").convert("RGB").save(folder / name)
    elif name == "honest-grey.png":
        image.convert("L").save(folder / name)
    elif name == "same-histograms.png":  # not grey: the same bytes in another order in each channel
        plane = noise(12, 20)
        Image.fromarray(np.stack([plane, plane[::-1], plane], axis=2)).save(folder / name)
    elif name == "clear.png":
        Image.fromarray(noise(12, 20, 4), "RGBA").save(folder / name)
    elif name == "deep.png":
        Image.fromarray(noise(12, 20).astype(np.uint16) * 257).save(folder / name)
    elif name == "moving.gif":
        image.save(folder / name, save_all=True, append_images=[Image.fromarray(noise(12, 20, 3, seed=1))])
    else:
        image.save(folder / name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "traits"),
    [("plain.png", []), ("turned.jpg", [TURNED]), ("upright.jpg", []), ("grey.png", [GREY_IN_COLOUR]),
     ("honest-grey.png", []), ("same-histograms.png", []), ("clear.png", [TRANSPARENT]), ("deep.png", [DEEP]),
     ("moving.gif", [ANIMATED]), ("still.gif", [])],
)  # fmt: skip
def test_traits(tmp_path, name, traits):
    save_odd(tmp_path, name)
    survey = survey_of(tmp_path)[1]
    assert survey.traits == dict.fromkeys(traits, 1)
    size = (survey.records["width"][0], survey.records["height"][0])
    assert size == ((12, 20) if name == "turned.jpg" else (20, 12))  # upright


def test_colour_of_sixteen_bits_is_noticed_although_pillow_opens_it_as_eight(tmp_path):
    """A PNG with 16-bit colour, written by hand: Pillow cannot."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + noise(6, seed=n).astype(">u2").tobytes() for n in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    survey = survey_of(tmp_path)[1]
    assert survey.modes == {"RGB": 1} and survey.traits[DEEP] == 1


def test_blank_is_one_colour_and_not_one_channel(tmp_path):
    Image.new("RGB", (9, 9), (7, 200, 3)).save(tmp_path / "a.png")
    pixels = np.full((9, 9, 3), 7, np.uint8)
    pixels[0, 0, 1] = 8
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert survey_of(tmp_path)[1].records["blank"].tolist() == [True, False]


def test_unreadable_files_have_a_reason_and_do_not_count(tmp_path):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    os.symlink("nowhere", tmp_path / "link.png")
    source, survey = survey_of(tmp_path)
    reasons = {source.name(index): reason for index, reason in survey.bad.items()}
    assert reasons["empty.png"] == "cannot identify image file: it is empty"
    assert reasons["text.jpg"] == "cannot identify image file: of no format that Pillow reads"
    assert reasons["link.png"] == "no such file, or a link to one" and "truncated" in reasons["cut.png"]
    assert [source.name(index) for index in survey.readable] == ["good.png"] and survey.formats == {"PNG": 1}
    alone = survey_of(tmp_path)[1]
    np.testing.assert_array_equal(alone.moments, survey.moments)


def test_memory_for_an_image_is_a_few_bytes():
    assert survey_module.RECORD.itemsize <= 48
