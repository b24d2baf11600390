"""Pictures for people: rows of small images with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

BACKGROUND, INK = (250, 250, 250), (40, 40, 40)
GAP, CAPTION = 6, 18  # pixels

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


def masked(view: Tensor, patch_size: int, masks: dict[str, Tensor]) -> Image.Image:
    """A view, uint8 [3, H, W], with the patches that the student does not see in grey.

    `masks` of one image: `keep` are the seen patches (of the first mask where there are several), or `query`
    the hidden ones.
    """
    rows, columns = view.shape[1] // patch_size, view.shape[2] // patch_size
    everything = set(range(rows * columns))
    if "keep" in masks:
        keep = masks["keep"] if masks["keep"].dim() == 1 else masks["keep"][0]
        hidden = everything - set(keep.tolist())
    else:
        hidden = set(masks["query"].flatten().tolist())
    image = view.clone()
    for index in hidden:
        y, x = index // columns * patch_size, index % columns * patch_size
        image[:, y : y + patch_size, x : x + patch_size] = 128
    return to_pil_image(image)
