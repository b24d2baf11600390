"""DICOM files by pydicom: the first frame, in the units of the file or, where photos are wanted, windowed to 8 bits.

Shapes: H x W pixels, C channels: one, or three of a colour image.
"""

import importlib.util
from typing import Any, BinaryIO

import numpy as np

from data2vec_vision.errors import MissingExtra, quiet
from data2vec_vision.rasters import ArrayRaster, Raster

MARK = b"DICM"  # at byte 128


def dicom_raster(file: BinaryIO, as_photo: bool) -> Raster:
    """The image in a DICOM file: colour as 8 bits of RGB, grey as float32 in its rescaled units.

    MONOCHROME1, where low values are bright, is inverted. With `as_photo` grey becomes 8 bits too: what the window of
    the file shows, or else all its range. Raises MissingExtra without pydicom.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise MissingExtra("dicom")
    import pydicom

    quiet("pydicom")
    file.seek(0)
    data = pydicom.dcmread(file)
    if "Rows" not in data or "Columns" not in data:
        raise ValueError("this DICOM file holds no image")
    colour = int(data.get("SamplesPerPixel", 1)) > 1 or data.get("PhotometricInterpretation") == "PALETTE COLOR"
    dtype = np.dtype(np.uint8 if colour or as_photo else np.float32)

    def load() -> np.ndarray:
        return colours(data) if colour else (photo(data) if as_photo else in_units(data))[:, :, None]

    return ArrayRaster("DICOM", int(data.Rows), int(data.Columns), 3 if colour else 1, dtype, load=load)


def stored(data: Any) -> np.ndarray:
    """The numbers of the first frame, [H, W] or [H, W, C]."""
    from pydicom.pixels import pixel_array

    return pixel_array(data, index=0)


def colours(data: Any) -> np.ndarray:
    """Of an image in colour, uint8 [H, W, 3]; pydicom turns YBR into RGB."""
    from pydicom.pixels import apply_color_lut

    pixels = stored(data)
    if pixels.ndim == 2:  # of a palette
        pixels = apply_color_lut(pixels, data)
    return pixels if pixels.dtype == np.uint8 else (pixels >> (int(data.BitsStored) - 8)).astype(np.uint8)


def rescaled(data: Any, pixels: np.ndarray) -> np.ndarray:
    slope, shift = (float(data.get(name) or usual) for name, usual in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(shift)


def in_units(data: Any) -> np.ndarray:
    """float32 [H, W], more is brighter: of MONOCHROME1 stored numbers are counted from the other end of their range."""
    pixels = stored(data)
    if is_inverted(data):
        bits = int(data.BitsStored)
        pixels = (-1 if int(data.get("PixelRepresentation", 0)) else 2**bits - 1) - pixels.astype(np.int64)
    return rescaled(data, pixels)


def photo(data: Any) -> np.ndarray:
    """uint8 [H, W]: the window of the file, the first where it has several, or all its range."""
    pixels = rescaled(data, stored(data))
    centre, width = (first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width < 1:
        low, high = float(pixels.min()), float(pixels.max())
    else:  # DICOM PS3.3, C.11.2.1.2.1
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    share = ((pixels - low) / max(high - low, 1e-12)).clip(0, 1)
    return np.round(255 * (1 - share if is_inverted(data) else share)).astype(np.uint8)


def is_inverted(data: Any) -> bool:
    return data.get("PhotometricInterpretation") == "MONOCHROME1"


def first(value: Any) -> float | None:
    """A number, or the first of several; None where there is none."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, (int, float, str)) else value[0])
