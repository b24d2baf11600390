"""What augmentation does to a view where torchvision's own will not do: to more or fewer than three channels.

Shapes: C channels, H x W pixels.
"""

import math

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2


class PlainJitter(nn.Module):
    """Brightness and contrast of float32 [C, H, W], each by a factor in [max(0, 1 - s), 1 + s], s the strength.

    As torchvision's ColorJitter, but nothing is clamped, for a channel may have any range, and each channel has its
    own mean, from which contrast counts; so the order of the two does not matter.
    """

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def forward(self, image: Tensor) -> Tensor:
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        brightness, contrast = (low + share * (high - low) for share in torch.rand(2).tolist())
        mean = image.mean(dim=(1, 2), keepdim=True)
        return ((image - mean) * contrast + mean) * brightness


class RandomBlur(nn.Module):
    """Pillow's Gaussian blur of a PIL image, its radius drawn between `smallest` and `largest` pixels.

    Of a tensor [C, H, W] it is torchvision's, whose sigma is what Pillow calls radius.
    """

    def __init__(self, smallest: float, largest: float):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        radius = self.smallest + float(torch.rand(())) * (self.largest - self.smallest)
        if isinstance(image, Image.Image):
            return image.filter(ImageFilter.GaussianBlur(radius))
        sides = [min(2 * math.ceil(3 * radius) + 1, 2 * side - 1) for side in (image.shape[2], image.shape[1])]
        return v2.functional.gaussian_blur(image, sides, [radius, radius])
