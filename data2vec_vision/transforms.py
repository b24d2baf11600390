"""From an image to what a method sees: patch sequences, augmented views, and the one evaluation transform.

Shapes: C channels, H x W pixels, P patch side, S patches, `*` any leading dimensions or none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from data2vec_vision.arrays import Box, grey
from data2vec_vision.errors import InputError
from data2vec_vision.images import AnyPicture, Picture
from data2vec_vision.looks import PlainJitter, RandomBlur
from data2vec_vision.patches import patchify, unpatchify
from data2vec_vision.resampling import resized

# One image -> its views, uint8 [3, h, w] each. `Views` take pictures that are not decoded yet, too. With other than
# three channels an image is float32 [C, H, W], and so are views.
ViewTransform = Callable[[Image.Image], list[Tensor]]

ASPECT = (3 / 4, 4 / 3)  # width over height of a crop

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (round(sum(IMAGENET_MEAN) / 3, 6),), (round(sum(IMAGENET_STD) / 3, 6),)


class ViTPatchesTransform(nn.Module):
    """Cuts images into square patches: [*, C, H, W] -> [*, S, C, P, P], row by row."""

    def __init__(self, patch_size: int = 16):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        *lead, C, H, W = image.shape
        patches = patchify(image.reshape(-1, C, H, W), self.patch_size)
        return patches.reshape(*lead, -1, C, self.patch_size, self.patch_size)


class PatchesToSequence(nn.Module):
    """Flattens each patch: [*, S, C, P, P] -> [*, S, C*P*P], the sequence that a model takes."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.flatten(-3)


