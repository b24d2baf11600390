"""Crops of an image that is not decoded before: the same pixels as of the whole, by every way there is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor

from data2vec_vision import images
from data2vec_vision.errors import Unreadable
from data2vec_vision.images import ORIENTATION, Picture, as_seen
from data2vec_vision.transforms import View, Views, augmentation


def photo(width=320, height=240, mode="RGB"):
    """Edges, gradients and a little noise, as in a photo."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    pixels = (
        pixels
        + random.integers(-6, 7, pixels.shape)
        + 60 * (np.add.outer(range(height), range(width)) % 97 < 40)[..., None]
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def stored(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def exact(file, box, size):
    """Decoded as a whole by Pillow, then cropped and resized by Pillow."""
    file.seek(0)
    top, left, height, width = box
    whole = as_seen(Image.open(file))
    part = whole.crop((left, top, left + width, top + height))
    return pil_to_tensor(part.resize(size[::-1], Image.Resampling.BICUBIC))


def difference(a, b):
    return (a.float() - b.float()).abs()


BOXES = [(0, 0, 240, 320), (10, 20, 90, 70), (100, 200, 64, 64), (239, 319, 1, 1)]
KINDS = {
    "PNG": ("RGB", "PNG", {}), "JPEG": ("RGB", "JPEG", {"quality": 92}), "grey JPEG": ("L", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True}), "CMYK JPEG": ("CMYK", "JPEG", {}),
    "JPEG of full colour": ("RGB", "JPEG", {"subsampling": 0}), "palette": ("P", "PNG", {}), "WebP": ("RGB", "WEBP", {}),
    "TIFF": ("RGB", "TIFF", {}), "BMP": ("RGB", "BMP", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_a_crop_is_that_of_the_whole_image(kind, box):
    mode, format, options = KINDS[kind]
    file = stored(photo(mode=mode), format, **options)
    [crop] = Picture.of(file).crops([box], [(48, 56)])
    assert crop.dtype == torch.uint8 and crop.shape == (3, 48, 56)
    off = difference(crop, exact(file, box, (48, 56)))
    assert off.mean() < 0.4 and off.max() <= 6  # two libraries decode, and two resize


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("shrink", [1, 4])
def test_cameras_are_turned_upright_before_the_crop(turn, shrink):
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    file = stored(photo(643, 485), "JPEG", exif=exif, quality=95)  # no multiples of what decoders work in
    picture = Picture.of(file)
    assert picture.size == ((485, 643) if turn > 4 else (643, 485))
    width, height = picture.size
    box, size = (
        (height // 8, width // 4, 3 * height // 4, width // 2),
        (3 * height // 4 // shrink, width // 2 // shrink),
    )
    off = difference(picture.crops([box], [size])[0], exact(file, box, size))
    assert off.mean() < (0.4 if shrink == 1 else 2)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_large_jpegs_are_decoded_smaller_and_look_the_same(factor, monkeypatch):
    """Mean difference of less than 2 of 255 levels; and only where 1.5 times the pixels needed are left a side."""
    file = stored(photo(1203, 905), "JPEG", quality=92)
    asked, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *a: asked.append(a[2]) or draft(*a))
    side = int(900 / (1.5 * factor))
    box = (3, 100, 900, 900)
    [crop] = Picture.of(file).crops([box], [(side, side)])
    assert asked == [(1203 // factor, 905 // factor)]
    off = difference(crop, exact(file, box, (side, side)))
    assert 0 < off.mean() < 2
    asked.clear()
    Picture.of(file).crops([box, (0, 0, 30, 30)], [(side, side), (30, 30)])  # of which one needs all there is
    assert asked == []


def test_all_of_a_huge_jpeg_is_resized_as_that_of_a_small_one(monkeypatch):
    """Bilinear, though its crops are bicubic: against Pillow's own of the image decoded smaller."""
    file = stored(photo(1200, 900), "JPEG", quality=92)
    small = Image.open(io.BytesIO(file.getvalue()))
    small.draft("RGB", (300, 225))
    small.load()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    ours = Picture.of(file).resized((150, 200))
    bilinear, bicubic = (
        difference(ours, pil_to_tensor(small.resize((200, 150), filter))).mean()
        for filter in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    )
    assert bilinear == 0 < bicubic


def test_crops_may_be_asked_for_again_finer_and_coarser():
    upright = stored(photo(800, 600), "JPEG", quality=95)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = stored(photo(800, 600), "JPEG", quality=95, exif=exif)
    for file in (upright, turned):
        picture = Picture.of(file)
        for box, size in [
            ((0, 0, 600, 600), (100, 100)),
            ((50, 60, 200, 200), (200, 200)),
            ((0, 0, 600, 600), (90, 90)),
        ]:
            off = difference(picture.crops([box], [size])[0], exact(file, box, size))
            assert off.mean() < 2


def test_without_torchvisions_decoder_pillows_does_it(monkeypatch):
    file = stored(photo(), "JPEG")
    expected = Picture.of(file).crops([BOXES[1]], [(40, 40)])[0]
    monkeypatch.setattr(images, "torchvision_reads_jpeg", lambda: False)
    file.seek(0)
    assert difference(Picture.of(file).crops([BOXES[1]], [(40, 40)])[0], expected).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("large", [False, True])
def test_a_truncated_file_is_unreadable_and_never_grey(format, large):
    data = stored(photo(900, 700), format).getvalue()
    size = (60, 60) if large else (500, 500)
    with pytest.raises(Unreadable) as error:
        Picture.of(io.BytesIO(data[: 2 * len(data) // 3])).crops([(0, 0, 700, 700)], [size])
    assert "\n" not in str(error.value) and "truncated" in str(error.value) and "decode_jpeg" not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"\xff\xd8\xff", b"\xff\xd8\xff" + bytes(100), b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_unreadable_with_a_reason(data):
    with pytest.raises(
        Unreadable, match="cannot identify image file|image file is truncated|it is empty|broken PNG"
    ) as error:
        Picture.of(io.BytesIO(data)).image()
    assert "Error" not in str(error.value)


def test_every_way_of_decoding_reads_the_same_files(monkeypatch):
    """Pillow decides: torchvision's decoder refuses some that end a byte early."""
    data = stored(photo(), "JPEG", quality=92).getvalue()

    def readable(left, use):
        try:
            use(Picture.of(io.BytesIO(data[:left])))
        except Unreadable as error:
            assert "truncated" in str(error) and "RuntimeError" not in str(error)
            return False
        return True

    def crop(picture):
        picture.crops([BOXES[0]], [(60, 80)])

    def refusing(*args, **kwargs):
        raise RuntimeError("decode_jpeg: not mine")

    for cut in (0, 1, 2, 3, 50, 1000):
        left = len(data) - cut
        assert readable(left, Picture.image) == readable(left, crop) == readable(left, Picture.pixels)
    monkeypatch.setattr(images, "decode_jpeg", refusing)
    assert readable(len(data), crop)


def test_boxes_are_distributed_as_torchvision_draws_them():
    """Mean and deviation of area, aspect and place of 4,000 crops of each."""
    view, size = View((8, 8), (0.2, 1.0)), (300, 200)
    torch.manual_seed(0)
    shape = torch.empty(1, 200, 300, device="meta")
    theirs = [RandomResizedCrop.get_params(shape, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    ours = [view.box(size) for _ in range(4000)]

    def figures(boxes):
        top, left, height, width = torch.tensor(boxes, dtype=torch.float64).T
        return torch.stack([height * width / 60000, (width / height).log(), top / 200, left / 300])

    a, b = figures(ours), figures(theirs)
    deviations = (a.mean(1) - b.mean(1)) / (b.std(1) / 4000**0.5 * 2**0.5)
    assert deviations.abs().max() < 4
    assert torch.allclose(a.std(1), b.std(1), rtol=0.06)
    for top, left, height, width in ours:
        assert top >= 0 and left >= 0 and height > 0 and width > 0 and top + height <= 200 and left + width <= 300
    assert max(t + h for t, _, h, _ in ours) == 200 and max(x + w for _, x, _, w in ours) == 300


@pytest.mark.parametrize("size", [(2000, 10), (10, 2000), (1, 1), (1, 50)])
def test_panoramas_and_dots_have_a_crop_in_the_middle(size):
    top, left, height, width = View((8, 8), (0.9, 1.0)).box(size)
    assert 0 < height <= size[1] and 0 < width <= size[0]
    assert abs(2 * left + width - size[0]) <= 1 and abs(2 * top + height - size[1]) <= 1


def test_several_views_decode_the_image_once_and_no_finer_than_the_finest_needs(monkeypatch):
    calls = []
    original = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", lambda *a, **k: calls.append(1) or original(*a, **k))
    views = Views(*[augmentation((16, 16), (0.05, 0.4))] * 3, augmentation((32, 32), (0.4, 1.0)))
    images.torchvision_reads_jpeg()
    calls.clear()
    found = views(Picture.of(stored(photo(64, 48), "JPEG")))
    assert [v.shape[-1] for v in found] == [16, 16, 16, 32] and len(calls) == 1


def test_views_take_transforms_of_pil_images_beside_their_own():
    views = Views(augmentation((16, 16)), pil_to_tensor)
    ours, whole = views(Picture.of(stored(photo(40, 30), "PNG")))
    assert ours.shape == (3, 16, 16) and whole.shape == (3, 30, 40)
    assert torch.equal(views(photo(40, 30))[1], whole)
