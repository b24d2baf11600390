"""TIFF files by tifffile: any number of channels and any type, and only the tiles or strips that a part touches.

The channels are the samples of a page or, where a file has a page for each, the pages; else the first page counts.
Shapes: H x W pixels, h x w of a part, C channels.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from data2vec_vision.errors import MissingExtra, quiet
from data2vec_vision.rasters import ArrayRaster, Raster, refuse_too_large

BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIN_IS_WHITE, MIN_IS_BLACK, RGB, SEPARATED, YCBCR = 0, 1, 2, 5, 6  # of the tag PhotometricInterpretation
JPEG = 7  # of the tag Compression
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha, of the tag ExtraSamples
NAMELESS = "QI"  # tifffile's letters for an axis that nobody named: any, and the sequence of pages


def is_there() -> bool:
    return importlib.util.find_spec("tifffile") is not None


def tiff_raster(file: BinaryIO, channels: int) -> Raster | None:
    """The image in a TIFF file, of which `channels` are wanted; None for one whose numbers are no plain values.

    Those are palettes, Lab, turned images and the like, which Pillow knows. Raises MissingExtra without tifffile, or
    where what it decompresses with is missing.
    """
    if not is_there():
        raise MissingExtra("tiff")
    import tifffile

    quiet("tifffile")
    file.seek(0)
    tiff = tifffile.TiffFile(file)
    series = tiff.series[0]
    page = series.keyframe
    turned = page.tags.valueof("Orientation", default=1) != 1
    if not is_plain(page) or turned or page.shaped[1] != 1:
        return None
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
    except KeyError as error:
        raise MissingExtra("tiff") from error
    if len(series.shape) == 3 and series.axes[0] in NAMELESS and series.shape[2] == channels < series.shape[0]:
        H, W, C = series.shape  # an array whose rows became pages
        load: Any = lambda: series.asarray()  # noqa: E731
        return ArrayRaster("TIFF", H, W, C, page.dtype, load=load)
    rasters = [raster_of(level, tiff.filehandle, channels) for level in series.levels]
    rasters[0].smaller = rasters[1:]
    return rasters[0]


def is_plain(page: Any) -> bool:
    """Whether the numbers in a page are brightnesses or colours as they are."""
    if page.photometric == YCBCR:
        return page.compression == JPEG  # which decodes to RGB
    return page.photometric in (MIN_IS_WHITE, MIN_IS_BLACK, RGB, SEPARATED)


def raster_of(series: Any, file: Any, channels: int) -> "TiffRaster":
    """One resolution of an image: a series of pages in tifffile's words."""
    page, pages = series.keyframe, [series.keyframe]
    S, _, H, W, samples = page.shaped
    stacked = len(series.shape) == 3 and S * samples == 1
    if stacked and (series.axes[0] == "C" or (series.axes[0] in NAMELESS and series.shape[0] == channels)):
        pages = list(series.pages)
    alpha = page.photometric == RGB and S * samples == 4 and page.extrasamples[:1] in ((ASSOCIATED,), (UNASSOCIATED,))
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip or H, H)
    return TiffRaster(
        "TIFF", H, W, S * samples * len(pages), page.dtype,
        bits=page.bitspersample if page.dtype.kind in "bu" and page.bitspersample <= 16 else None,
        alpha=alpha, rows=0 if page.is_contiguous else rows, pages=pages, file=file,
    )  # fmt: skip


@dataclass
class TiffRaster(Raster):
    """The pages of one resolution: one, or one a channel."""

    pages: list[Any] = field(default_factory=list)
    file: Any = None  # tifffile's

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        planes, frame = [], self.pages[0].keyframe
        for page in self.pages:
            for plane in range(frame.shaped[0]):
                read = self._rows if frame.is_contiguous else self._tiles
                planes.append(read(page, plane, top, left, height, width))
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if frame.photometric == MIN_IS_WHITE and self.bits:
            pixels = np.asarray(2**self.bits - 1, pixels.dtype) - pixels if self.bits > 1 else ~pixels.astype(bool)
        return pixels

    def _rows(self, page: Any, plane: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Of a page that is not compressed, with all its pixels in one piece."""
        _, _, H, W, samples = page.keyframe.shaped
        dtype = self.dtype.newbyteorder(page.parent.byteorder)
        of_row = W * samples * dtype.itemsize
        self.file.seek(page.dataoffsets[0] + (plane * H + top) * of_row)
        pixels = np.frombuffer(self.file.read(height * of_row), dtype, height * W * samples)
        return pixels.reshape(height, W, samples)[:, left : left + width]

    def _tiles(self, page: Any, plane: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        frame = page.keyframe
        _, _, H, W, samples = frame.shaped
        h, w = (frame.tilelength, frame.tilewidth) if frame.is_tiled else (min(frame.rowsperstrip or H, H), W)
        refuse_too_large(h * w * samples * self.dtype.itemsize)
        down, across = -(-H // h), -(-W // w)
        pixels = np.zeros((height, width, samples), self.dtype)
        for row in range(top // h, -(-(top + height) // h)):
            for column in range(left // w, -(-(left + width) // w)):
                tile = self._tile(page, (plane * down + row) * across + column)
                if tile is not None:  # else it was left out of the file, being empty
                    y, x = row * h - top, column * w - left
                    part = tile[max(0, -y) : height - y, max(0, -x) : width - x]
                    pixels[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
        return pixels

    def _tile(self, page: Any, index: int) -> np.ndarray | None:
        """A tile or strip, [h, w, samples], less at the edges of the image."""
        frame, count = page.keyframe, page.databytecounts[index]
        if not count:
            return None
        self.file.seek(page.dataoffsets[index])
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("the file is cut off")
        more = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader} if frame.compression in (6, JPEG) else {}
        tile, _, shape = frame.decode(data, index, **more)
        return None if tile is None else tile.reshape(shape)[0]
