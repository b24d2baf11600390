"""What every method is: a module with a student, and a training step in five hooks."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Generator, Tensor, nn

from data2vec_vision import distributed
from data2vec_vision.checkpoint import check_transform, load_encoder, warn_of_broken
from data2vec_vision.config import Facts
from data2vec_vision.ema import ema_update
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.knobs import check_knobs
from data2vec_vision.masking import MaskSampler, no_masks, stack_masks
from data2vec_vision.recipes import PaperRecipe
from data2vec_vision.schedules import linear_ramp
from data2vec_vision.transforms import ImageTransform, ViewTransform
from data2vec_vision.vit import DEFAULT_MODEL, MaskedVisionTransformer, build_vit


class Output(NamedTuple):
    """What a training step gives."""

    loss: Tensor  # scalar, at least fp32
    embedding: (
        Tensor  # [B, D]: in training, detached, of what the student saw of its first view; else of the whole image
    )
    logs: dict[str, Tensor]  # detached scalars, on the device
    # Predictions, targets, masks ... Where `prediction` and `target` are [..., D] at the patches `query` [...], each in
    # [0, S), monitor.health follows them.
    extras: dict[str, Tensor]


class Method(nn.Module):
    """A self-supervised method, usable in anybody's loop.

    In training mode `method(views)` takes one batch of normalised images [B, 3, H, W], or the list of
    views that the method asks for, and returns an Output whose `.loss.backward()` works; views may also be
    given one by one, or by their `view_names`. In eval mode, and with `method(images=...)` in any mode, it returns
    the embedding of the unmasked images with a zero loss. Before the optimizer's step call
    `before_step(progress)`, after it `after_step(progress)`, with the share of the run that is done when
    the step is: that moves the teacher.

    `encoder` is the name of a timm VisionTransformer or a ready one; `pretrained=True` loads timm's
    weights. Everything else is a knob of the method's Config.
    """

    @dataclass(frozen=True)
    class Config:
        """A method's own knobs, each a `knob`. Raises InputError for a value out of its range."""

        def __post_init__(self) -> None:
            check_knobs(self)

    # Options of `train` that the method wants otherwise than by default. Two more names: max_lr_at_256, the peak rate
    # at 256 images a step; tau_memory, how much of a run the teacher remembers, where tau follows from its length.
    recipe: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    paper: ClassVar[PaperRecipe | None] = None  # what `--recipe paper` takes
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # AdamW's
    pool: ClassVar[str] = "mean"  # what `embed` gives: "mean", or "cls" where the encoder has a class token
    mask_token: ClassVar[bool] = False  # whether hidden patches are replaced by a token, rather than left out
    class_token: ClassVar[bool] = True  # whether an encoder built from a name keeps its class token
    # Keywords of `forward` for views, in the order of `views()`, with how many of each there must be; None: any number.
    view_names: ClassVar[Mapping[str, int | None]] = MappingProxyType({})
    batch_statistics: ClassVar[str] = ""  # what of the method is computed over a pass, not image by image

    def __init__(
        self,
        encoder: str | VisionTransformer = DEFAULT_MODEL,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool = False,
        **knobs: Any,
    ):
        super().__init__()
        unknown = set(knobs) - {f.name for f in fields(self.Config)}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no knob named {', '.join(sorted(unknown))}")
        self.config: Any = self.Config(**knobs)
        if isinstance(encoder, str):
            size = {} if image_size is None else {"img_size": image_size}
            encoder = build_vit(encoder, pretrained, **size, **self.encoder_arguments(pretrained))
            if not pretrained:
                self.initialize(encoder)
        self.student = MaskedVisionTransformer(encoder, mask_token=self.mask_token)
        self.student.pool = self.pool if encoder.cls_token is not None else "mean"
        self.teacher: MaskedVisionTransformer | None = None
        self._after_step_called = False
        self._at_backward: Tensor | None = None  # a copy of one parameter, before any optimizer step
        self.build()

    @property
    def fewest_views(self) -> int:
        """Views of an image that a training step needs; a method without `view_names` takes exactly one."""
        return sum(count or 0 for count in self.view_names.values()) or 1

    @property
    def smallest_batch(self) -> int:
        """Images that a forward pass needs: two where they are compared with each other."""
        return 2 if self.batch_statistics else 1

    def build(self) -> None:
        """Makes what the method has beside `self.student`, by `self.config`: teacher, heads, decoder."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], map_location: Any = "cpu") -> MaskedVisionTransformer:
        """The encoder in a student file of this method, in eval mode, ready for `features, hidden_states = encoder(x)`.

        Raises ValueError for a file that another method wrote, naming that method.
        """
        encoder, content = load_encoder(path, map_location)
        warn_of_broken(encoder.state_dict(), path)
        ours = cls.__module__.rpartition(".")[2]
        if Path(content["method"]).stem != ours:
            raise InputError(f"{path} was trained with {content['method']}, not {ours}: load it with d2v.load(path)")
        return encoder

    @classmethod
    def encoder_arguments(cls, pretrained: bool = False) -> dict[str, Any]:
        """For timm.create_model, beside sizes: leaves out the class token where the method has no use for it."""
        return {} if cls.class_token or pretrained else {"class_token": False, "global_pool": "avg"}

    @staticmethod
    def initialize(vit: VisionTransformer) -> None:
        """What the paper does to the first weights of an encoder, where timm does otherwise; not to pretrained ones."""

    @classmethod
    def derived(cls, facts: Facts) -> dict[str, tuple[Any, str]]:
        """Knobs that `train` sets by the data and the steps of the run, unless typed: {knob: (value, reason)}."""
        return {}

    @property
    def encoders(self) -> dict[str, MaskedVisionTransformer]:
        """The encoders that a run saves, by name: the student, and the teacher where there is one."""
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    def load_content(self, content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        """Take over what a training checkpoint has: all weights and states, and the transforms of images.

        Raises InputError when the weights are of another shape, or of another version of the method.
        """
        try:
            self.load_state_dict(content["method_state"])
            for name, encoder in self.encoders.items():
                encoder.transform = ImageTransform.from_dict(content["encoders"][name]["transform"])
                check_transform(encoder)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the weights in {path} are of another shape, or of another version of this program: {one_line(error)}"
            ) from error

    def describe(self) -> str:
        """What the method will do, in one line for the plan: views, masks, target."""
        raise NotImplementedError

    def views(self) -> ViewTransform:
        """What one image becomes: picklable, runs in workers, PIL image -> list of uint8 views [3, h, w]."""
        raise NotImplementedError

    def masks(self) -> MaskSampler:
        """What draws one image's masks: picklable, runs in workers, two generators -> index tensors by name.

        The first generator is the image's own, the second the same for all images of a step.
        """
        return no_masks

    def shared_by_step(self, generator: Generator) -> dict[str, Tensor]:
        """Random tensors, other than masks, that are the same for all images of a step; they join the masks."""
        return {}

    def forward(
        self,
        *views: Tensor | Sequence[Tensor],
        masks: dict[str, Tensor] | None = None,
        images: Tensor | None = None,
        **named: Tensor | Sequence[Tensor],
    ) -> Output:
        if images is not None and (views or named):
            raise ValueError(f"{type(self).__name__} takes views to train on or images=... to embed, not both")
        batch = [images] if images is not None else self._ordered(views, named)
        if not self.training or images is not None:
            embedding = self.student.embed(batch[0])
            return Output(embedding.new_zeros((), dtype=torch.float32), embedding, {}, {})
        if masks is None:
            masks = self.sample_masks(len(batch[0]), batch[0].device)
        if masks:
            self.refuse_other_size(batch[0])
        output = self.training_step(batch, masks)
        self._warn_if_teacher_stands_still(output.loss)
        return output

    def refuse_other_size(self, images: Tensor) -> None:
        """Raises ValueError for images to which the masks do not belong."""
        if images.dim() == 4 and images.shape[2:] != self.student.image_size:
            size, built = (" x ".join(map(str, s)) for s in (images.shape[2:], self.student.image_size))
            raise ValueError(f"masks are for the images of {built} pixels that the encoder was built for, got {size}")

    def _ordered(self, views: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
        """The views as one list. Raises TypeError and ValueError for what the method does not take."""
        name = type(self).__name__
        if unknown := set(named) - set(self.view_names):
            known = f"it knows {', '.join(self.view_names)}" if self.view_names else "it takes one batch of images"
            raise TypeError(f"{name} takes no views named {', '.join(sorted(unknown))}; {known}")
        batch = _flat(views)
        for key, count in self.view_names.items():
            given = _flat([named[key]]) if named.get(key) is not None else []
            if views and given and count is not None:
                raise ValueError(f"{name} was given {key} by position and by name")
            if named and not views and count not in (None, len(given)):
                raise ValueError(f"{name} takes {count} {key}, got {len(given)}")
            batch += given
        if len({len(view) for view in batch}) > 1:
            raise ValueError(f"the views of {name} are of different numbers of images: {[len(view) for view in batch]}")
        if self.training and batch and len(batch[0]) * distributed.processes() < self.smallest_batch:
            raise ValueError(f"{name} compares images: it takes at least {self.smallest_batch} at a time")
        if self.training and (len(batch) < self.fewest_views or len(batch) > self.fewest_views == 1):
            least = "one view" if self.fewest_views == 1 else f"at least {self.fewest_views} views"
            raise ValueError(f"{name} takes {least} of each image, got {len(batch)}")
        if not batch:
            raise ValueError(f"{name} was called without images")
        return batch

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        """The method itself: views [B, 3, H, W] each and masks [B, ...] -> Output."""
        raise NotImplementedError

    def sample_masks(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Masks for a batch, drawn from torch's default generator: index tensors [B, ...]."""
        draw, seed = self.masks(), int(torch.randint(2**62, ()))
        samples = [draw(torch.default_generator, Generator().manual_seed(seed)) for _ in range(batch)]
        masks = stack_masks(samples) | self.shared_by_step(Generator().manual_seed(seed))
        return {name: mask.to(device) for name, mask in masks.items()}

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters with a gradient, with timm's rule: no decay for vectors, biases and position embeddings."""
        undecayed = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            if hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        ]
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=undecayed)

    def scheduled(self, progress: float) -> dict[str, float]:
        """What the method changes in the course of a run, at `progress` in [0, 1]: the teacher's tau; for the log."""
        if self.teacher is None:
            return {}
        c = self.config
        return {"tau": linear_ramp(progress, c.tau_initial, c.tau_end, c.tau_increase_pct)}

    @property
    def phase(self) -> str:
        """A short name of what a run now does, where its target changes in its course; else ""."""
        return ""

    def skip_beginning(self) -> None:
        """Go on as most of a run does, where it begins otherwise: to measure what a step takes."""

    def weight_decay(self, first: float, progress: float) -> float:
        """The weight decay at `progress` in [0, 1] of a run that began with `first`.

        It belongs to the optimizer, so a loop of one's own sets it there, before each step, in the groups
        of `param_groups` that have one; `train` does.
        """
        return first

    def before_step(self, progress: float) -> None:
        """Called between backward and the optimizer's step."""

    def after_step(self, progress: float) -> None:
        """Called after the optimizer's step; `progress` in (0, 1] is the share of the run that is done."""
        self._after_step_called = True
        if self.teacher is not None:
            ema_update(self.teacher, self.student, self.scheduled(progress)["tau"])

    def train(self, mode: bool = True) -> "Method":
        """As nn.Module.train, but the teacher stays in eval mode: its targets carry no dropout noise."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _warn_if_teacher_stands_still(self, loss: Tensor) -> None:
        """Once, at the first forward after an optimizer step that `after_step` did not follow."""
        if self.teacher is None or self._after_step_called or torch.compiler.is_compiling() or not loss.requires_grad:
            return
        # Fused optimizers leave no mark on a parameter but its values.
        now, then = self._last_trained(), self._at_backward
        if then is not None and then.device == now.device and not torch.equal(now, then):
            self._after_step_called = True
            warnings.warn(
                f"the teacher of {type(self).__name__} has not moved: call after_step(progress) after each "
                "optimizer.step(), with the share of the run that is done",
                stacklevel=4,
            )
        loss.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        if self._at_backward is None:
            self._at_backward = self._last_trained().clone()

    def _last_trained(self) -> Tensor:
        return [p for p in self.parameters() if p.requires_grad][-1].detach()


def _flat(groups: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
    """Views given one by one or as lists, as one list."""
    return [view for group in groups for view in ([group] if isinstance(group, Tensor) else group)]


def by_resolution(views: Sequence[Tensor]) -> Iterator[Tensor]:
    """Neighbouring views of one size as one batch, view by view, so that the encoder runs once a resolution."""
    return (torch.cat(list(same)) for _, same in groupby(views, key=lambda view: view.shape))
