"""stable-pretraining's classes as methods of ours, so that `learning.py` trains them by the same loop on the same images.

Arguments, optimizer, rate and augmentation are those of that project's own benchmark scripts for ten classes of ImageNet
(`benchmarks/imagenet10/*-vit-small.py`, June 2026); its rates, given for a batch size, are scaled by the root of the images a step, as
ours are. The schedule is our one-cycle. Weight decay is of all parameters, as AdamW has it there. The teacher is
updated after every step, by that project's cosine, over the whole run. What else differs from those scripts: bf16 instead of fp16, a rate
that ends at nothing, and what is evaluated, which is the student with our method's pool, as it is of ours; there Data2Vec and MSN
evaluate the teacher, and Data2Vec its class token, which has no loss.
"""

from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import v2

from data2vec_vision.methods.base import Method, Output
from data2vec_vision.transforms import Views, ViewTransform, augmentation, local_crop_size


class Peer(Method):
    """A method around `self.peer`, whose encoder is the student's timm model itself."""

    betas = (0.9, 0.95)

    def build(self) -> None:
        self.peer = self.theirs(self.student.vit)

    def theirs(self, vit: nn.Module) -> nn.Module:
        raise NotImplementedError

    def describe(self) -> str:
        return f"stable-pretraining's {type(self.peer).__name__}"

    def views(self) -> ViewTransform:
        return Views(augmentation(self.student.image_size, (0.2, 1.0), 0.5))

    def loss(self, views: list[Tensor]) -> Any:
        return self.peer(*views)

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        found = self.loss(views)
        seen = found.embedding if getattr(found, "embedding", None) is not None else found.predictions
        seen = seen.detach().float()
        return Output(found.loss, seen.mean(dim=1) if seen.dim() == 3 else seen[: len(views[0])], {}, {})

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.peer.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        for module in self.peer.modules():
            if hasattr(module, "update_teacher"):
                module.update_ema_coefficient(progress, 1)
                module.update_teacher()


def recipe(rate: float, batch: int, weight_decay: float = 0.05) -> MappingProxyType:
    """Its rate at a batch size, as `max_lr_at_256`."""
    at_256 = rate * (256 / batch) ** 0.5
    return MappingProxyType(
        {"max_lr_at_256": at_256, "warmup_pct": 0.1, "weight_decay": weight_decay, "clip_grad": 0.0}
    )


def photometric(blur: float, solarize: float, full_size: int) -> list[nn.Module]:
    """Flip, jitter, grey, blur, solarisation; the kernel of the blur, 23 of 224 pixels there, goes with the image."""
    kernel = 2 * round(full_size * 23 / 224 / 2) + 1
    return [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, max(0.2, 2.0 * full_size / 224)))], p=blur),
        v2.RandomSolarize(128, p=solarize),
        v2.PILToTensor(),
    ]


def view(size: tuple[int, int], scale: tuple[float, float], blur: float, solarize: float, full_size: int) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size, scale=scale), *photometric(blur, solarize, full_size)])


def two_views(student: Any) -> ViewTransform:
    """One with a blur always, one with little blur and solarisation."""
    size, side = student.image_size, min(student.image_size)
    return Views(view(size, (0.08, 1.0), 1.0, 0.0, side), view(size, (0.08, 1.0), 0.1, 0.2, side))


def two_and_four_views(student: Any) -> ViewTransform:
    """Multi-crop with two large crops and four small ones."""
    size, side = student.image_size, min(student.image_size)
    large = view(size, (0.4, 1.0), 0.5, 0.2, side)
    small = view(local_crop_size(size, student.patch_size), (0.05, 0.4), 0.5, 0.2, side)
    return Views(large, large, small, small, small, small)