class JoinPatchSequence(nn.Module):
    """Joins patches to an image, the inverse of ViTPatchesTransform and PatchesToSequence.

    Takes [*, S, C, P, P] or [*, S, C*P*P] and gives [*, C, H, W]. `image_size` is (H, W); without
    it the image is taken to be square.
    """

    def __init__(self, patch_size: int = 16, image_size: tuple[int, int] | None = None):
        super().__init__()
        self.patch_size = patch_size
        self.image_size = image_size

    def forward(self, patches: Tensor) -> Tensor:
        P = self.patch_size
        if patches.dim() >= 4 and patches.shape[-2:] == (P, P):
            patches = patches.flatten(-3)
        *lead, S, length = patches.shape
        side = round(S**0.5)
        H, W = self.image_size or (side * P, side * P)
        image = unpatchify(patches.reshape(-1, S, length), P, (H // P, W // P))
        return image.reshape(*lead, *image.shape[1:])


class UnNormalize(nn.Module):
    """Undoes Normalize(mean, std): [*, C, H, W] -> the same shape, in [0, 1] for a normalised image."""

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, image: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, dtype=image.dtype, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype, device=image.device).view(-1, 1, 1)
        return image * std + mean


@dataclass(frozen=True)
class ImageTransform:
    """What `extract`, `evaluate` and a loaded encoder do to an image; it travels in the student file.

    The whole image is resized to (H, W) without a crop, then normalised, exactly as torchvision's
    Resize, ToTensor and Normalize do. `resized` and `normalized` are its two halves: the first runs
    in a worker and keeps bytes, the second on the device. Images of other than three channels are
    numbers instead, float32, from their file on.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def of_channels(cls, image_size: tuple[int, int], channels: int) -> "ImageTransform":
        """ImageNet's for three channels, the mean of these for one; of others nothing is known, and nothing changed."""
        if channels == 3:
            return cls(image_size)
        if channels == 1:
            return cls(image_size, GREY_MEAN, GREY_STD)
        return cls(image_size, (0.0,) * channels, (1.0,) * channels)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __call__(self, image: Image.Image | AnyPicture | Tensor) -> Tensor:
        """An image -> float32 [C, H, W]."""
        return self.normalized(self.resized(image))

    def resized(self, image: Image.Image | AnyPicture | Tensor) -> Tensor:
        """An image -> uint8 [3, H, W], or float32 [C, H, W] of other than three channels.

        It is a PIL image, a picture, or float32 [C, h, w]. Raises InputError for another number of channels.
        """
        if isinstance(image, Tensor):
            if len(image) != self.channels:
                raise InputError(f"the encoder takes {self.channels} channels, not {len(image)}")
            return resized(image.float(), self.image_size, cubic=False)
        if not isinstance(image, Image.Image):
            return image.resized(self.image_size)
        resize = v2.Resize(self.image_size, interpolation=v2.InterpolationMode.BILINEAR)
        pixels = v2.functional.pil_to_tensor(resize(image.convert("RGB")))
        if self.channels == 1:
            return grey(pixels / 255)
        if self.channels != 3:
            raise InputError(
                f"the encoder takes {self.channels} channels: d2v.open_image(path, channels={self.channels}) has them"
            )
        return pixels

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 or float32 [*, C, H, W] on any device -> float32 of the same shape; bytes are divided by 255."""
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (values - constant(self.mean, pixels.device)) / constant(self.std, pixels.device)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageTransform":
        return cls(**{name: tuple(value) for name, value in values.items()})


@lru_cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value a channel as [C, 1, 1], copied to the device once and not in every step."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1)


class View(nn.Module):
    """A random crop of an image, resized, mirrored at times, and then given another look: -> uint8 [3, H, W].

    crop: the smallest and the largest share of the image's area that it keeps, in (0, 1]; flip: the probability of a
    mirror image; look: transforms of a PIL image. Crops are distributed as torchvision's RandomResizedCrop draws them,
    and resized by bicubic interpolation. Of an image with other than three channels the view is float32 [C, H, W], and
    `plain_look` are the transforms of that; `left_out` names what of `look` these have not.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop: tuple[float, float],
        flip: float = 0.0,
        look: Sequence[nn.Module] = (),
        plain_look: Sequence[nn.Module] = (),
        left_out: Sequence[str] = (),
    ):
        super().__init__()
        self.image_size, self.crop = image_size, crop
        self.flip = flip
        self.look = v2.Compose([v2.ToPILImage(), *look, v2.PILToTensor()]) if look else None
        self.plain_look = v2.Compose(plain_look) if plain_look else None
        self.left_out = tuple(left_out)

    def box(self, size: tuple[int, int]) -> Box:
        """What part of an image of (width, height) is shown: of random area and aspect, at a random place in it.

        Where none of ten sizes fits, as in a panorama, it is as much of the middle as has an allowed aspect.
        """
        # As torchvision's RandomResizedCrop.get_params, which takes three times as long: as much as a small image.
        width, height = size
        for _ in range(10):
            share, slant, x, y = torch.rand(4, dtype=torch.float64).tolist()
            area = width * height * (self.crop[0] + share * (self.crop[1] - self.crop[0]))
            aspect = math.exp(math.log(ASPECT[0]) + slant * (math.log(ASPECT[1]) - math.log(ASPECT[0])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        w = min(width, max(1, round(height * ASPECT[1])))
        h = min(height, max(1, round(width / ASPECT[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def finished(self, crop: Tensor) -> Tensor:
        """The resized crop, uint8 [3, H, W] or float32 [C, H, W] -> the view."""
        if self.flip and float(torch.rand(())) < self.flip:
            crop = crop.flip(-1)
        look = self.look if crop.dtype == torch.uint8 else self.plain_look
        return (look(crop) if look else crop).contiguous()

    def forward(self, image: Image.Image) -> Tensor:
        return Views(self)(image)[0]


class Views:
    """One image -> a list of views, each drawn by its own transform: uint8 tensors [3, h, w].

    A transform is a `View`, or anything that takes a PIL image. The crops of all `View`s are drawn first, so that the
    image is decoded once and no finer than they need. The random numbers are torch's, `random`'s and numpy's global
    ones, seeded by the caller per image.
    """

    def __init__(self, *transforms: nn.Module):
        self.transforms = transforms

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is done to photos only, of all views, each once."""
        return tuple(dict.fromkeys(name for t in self.transforms for name in getattr(t, "left_out", ())))

    def __call__(self, image: Image.Image | AnyPicture) -> list[Tensor]:
        picture = Picture(image) if isinstance(image, Image.Image) else image
        ours = [t for t in self.transforms if isinstance(t, View)]
        crops = iter(picture.crops([t.box(picture.size) for t in ours], [t.image_size for t in ours]))
        whole = picture.image() if len(ours) < len(self.transforms) else None
        return [t.finished(next(crops)) if isinstance(t, View) else t(whole) for t in self.transforms]


def augmentation(
    image_size: tuple[int, int],
    crop: tuple[float, float] = (0.2, 1.0),
    flip: float = 0.5,
    color_jitter: float = 0.0,
) -> View:
    """Random resized crop, flip and colour jitter of an image: -> uint8 [3, H, W].

    `crop` are the smallest and the largest share of the image's area that a crop keeps, in (0, 1]; `flip`
    the probability of a mirror image; `color_jitter` the strength of brightness, contrast and saturation.
    The jitter comes after the crop, where it costs the pixels of the view and not of the photo.
    """
    if not color_jitter:
        return View(image_size, crop, flip)
    look = [v2.ColorJitter(*3 * [color_jitter])]
    return View(image_size, crop, flip, look, [PlainJitter(color_jitter)], ["saturation"])


def strong_augmentation(
    image_size: tuple[int, int],
    crop: tuple[float, float],
    flip: float = 0.5,
    color_jitter: float = 1.0,
    gray: float = 0.2,
    blur: float = 0.5,
    full_size: float = 224,
) -> View:
    """The views of MSN and SwAV (from SimCLR): crop, flip, colour jitter, grey, blur: an image -> uint8 [3, H, W].

    `color_jitter` is the strength s of jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s), applied to 80 % of the views;
    `gray` and `blur` are probabilities. The radius of the blur is that of the papers, 0.1 to 2 pixels at
    224, in proportion to `full_size`, the side of the image that views are crops of.
    """
    look: list[nn.Module] = []
    plain_look: list[nn.Module] = []
    left_out: list[str] = []
    if color_jitter:
        s = color_jitter
        look.append(v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8))
        plain_look.append(v2.RandomApply([PlainJitter(0.8 * s)], p=0.8))
        left_out += ["saturation", "hue"]
    if gray:
        look.append(v2.RandomGrayscale(gray))
        left_out.append("grey")
    if blur:
        look.append(v2.RandomApply([RandomBlur(0.1 * full_size / 224, 2.0 * full_size / 224)], p=blur))
        plain_look.append(look[-1])
    return View(image_size, crop, flip, look, plain_look, left_out)


def multi_crop(
    image_size: tuple[int, int], patch_size: int, n_small: int, crop_min: float, small_min: float, **look: float
) -> Views:
    """Two large crops and `n_small` small ones of an image: shares [crop_min, 1] and [small_min, crop_min] of its area.

    `look` are the flip, color_jitter and blur of `strong_augmentation`.
    """
    look = look | {"full_size": min(image_size)}
    large = strong_augmentation(image_size, (crop_min, 1.0), **look)
    small = strong_augmentation(local_crop_size(image_size, patch_size), (min(small_min, crop_min), crop_min), **look)
    return Views(large, large, *[small] * n_small)


def local_crop_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(H, W) of the small crops of multi-crop: 96 of 224 pixels, in whole patches, two a side at least."""
    height, width = (patch_size * max(2, round(side / patch_size * 96 / 224)) for side in image_size)
    return height, width


def local_crop_count(grid: tuple[int, int], at_full_size: int) -> int:
    """How many small crops: `at_full_size` from 14 patches a side on, fewer below, none under 4 patches."""
    side = min(grid)
    return 0 if side < 4 else round(at_full_size * min(1.0, side / 14))
