"""Images as they come: modes and formats, any number of channels, parts of large ones, and what is refused with what words."""

import io
import sys

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from torchvision.transforms.v2.functional import resized_crop_image

from data2vec_vision import arrays, images, tiff
from data2vec_vision.errors import MissingExtra, OtherChannels, Unreadable
from data2vec_vision.images import Picture

H, W = 13, 17
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (H, W, 5), np.uint8)
SHORTS = RNG.integers(0, 65536, (H, W, 5), np.uint16)
FLOATS = RNG.normal(0, 100, (H, W, 5)).astype(np.float32)
SIGNED = RNG.integers(-1000, 1000, (H, W, 5), np.int16)
GREY, RGB, RGBA = BYTES[..., :1], BYTES[..., :3], BYTES[..., :4]


def pil(pixels, mode, format="PNG", **options):
    file = io.BytesIO()
    image = Image.frombytes("CMYK", (W, H), pixels) if mode == "CMYK" else Image.fromarray(pixels.squeeze())
    image = image if image.mode == mode else image.convert(mode)
    image.save(file, format, **options)
    return file


def tif(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file


def npy(pixels):
    file = io.BytesIO()
    np.save(file, pixels)
    return file


def dcm(pixels, photometric="MONOCHROME2", frames=1, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = pixels.shape[-3:-1] if photometric == "RGB" else pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if photometric == "RGB" else 1), photometric
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if photometric == "RGB":
        data.PlanarConfiguration = 0
    if frames > 1:
        data.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file


def chw(pixels):
    """[H, W] or [H, W, C] -> float64 [C, H, W]."""
    return np.moveaxis(np.atleast_3d(pixels).astype(np.float64), 2, 0)


def luma(rgb):
    return np.tensordot([0.299, 0.587, 0.114], chw(rgb), 1)[None]


def over_white(rgba):
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def stretched(pixels):
    return 255 * (chw(pixels) - float(pixels.min())) / (float(pixels.max()) - float(pixels.min()))


def three(grey):
    return np.repeat(chw(grey), 3, axis=0)


palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
PALETTE = np.asarray(palette.convert("RGB"))
CMYK = np.asarray(Image.fromarray(RGB).convert("CMYK"))
TURNED = Image.Exif()
TURNED[0x0112] = 6
BIT = GREY[..., 0] > 127
HOUNSFIELD = {"RescaleSlope": 2, "RescaleIntercept": -1024}
plain = {"photometric": "minisblack"}
tiled = plain | {"tile": (16, 16)}

# A file, and for a number of channels its pixels, [C, H, W]: of three channels in 0 to 255, else as they are to be.
CASES = {
    "png 1": (pil(BIT, "1"), {1: chw(BIT), 3: three(255 * BIT)}),
    "png L": (pil(GREY, "L"), {1: chw(GREY) / 255, 3: three(GREY)}),
    "png LA": (pil(BYTES[..., :2], "LA"), {2: chw(BYTES[..., :2]) / 255}),
    "png P": (pil(np.asarray(palette), "L"), {1: chw(np.asarray(palette)) / 255}),
    "png RGB": (pil(RGB, "RGB"), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "png RGBA": (pil(RGBA, "RGBA"), {1: luma(over_white(RGBA)) / 255, 3: chw(over_white(RGBA)), 4: chw(RGBA) / 255}),
    "png I;16": (pil(SHORTS[..., 0], "I;16"), {1: chw(SHORTS[..., 0]) / 65535, 3: three(SHORTS[..., 0] >> 8)}),
    "png turned": (pil(RGB, "RGB", exif=TURNED), {1: luma(np.rot90(RGB, -1)) / 255, 3: chw(np.rot90(RGB, -1))}),
    "gif P": (pil(np.zeros((H, W), np.uint8), "P", "GIF"), {1: np.zeros((1, H, W)), 3: np.zeros((3, H, W))}),
    "bmp RGB": (pil(RGB, "RGB", "BMP"), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "tga L": (pil(GREY, "L", "TGA"), {1: chw(GREY) / 255, 3: three(GREY)}),
    "webp RGB": (pil(RGB, "RGB", "WEBP", lossless=True), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "webp RGBA": (pil(RGBA, "RGBA", "WEBP", lossless=True, exact=True), {3: chw(over_white(RGBA)), 4: chw(RGBA) / 255}),
    "pgm": (pil(GREY, "L", "PPM"), {1: chw(GREY) / 255, 3: three(GREY)}),
    "pgm 16": (pil(SHORTS[..., 0].astype(np.int32), "I", "PPM"), {1: chw(SHORTS[..., 0]) / 65535}),
    "jpeg L": (pil(0 * GREY + 200, "L", "JPEG"), {1: np.full((1, H, W), 200 / 255), 3: np.full((3, H, W), 200)}),
    "jpeg CMYK": (pil(0 * CMYK + 200, "CMYK", "JPEG", quality=100), {4: np.full((4, H, W), 200 / 255)}),
    "jp2 RGB": (pil(RGB, "RGB", "JPEG2000"), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "tiff 1": (pil(BIT, "1", "TIFF"), {1: chw(BIT), 3: three(255 * BIT)}),
    "tiff P": (pil(np.asarray(palette), "L", "TIFF"), {1: chw(np.asarray(palette)) / 255}),
    "tiff RGB": (pil(RGB, "RGB", "TIFF"), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "tiff RGB lzw": (pil(RGB, "RGB", "TIFF", compression="tiff_lzw"), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "tiff RGBA": (pil(RGBA, "RGBA", "TIFF"), {1: luma(over_white(RGBA)) / 255, 3: chw(over_white(RGBA)), 4: chw(RGBA) / 255}),
    "tiff CMYK": (pil(CMYK, "CMYK", "TIFF"), {4: chw(CMYK) / 255}),
    "tiff white is 0": (tif(GREY[..., 0], photometric="miniswhite"), {1: 1 - chw(GREY) / 255, 3: three(255 - GREY)}),
    "tiff turned": (tif(SHORTS[..., 0], extratags=[(274, "H", 1, 6, True)]), {1: chw(np.rot90(SHORTS[..., 0], -1)) / 65535, 3: three(np.rot90(SHORTS[..., 0], -1) >> 8)}),
    "tiff uint16": (tif(SHORTS[..., 0]), {1: chw(SHORTS[..., 0]) / 65535, 3: three(SHORTS[..., 0] >> 8)}),
    "tiff uint16 big-endian": (tif(SHORTS[..., 0], byteorder=">"), {1: chw(SHORTS[..., 0]) / 65535}),
    "tiff 12 bits": (tif(SHORTS[..., 0] >> 4, bitspersample=12, compression=None), {1: chw(SHORTS[..., 0] >> 4) / 4095}),
    "tiff int16": (tif(SIGNED[..., 0]), {1: chw(SIGNED[..., 0])}),
    "tiff float32": (tif(FLOATS[..., 0]), {1: chw(FLOATS[..., 0]), 3: np.repeat(stretched(FLOATS[..., 0]), 3, 0)}),
    "tiff float64": (tif(FLOATS[..., 0].astype(np.float64)), {1: chw(FLOATS[..., 0])}),
    "tiff 5 samples": (tif(SHORTS, **plain, planarconfig="contig"), {5: chw(SHORTS) / 65535}),
    "tiff 5 planes": (tif(SHORTS.transpose(2, 0, 1), **plain, planarconfig="separate"), {5: chw(SHORTS) / 65535}),
    "tiff 5 pages": (tif(SHORTS.transpose(2, 0, 1)), {5: chw(SHORTS) / 65535, 1: chw(SHORTS[..., 0]) / 65535}),
    "tiff a page a row": (tif(SHORTS), {5: chw(SHORTS) / 65535}),
    "tiff ImageJ": (tif(SHORTS.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"}), {5: chw(SHORTS) / 65535}),
    "tiff OME": (tif(SHORTS.transpose(2, 0, 1), ome=True, metadata={"axes": "CYX"}), {5: chw(SHORTS) / 65535}),
    "tiff a stack": (tif(SHORTS.transpose(2, 0, 1), metadata={"axes": "ZYX"}), {1: chw(SHORTS[..., 0]) / 65535}),
    "tiff tiles": (tif(BYTES, **tiled, planarconfig="contig", compression="deflate"), {5: chw(BYTES) / 255}),
    "tiff tiled planes": (tif(FLOATS.transpose(2, 0, 1), **tiled, planarconfig="separate", compression="lzw"), {5: chw(FLOATS)}),
    "tiff tiled deep planes": (tif(SHORTS.transpose(2, 0, 1), **tiled, planarconfig="separate", compression="deflate"), {5: chw(SHORTS) / 65535}),
    "tiff strips": (tif(SHORTS, **plain, planarconfig="contig", rowsperstrip=4, compression="zstd"), {5: chw(SHORTS) / 65535}),
    "tiff RGB uint16": (tif(SHORTS[..., :3], photometric="rgb"), {1: luma(SHORTS[..., :3]) / 65535, 3: chw(SHORTS[..., :3] >> 8)}),
    "npy uint8": (npy(GREY[..., 0]), {1: chw(GREY) / 255, 3: three(GREY)}),
    "npy RGB": (npy(RGB), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "npy C first": (npy(RGB.transpose(2, 0, 1)), {1: luma(RGB) / 255, 3: chw(RGB)}),
    "npy uint16": (npy(SHORTS), {5: chw(SHORTS) / 65535}),
    "npy float16": (npy(FLOATS.astype(np.float16)), {5: chw(FLOATS.astype(np.float16))}),
    "npy float32 big-endian": (npy(FLOATS.astype(">f4")), {5: chw(FLOATS)}),
    "npy int16": (npy(SIGNED), {5: chw(SIGNED)}),
    "npy uint32": (npy(SHORTS.astype(np.uint32)), {5: chw(SHORTS)}),
    "npy bool": (npy(BIT), {1: chw(BIT), 3: three(255 * BIT)}),
    "npy Fortran": (npy(np.asfortranarray(SHORTS)), {5: chw(SHORTS) / 65535}),
    "npy not finite": (npy(np.where(BIT, np.nan, FLOATS[..., 0])), {1: chw(np.where(BIT, 0, FLOATS[..., 0]))}),
    "npy float RGB": (npy(FLOATS[..., :3]), {3: stretched(FLOATS[..., :3])}),
    "dicom CT": (dcm(SIGNED[..., 0], **HOUNSFIELD), {1: 2 * chw(SIGNED[..., 0]) - 1024, 3: np.repeat(stretched(SIGNED[..., 0]), 3, 0)}),
    "dicom window": (dcm(SIGNED[..., 0], WindowCenter=[100.5, 0], WindowWidth=[201, 9]), {3: three((255 * (SIGNED[..., 0] / 200.0)).clip(0, 255))}),
    "dicom inverted": (dcm(SHORTS[..., 0], "MONOCHROME1"), {1: 65535 - chw(SHORTS[..., 0]), 3: 255 - np.repeat(stretched(SHORTS[..., 0]), 3, 0)}),
    "dicom inverted signed": (dcm(SIGNED[..., 0], "MONOCHROME1"), {1: -1 - chw(SIGNED[..., 0])}),
    "dicom frames": (dcm(np.stack([GREY[..., 0]] * 3), frames=3), {1: chw(GREY)}),
    "dicom RGB": (dcm(RGB, "RGB"), {1: luma(RGB) / 255, 3: chw(RGB)}),
}  # fmt: skip


def read(file, channels):
    file.seek(0)
    return Picture.of(file, channels)


def pixels_of(picture):
    image = picture.image()
    return image.double().numpy() if isinstance(image, torch.Tensor) else chw(np.asarray(image))


@pytest.mark.parametrize(("name", "channels"), [(name, n) for name, (_, wanted) in CASES.items() for n in wanted])
def test_modes_and_formats_are_read_right(name, channels):
    file, wanted = CASES[name]
    picture, expected = read(file, channels), wanted[channels]
    assert picture.size == (expected.shape[2], expected.shape[1])
    # Greys and what lies over white are rounded to bytes on the way, and bytes of a photo may be off by one.
    tolerance = 1.01 if channels == 3 else 1e-6 * abs(expected).max()
    if channels == 1 and ("RGB" in name or "turned" in name):
        tolerance = 1 / 255
    np.testing.assert_allclose(pixels_of(picture), expected, rtol=0, atol=tolerance)
    crop, all_of_it = read(file, channels).crops([(2, 3, 6, 8)], [(6, 8)])[0], picture.resized(expected.shape[1:])
    assert crop.dtype == all_of_it.dtype == (torch.uint8 if channels == 3 else torch.float32)
    np.testing.assert_allclose(crop.double(), expected[:, 2:8, 3:11], rtol=0, atol=tolerance)
    np.testing.assert_allclose(all_of_it.double(), expected, rtol=0, atol=tolerance)
    assert picture.glimpses().shape[0] == channels


def test_heif_is_read():
    import pillow_heif

    assert images.register_heif()
    file = io.BytesIO()
    smooth = np.asarray(Image.fromarray(RGB[:3, :3]).resize((64, 64), Image.Resampling.BICUBIC))
    pillow_heif.from_pillow(Image.fromarray(smooth)).save(file, quality=100)
    for channels, expected, unit in ((3, chw(smooth), 1), (1, luma(smooth) / 255, 255)):
        assert abs(pixels_of(read(file, channels)) - expected).mean() * unit < 4


@pytest.mark.parametrize(
    ("name", "channels", "reason"),
    [
        ("npy uint16", 3, "it has 5 channels; give --channels 5"),
        ("npy uint16", 1, "it has 5 channels, not 1"),
        ("tiff 5 samples", 3, "it has 5 channels; give --channels 5"),
        ("tiff 5 planes", 3, "it has 5 channels; give --channels 5"),
        ("tiff tiled deep planes", 3, "it has 5 channels; give --channels 5"),
        ("tiff tiles", 4, "it has 5 channels, not 4"),
        ("tiff OME", 4, "it has 5 channels, not 4"),
        ("png RGB", 5, "it has 3 channels, not 5"),
        ("png L", 2, "it has 1 channel, not 2"),
        ("jpeg L", 4, "it has 1 channel, not 4"),
        ("dicom RGB", 5, "it has 3 channels, not 5"),
        ("dicom CT", 2, "it has 1 channel, not 2"),
    ],
)
def test_another_number_of_channels_is_said_when_the_header_is_read(name, channels, reason):
    with pytest.raises(OtherChannels, match=f"^{reason}$"):
        read(CASES[name][0], channels)


def test_cmyk_and_grey_with_alpha_have_a_grey_of_their_own():
    for file, mode in ((CASES["tiff CMYK"][0], "CMYK"), (pil(BYTES[..., :2], "LA", "TIFF"), "LA")):
        expected = (
            chw(Image.open(file).convert("L") if mode == "CMYK" else images.as_seen(images.opened(file)).convert("L"))
            / 255
        )
        np.testing.assert_allclose(pixels_of(read(file, 1)), expected, atol=1 / 255)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("npy", "dicom", "tiff", "png", "jp"))])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_is_cut_off_is_unreadable_or_read_and_never_ends_a_run(name, share):
    file, wanted = CASES[name]
    cut = io.BytesIO(file.getvalue()[: int(share * len(file.getvalue()))])
    channels = next(iter(wanted))
    try:
        assert len(pixels_of(read(cut, channels))) == channels
    except Unreadable as error:
        assert "\n" not in str(error) and str(error)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 5)), "an array of shape"),
        (np.zeros((0, 5, 5)), "it is empty"),
        (np.zeros((5, 5), complex), "complex128, which is no number of an image"),
        (np.zeros((5, 5), "U3"), "which is no number of an image"),
        (np.array([[{}]], object), "Python objects, which are not loaded"),
        (np.zeros((5, 5), [("a", "f4")]), "which is no number of an image"),
    ],
)
def test_arrays_that_are_no_images_are_refused_in_words(array, reason):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    with pytest.raises(Unreadable, match=reason):
        read(file, 3)


def test_without_an_extra_the_reason_says_what_to_install(monkeypatch):
    missing = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    for name, channels, extra in (("tiff 5 samples", 5, "tiff"), ("dicom CT", 1, "dicom")):
        with pytest.raises(MissingExtra, match=rf"^needs pip install 'data2vec_vision\[{extra}\]'$"):
            read(CASES[name][0], channels)
    np.testing.assert_allclose(pixels_of(read(CASES["tiff RGB"][0], 3)), chw(RGB))  # Pillow does without
    np.testing.assert_allclose(pixels_of(read(CASES["tiff uint16"][0], 1)), CASES["tiff uint16"][1][1], atol=1e-6)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images.register_heif.cache_clear()
    with pytest.raises(MissingExtra, match="heif"):
        read(io.BytesIO(b"\0\0\0\x18ftypheic" + bytes(200)), 3)
    images.register_heif.cache_clear()


def test_a_codec_that_is_missing_is_said(monkeypatch):
    class NoCodecs:
        def __getitem__(self, key):
            raise KeyError(f"{key} requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", NoCodecs(), raising=False)
    with pytest.raises(MissingExtra, match="tiff"):
        read(CASES["tiff tiles"][0], 5)


# Large images: what is read of them. The limits are made so small that those above are large.


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(arrays, "KEPT_BYTES", 0)
    monkeypatch.setattr(images, "LARGE_TIFF", 0)


SMOOTH = np.asarray(Image.fromarray(RGB).resize((300, 200), Image.Resampling.BICUBIC))
BOXES = [(0, 0, 200, 300), (10, 20, 64, 96), (100, 7, 90, 200), (3, 250, 50, 50)]
SIZES = [(32, 32), (48, 40), (16, 16), (64, 64)]
LAYOUTS = {
    "tiles": dict(tile=(32, 48), compression="deflate"),
    "tiled planes": dict(tile=(32, 32), planarconfig="separate"),
    "strips": dict(rowsperstrip=7, compression="lzw"),
    "one piece": dict(),
}


@pytest.mark.parametrize("band_bytes", [1, 2**24])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_crops_of_parts_are_those_of_the_whole_image(all_are_large, monkeypatch, layout, channels, band_bytes):
    monkeypatch.setattr(arrays, "BAND_BYTES", band_bytes)
    stored = np.concatenate([SMOOTH, SMOOTH[::-1]], axis=2) if channels == 6 else SMOOTH
    photometric = "minisblack" if channels == 6 else "rgb"
    options = dict(planarconfig="contig") | LAYOUTS[layout]
    separate = options["planarconfig"] == "separate"
    picture = read(tif(stored.transpose(2, 0, 1) if separate else stored, photometric=photometric, **options), channels)
    assert picture.is_large and isinstance(picture.raster, tiff.TiffRaster)
    whole = torch.from_numpy(luma(stored) if channels == 1 else chw(stored)).float()
    for crop, box, size in zip(picture.crops(BOXES, SIZES), BOXES, SIZES):
        expected = resized_crop_image(whole, *box, list(size), images.BICUBIC)
        if channels != 3:
            crop = 255 * crop
        # Where more than six rows become one some are averaged first, which is a little softer.
        limit = 12 if box[2] > 6 * size[0] and band_bytes == 1 else 1.01
        assert (crop.float() - expected.clamp(0, 255) if channels == 3 else crop - expected).abs().max() < limit
    small = torch.nn.functional.interpolate(whole[None], (20, 30), mode="bilinear", antialias=True)[0]
    assert (picture.resized((20, 30)).float() * (1 if channels == 3 else 255) - small).abs().max() < 8


def test_only_the_tiles_are_decoded_that_a_crop_touches_and_each_once(all_are_large, monkeypatch):
    picture, decoded = read(tif(SMOOTH, photometric="rgb", tile=(32, 32), compression="deflate"), 3), []
    tile = tiff.TiffRaster._tile
    monkeypatch.setattr(tiff.TiffRaster, "_tile", lambda self, page, n: decoded.append(n) or tile(self, page, n))
    picture.crops([(40, 70, 20, 50)], [(16, 16)])
    assert sorted(decoded) == [12, 13]  # of 10 tiles a row, the third and the fourth of the second row
    decoded.clear()
    monkeypatch.setattr(arrays, "BAND_BYTES", 1)
    picture.crops([(40, 0, 150, 300)], [(16, 16)])
    assert sorted(decoded) == list(range(10, 60))


def test_a_level_of_a_pyramid_serves_that_is_still_fine_enough(all_are_large):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for value, step in ((10, 1), (20, 2), (40, 4)):
            more = {"subifds": 2} if step == 1 else {"subfiletype": 1}
            level = np.full((512 // step, 512 // step, 3), value, np.uint8)
            writer.write(level, tile=(64, 64), photometric="rgb", **more)
    picture = read(file, 3)
    assert picture.size == (512, 512)
    for side, value in ((200, 10), (80, 20), (40, 40)):  # six and twelve of the first become one
        assert picture.crops([(0, 0, 512, 512)], [(side, side)])[0].unique().tolist() == [value]
    assert picture.crops([(300, 300, 200, 200)], [(100, 100)])[0].unique().tolist() == [10]


def test_a_large_npy_is_mapped_and_only_rows_of_a_crop_are_read(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint16, (20_000, 20_000))
    array[500:520, 700:720] = 65535
    array.flush()
    with open(tmp_path / "a.npy", "rb") as file:
        picture = Picture.of(file, 1)
        assert float(picture.crops([(500, 700, 20, 20)], [(10, 10)])[0].min()) == 1
        assert isinstance(picture.raster.load().base, np.memmap) and picture.raster._pixels is None
        assert float(picture.glimpses().max()) == 0


def test_what_is_too_large_to_be_decoded_whole_is_refused_unless_less_will_do(monkeypatch):
    file, jpeg, png = tif(SMOOTH, photometric="rgb", tile=(32, 32)), pil(SMOOTH, "RGB", "JPEG"), pil(SMOOTH, "RGB")
    array = npy(SMOOTH)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # of 60,000
    monkeypatch.setattr(arrays, "KEPT_BYTES", 0)
    for picture in (read(file, 3), read(jpeg, 3)):
        (crop,) = picture.crops([(0, 0, 200, 300)], [(16, 16)])
        expected = chw(np.asarray(Image.fromarray(SMOOTH).resize((16, 16), Image.Resampling.BICUBIC)))
        assert abs(crop.double().numpy() - expected).mean() < 6
        assert picture.resized((16, 16)).shape == (3, 16, 16) and picture.image(most=30).size == (30, 20)
        with pytest.raises(Unreadable):
            picture.image()
    (small,) = read(jpeg, 3).crops([(0, 0, 100, 100)], [(90, 90)])  # of a fourth of the pixels a side
    expected = chw(np.asarray(Image.fromarray(SMOOTH[:100, :100]).resize((90, 90), Image.Resampling.BICUBIC)))
    assert abs(small.double().numpy() - expected).mean() < 20
    with pytest.raises(Unreadable, match="decompression bomb"):
        read(png, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # of which an eighth of the pixels a side is too much as well
    with pytest.raises(Unreadable, match="too many, and it cannot be decoded with fewer"):
        read(jpeg, 3).crops([(0, 0, 200, 300)], [(9, 9)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(Unreadable, match="one piece for the decoder"):
        read(array, 3).crops([(0, 0, 9, 9)], [(9, 9)])  # not a file of the disk
