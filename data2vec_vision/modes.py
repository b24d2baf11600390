"""What Pillow opens, with the channels that the file has and not as RGB.

Shapes: H x W pixels, C channels.
"""

import numpy as np
from PIL import Image, ImageOps

from data2vec_vision.rasters import ArrayRaster, Raster

# Pillow's modes of 8 bits a channel, with their channels; a palette has the colours that it leads to.
CHANNELS = {"1": 1, "L": 1, "LA": 2, "La": 2, "PA": 4, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "RGBA": 4, "RGBa": 4,
            "RGBX": 4, "CMYK": 4}  # fmt: skip
COLOUR = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA", "YCbCr": "RGB", "HSV": "RGB", "1": "L"}  # what others are read as


def is_8_bit(image: Image.Image) -> bool:
    """Whether an opened image has 8 bits a channel, or fewer."""
    return image.mode == "P" or image.mode in CHANNELS


def pillow_raster(image: Image.Image, size: tuple[int, int]) -> Raster:
    """An opened image, (width, height) = `size` when it is upright, as numbers: colours as RGB, or else as stored."""
    if image.mode == "P":
        mode, channels = ("RGBA", 4) if image.has_transparency_data else ("RGB", 3)
    else:
        mode, channels = COLOUR.get(image.mode, image.mode), CHANNELS.get(image.mode, 1)

    def load() -> np.ndarray:
        image.load()
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
        return (pixels.astype(dtype) if dtype != pixels.dtype else pixels).reshape(size[1], size[0], channels)

    dtype: np.dtype = np.dtype("u1")
    if not is_8_bit(image):
        # Of PNG and PGM a whole number has 16 bits, which Pillow has opened as 32, too.
        short = (image.mode.startswith("I;16") and image.mode != "I;16S") or image.format in ("PNG", "PPM")
        dtype = np.dtype("f4" if image.mode == "F" else "u2" if short else "i4")
    return ArrayRaster(image.format or "image", size[1], size[0], channels, dtype, load=load)
