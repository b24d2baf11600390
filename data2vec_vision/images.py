"""From an image file to pixels: the whole image in RGB, or only crops of it, which takes less time.

What is no photo, or has to have another number of channels, is an ArrayPicture. Shapes: H x W pixels of a crop that
was asked for, N channels.
"""

import functools
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, resize_image, to_pil_image

from data2vec_vision import tiff
from data2vec_vision.arrays import ArrayPicture, Box, GreyPicture, within
from data2vec_vision.dicom import MARK, dicom_raster
from data2vec_vision.errors import MissingExtra, OtherChannels, explained, quiet
from data2vec_vision.modes import is_8_bit, pillow_raster
from data2vec_vision.rasters import NUMPY, numpy_raster

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, Image.Resampling.BILINEAR
JPEG = b"\xff\xd8\xff"  # how such a file begins
SIDES, SAMPLES = (256, 257), 277  # TIFF's tags: width and height, channels
ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 2 to 8 are turned or mirrored
REDUCE = 1.5  # times as fine as needed, at least, stays an image that the decoder makes smaller
START = 132  # bytes by which all formats are known
LARGE_TIFF = 2**24  # pixels; beyond, only the tiles are decoded that a crop touches
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}

# Of formats whose extras may be missing: their files are images, and unreadable ones then.
MORE_SUFFIXES = {".npy", ".tif", ".tiff", ".dcm", ".dicom", ".heic", ".heif", ".hif"}
# Formats that Pillow recognises without being able to decode them by itself, and EPS, a program, for which it would
# start Ghostscript, whatever the name of the file.
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_suffixes() -> frozenset[str]:
    """The lower-case file suffixes, with their dot, of all formats that Pillow can read here, or an extra could."""
    return frozenset(MORE_SUFFIXES).union(
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in UNDECODABLE
    )


def opened(file: BinaryIO) -> Image.Image:
    """An image file with its header read. Raises UnidentifiedImageError for one that Pillow cannot make out."""
    quiet("PIL")
    Image.init()  # all formats are known then
    try:
        return Image.open(file, formats=[name for name in Image.ID if name not in UNDECODABLE])
    except UnidentifiedImageError as error:
        why = "of no format that Pillow reads" if file.seek(0, os.SEEK_END) else "it is empty"
        raise UnidentifiedImageError(f"cannot identify image file: {why}") from error


def opened_jpeg(file: BinaryIO) -> Image.Image:
    """A JPEG with its header read, of any size: the decoder may make it smaller."""
    try:
        return Image.open(file, formats=["JPEG"])
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("cannot identify image file: it begins as a JPEG and is none") from error
    except Image.DecompressionBombError:
        file.seek(0)
        return JpegImagePlugin.jpeg_factory(file)


