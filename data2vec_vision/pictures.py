"""Pictures for people: rows of small images with captions."""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

BACKGROUND, INK = (250, 250, 250), (40, 40, 40)
RIGHT, WRONG = (60, 160, 80), (215, 70, 60)
GAP, CAPTION = 6, 18  # pixels
NAMED_CLASSES = 40  # with more the names of a confusion matrix could not be read

Tile = tuple[Image.Image, str, tuple[int, int, int] | None]  # image, caption, colour of its frame if any


def grid(rows: Sequence[Sequence[Tile]], side: int = 112, title: str = "", groups: Sequence[int] = ()) -> Image.Image:
    """One picture of rows of tiles, each scaled to `side` pixels, its caption below it.

    groups: the columns before which a wide gap sets a group of tiles apart.
    """
    columns = max(len(row) for row in rows)
    top = CAPTION + 2 * GAP if title else GAP
    lefts = [GAP + c * (side + GAP) + 4 * GAP * sum(g <= c for g in groups) for c in range(columns)]
    step_y = side + CAPTION + GAP
    page = Image.new("RGB", (lefts[-1] + side + GAP, top + len(rows) * step_y), BACKGROUND)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    if title:
        draw.text((GAP, GAP), title, INK, font)
    for r, row in enumerate(rows):
        for c, (image, caption, frame) in enumerate(row):
            x, y = lefts[c], top + r * step_y
            sharp = Image.Resampling.NEAREST if max(image.size) < side / 2 else Image.Resampling.LANCZOS
            page.paste(image.convert("RGB").resize((side, side), sharp), (x, y))
            if frame:
                draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=frame, width=3)
            draw.text((x + 2, y + side + 1), caption, INK, font)
    return page


def as_colours(pixels: Tensor, like: Tensor | None = None) -> Tensor:
    """What an image of any number of channels is shown as: uint8 [3, H, W].

    Bytes stay what they are. Of float32 [C, H, W] one channel is grey and of more the first three are red, green and
    blue, each stretched between the least and the greatest value that it has in `like`, by default in the image.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    few, range_of = pixels[:3].float(), (pixels if like is None else like)[:3].float()
    low, high = range_of.amin(dim=(1, 2), keepdim=True), range_of.amax(dim=(1, 2), keepdim=True)
    stretched = ((few - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().byte()
    if len(few) == 1:
        return stretched.expand(3, -1, -1)
    return torch.cat([stretched, stretched.new_zeros(3 - len(few), *few.shape[1:])])


def shown(image: Image.Image | Tensor, like: Tensor | None = None) -> Image.Image:
    """An image to look at, of pixels as `as_colours` takes them."""
    return to_pil_image(as_colours(image, like)) if isinstance(image, Tensor) else image


def masked(view: Tensor, patch_size: int, masks: dict[str, Tensor]) -> Image.Image:
    """A view, as `as_colours` takes it, with the patches that the student does not see in grey.

    `masks` of one image: `keep` are the seen patches (of the first mask where there are several), or `query`
    the hidden ones.
    """
    rows, columns = view.shape[1] // patch_size, view.shape[2] // patch_size
    everything = set(range(rows * columns))
    if not {"keep", "query"} & masks.keys():  # of a method of somebody's own, which calls them otherwise
        return shown(view)
    if "keep" in masks:
        keep = masks["keep"] if masks["keep"].dim() == 1 else masks["keep"][0]
        hidden = everything - set(keep.tolist())
    else:
        hidden = set(masks["query"].flatten().tolist())
    image = as_colours(view).clone()
    for index in hidden:
        y, x = index // columns * patch_size, index % columns * patch_size
        image[:, y : y + patch_size, x : x + patch_size] = 128
    return to_pil_image(image)


def confusion_picture(confusion: np.ndarray, classes: Sequence[str], title: str) -> Image.Image:
    """A matrix of counts [C, C], a row a true class, as per cent of the row; right ones green, wrong ones red.

    Up to NAMED_CLASSES classes have their names, and numbers in the cells.
    """
    named = len(classes) <= NAMED_CLASSES
    side = 34 if named else max(1, 1000 // len(classes))
    font = font_for("".join((title, *classes)))
    names = [name if len(name) <= 24 else name[:21] + "..." for name in classes]
    margin = GAP + (max(int(font.getlength(name)) for name in names) if named else CAPTION) + GAP
    top = margin + 2 * CAPTION + 3 * GAP
    lines = (title, "rows: the true class; columns: what it was taken for; in per cent of the row")
    width = max(margin + side * len(classes), *(int(font.getlength(line)) + GAP for line in lines)) + 2 * GAP
    page = Image.new("RGB", (width, top + side * len(classes) + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for n, line in enumerate(lines):
        draw.text((GAP, GAP + n * CAPTION), line, INK, font)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for r, c in np.ndindex(share.shape):
        x, y, value = margin + c * side, top + r * side, float(share[r, c])
        draw.rectangle((x, y, x + side - 1, y + side - 1), shade(value, RIGHT if r == c else WRONG))
        if named and value >= 0.005:
            draw.text((x + side / 2, y + side / 2), f"{100 * value:.0f}", INK, font, anchor="mm")
    if named:
        for n, name in enumerate(names):
            draw.text((margin - GAP, top + n * side + side / 2), name, INK, font, anchor="rm")
            upright = Image.new("RGB", (margin, CAPTION), BACKGROUND)
            ImageDraw.Draw(upright).text((0, CAPTION / 2), name, INK, font, anchor="lm")
            page.paste(upright.rotate(90, expand=True), (margin + n * side + (side - CAPTION) // 2, top - margin - GAP))
    return page


def font_for(text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which has ASCII only, or for other letters one that the system has."""
    if not text.isascii():
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def shade(value: float, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """From white at 0 to `colour` at 1; the root lets small shares be seen."""
    red, green, blue = (round(255 + (c - 255) * value**0.5) for c in colour)
    return red, green, blue