def as_seen(image: Image.Image) -> Image.Image:
    """An opened image as every job of this tool sees it: upright, in RGB, 8 bits a channel.

    EXIF orientation is applied and transparency is laid over white. Greys of more than 8 bits are scaled,
    where Pillow's own conversion would clip them: 16 bits by their range of 65,536, 32 bits and floats by the
    image's own range, unless 32 bits hold values that fit into 16. Raises whatever Pillow raises for a file
    that is damaged, truncated or too large.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, np.uint16) >> 8)
    if image.mode == "I":
        pixels = np.asarray(image)
        low, high = int(pixels.min()), int(pixels.max())
        # Pillow has opened 16-bit PNGs in this mode too.
        return _grey(pixels >> 8) if low >= 0 and high < 65536 else _stretched(pixels)
    if image.mode == "F":
        return _stretched(np.nan_to_num(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _stretched(pixels: np.ndarray) -> Image.Image:
    low, high = float(pixels.min()), float(pixels.max())
    return _grey((pixels - low) * (255 / max(high - low, 1e-12)))


def _grey(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


class Picture:
    """An image, upright, in RGB, 8 bits a channel, of which crops can be had.

    Only its header is read at once, but for a PNG, whose orientation may stand behind its pixels. `image` is
    Pillow's, opened but not loaded, and `file` what it was opened from, where that is at hand. The pixels are those
    of `as_seen`, but for two short cuts, both of JPEGs: one that needs no turning is decoded by torchvision, which
    has the same decoder with less around it; and where all crops are much larger than what is made of them, the
    decoder itself makes the image smaller, by 2, 4 or 8, so that it stays at least REDUCE times as large
    as needed. All methods raise Unreadable. Not for use by two threads at once.
    """

    def __init__(self, image: Image.Image, file: BinaryIO | None = None):
        with explained():
            self.as_stored, self.format, self._file = image, image.format, file
            self.tiles = tuple(getattr(image, "tile", ()))  # how pixels are stored; once they are decoded it is gone
            self._is_jpeg = file is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
            self._turn = image.getexif().get(ORIENTATION, 1)
            self._pixels: Tensor | None = None
            # Of a TIFF Pillow has turned the size already, or not yet, by its version.
            W, H = map(image.tag_v2.get, SIDES) if isinstance(image, TiffImageFile) else image.size
            self.size: tuple[int, int] = (H, W) if self._turn in (5, 6, 7, 8) else (W, H)  # width and height, as seen

    @classmethod
    def of(cls, file: BinaryIO, channels: int = 3) -> "AnyPicture":
        """The picture in a file that can seek and stays open as long as the picture is used.

        With three `channels` it is 8-bit RGB, else an image of so many channels as numbers; see ArrayPicture. Raises
        Unreadable: OtherChannels, MissingExtra, or with another reason.
        """
        with explained():
            start = file.read(START)
            file.seek(0)
            if start.startswith(JPEG):  # the most frequent format, and Pillow would try others first
                file = io.BytesIO(file.read())
                return with_channels(cls(opened_jpeg(file), file), channels)
            if start.startswith(NUMPY):
                return ArrayPicture(numpy_raster(file), channels)
            if start[128:] == MARK:
                return ArrayPicture(dicom_raster(file, as_photo=channels == 3), channels)
            if start.startswith(tiff.BEGINNINGS):
                return picture_in_tiff(file, channels)
            if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and not register_heif():
                raise MissingExtra("heif")
            return with_channels(cls(opened(file), file), channels)

    @classmethod
    def decoded(cls, pixels: Tensor) -> "Picture":
        """The picture of pixels at hand: uint8 [3, height, width]."""
        picture = cls.__new__(cls)
        picture._pixels, picture._is_jpeg, picture.size = pixels, False, (pixels.shape[2], pixels.shape[1])
        return picture

    def pixels(self) -> Tensor:
        """All of it, as crops are made of: uint8 [3, height, width]."""
        with explained():
            if self._pixels is None:
                self._refuse_huge()
                self._pixels = self._decoded()
            return self._pixels

    def image(self, most: int | None = None) -> Image.Image:
        """All of it; of one with too many pixels to be decoded whole `most` a side, if given."""
        with explained():
            if most is not None and self.is_huge:
                return to_pil_image(self.resized(within(self.size[1], self.size[0], most)))
            if self._pixels is not None:
                return to_pil_image(self._pixels)
            self._refuse_huge()
            return as_seen(self.as_stored)

    def glimpses(self) -> Tensor:
        """What tells its statistics, uint8 [3, h, w]: all of it, or of one that has too many pixels a smaller image."""
        return pil_to_tensor(self.image(most=1024))

    def resized(self, size: tuple[int, int]) -> Tensor:
        """All of it, resized to (H, W) by bilinear interpolation: uint8 [3, H, W]."""
        with explained():
            if self.is_huge:
                whole = (0, 0, self.size[1], self.size[0])
                return self._reduced_crops(self._reduction([whole], [size]) or 1, [whole], [size], BILINEAR)[0]
            return pil_to_tensor(resize(self.image(), list(size), InterpolationMode.BILINEAR))

    @property
    def is_huge(self) -> bool:
        """Whether it has more pixels than Pillow decodes."""
        return self._has_too_many(1)

    def _has_too_many(self, factor: int) -> bool:
        return self.size[0] * self.size[1] > 2 * factor**2 * (Image.MAX_IMAGE_PIXELS or 2**62)

    def _refuse_huge(self, factor: int = 1) -> None:
        if self._has_too_many(factor):
            raise Image.DecompressionBombError(
                f"{self.size[0]:,} x {self.size[1]:,} pixels are too many, and it cannot be decoded with fewer"
            )

    def crops(self, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What is in each of the boxes, resized to (H, W) in `sizes` by bicubic interpolation: uint8 [3, H, W] each."""
        if not boxes:
            return []
        with explained():
            if self._pixels is None and (factor := self._reduction(boxes, sizes)):
                return self._reduced_crops(factor, boxes, sizes)
            pixels = self.pixels()
            return [resized_crop(pixels, box, size) for box, size in zip(boxes, sizes)]

    def _reduction(self, boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> int | None:
        """By how much the decoder makes the image smaller; None: not at all.

        One with too many pixels becomes smaller in any case, although a small crop of it then is not quite sharp.
        """
        if not self._is_jpeg:
            return None
        shrink = min(min(box[2] / size[0], box[3] / size[1]) for box, size in zip(boxes, sizes, strict=True))
        factor = next((k for k in (8, 4, 2) if k * REDUCE <= shrink), None)
        if self.is_huge:
            return max(factor or 1, next((k for k in (2, 4) if not self._has_too_many(k)), 8))
        return factor

    def _decoded(self) -> Tensor:
        if self._is_jpeg and self._turn == 1 and torchvision_reads_jpeg():
            self._file.seek(0)
            data = torch.frombuffer(bytearray(self._file.read()), dtype=torch.uint8)
            with suppress(RuntimeError):  # Pillow decides what can be read, and says why not
                return decode_jpeg(data, ImageReadMode.RGB)
        return pil_to_tensor(as_seen(self.as_stored))

    def _reduced_crops(
        self,
        factor: int,
        boxes: Sequence[Box],
        sizes: Sequence[tuple[int, int]],
        filter: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> list[Tensor]:
        self._refuse_huge(factor)
        self._file.seek(0)
        image = opened_jpeg(self._file)
        image.draft(image.mode, (image.width // factor, image.height // factor))
        image = as_seen(image)
        # The last column and row may stand for fewer pixels than the others; turned, they come first.
        x = image.width - self.size[0] / factor if self._turn in (2, 3, 6, 7) else 0.0
        y = image.height - self.size[1] / factor if self._turn in (3, 4, 7, 8) else 0.0
        found = []
        for (top, left, height, width), (H, W) in zip(boxes, sizes):
            edges = (x + left / factor, y + top / factor, x + (left + width) / factor, y + (top + height) / factor)
            found.append(pil_to_tensor(image.resize((W, H), filter, box=edges)))
        return found


def resized_crop(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """What is in the box, resized to `size`: uint8 [3, height, width] -> [3, H, W]."""
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    # What lies in one piece, pixel by pixel, is resized fastest.
    return resize_image(part.contiguous(memory_format=torch.channels_last), list(size), BICUBIC)[0]


AnyPicture = Picture | ArrayPicture | GreyPicture


def with_channels(picture: Picture, channels: int) -> AnyPicture:
    """A picture that Pillow has opened as one of so many channels. Raises OtherChannels."""
    if channels == 3:
        return picture
    image = picture.as_stored
    if channels == 1 and is_8_bit(image):
        return GreyPicture(picture)
    return ArrayPicture(pillow_raster(image, picture.size), channels)


def picture_in_tiff(file: BinaryIO, channels: int) -> AnyPicture:
    """By Pillow what becomes 8-bit RGB and is not large; else by tifffile, or what that leaves over by Pillow."""
    image: Any = None
    why, missing = None, None
    try:
        image = opened(file)
    except Exception as error:  # too large for Pillow, or of a kind that it does not know
        why = error
    if channels == 3 and image is not None and image.width * image.height <= LARGE_TIFF:
        if (samples := image.tag_v2.get(SAMPLES, 1)) > 4:  # of which Pillow would take the first
            raise OtherChannels(samples, channels)
        return Picture(image, file)
    try:
        raster = tiff.tiff_raster(file, channels)
        if raster is not None:
            return ArrayPicture(raster, channels)
    except (MissingExtra, OtherChannels) as error:  # Pillow has a grey of CMYK, and can do without tifffile
        missing = error
    if image is None:
        raise missing or why or ValueError("of a kind of TIFF that is not known")
    grey_of_colours = channels == 1 and is_8_bit(image)
    all_there = isinstance(missing, MissingExtra) and image.tag_v2.get(SAMPLES, 1) == len(image.getbands()) == channels
    if missing and not (grey_of_colours or all_there):
        raise missing
    file.seek(0)
    return with_channels(Picture(opened(file), file), channels)


@functools.cache
def register_heif() -> bool:
    """Teaches Pillow to read HEIF; whether that could be done."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@functools.cache
def torchvision_reads_jpeg() -> bool:
    """Whether this torchvision was built with a JPEG decoder."""
    smallest = io.BytesIO()
    Image.new("RGB", (8, 8)).save(smallest, "JPEG")
    try:
        decode_jpeg(torch.frombuffer(bytearray(smallest.getvalue()), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True


def open_image(path: str | os.PathLike[str], channels: int = 3) -> Image.Image | Tensor:
    """An image file as `train` and `extract` see it.

    With three channels it is a PIL image, upright and in RGB, see `as_seen`; else float32 [N, H, W], see ArrayPicture.
    """
    with open(path, "rb") as file:
        return Picture.of(file, channels).image()
