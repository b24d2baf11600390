"""The target of data2vec, data2vec 2.0 and I-JEPA: what a teacher makes of the whole image. And how a run begins.

Baevski et al. 2022, section 3.3; Baevski et al. 2023, section 3.1. Shapes: B batch, C channels, S patches, D width,
T blocks.

Of our own is the beginning. What an untrained teacher says of a patch is little, and the student that learns it
becomes a teacher hardly better. So the first `pixel_pct` of a run predict the pixels of the hidden patches, as MAE
does, and spend no time on the teacher, which takes the student's weights after each of these steps; the run goes on
from there as the papers have it, with a head of zeros. A student whose teacher has seen images gets further in the
same time (benchmarks/RESULTS.md). Teachers that were trained on pixels first, or on an earlier teacher, are
those of dBOT (Liu et al. 2024, "Exploring Target Representations for Masked Autoencoders").
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data2vec_vision.config import Facts
from data2vec_vision.ema import frozen_copy
from data2vec_vision.errors import InputError
from data2vec_vision.knobs import knob
from data2vec_vision.methods.base import Method
from data2vec_vision.patches import patch_statistics, patchify
from data2vec_vision.targets import PositionMean, at_least_fp32, layer_norm, mean_of_blocks
from data2vec_vision.vit import has_separate_ffn

PIXEL_PCT = 0.125  # of a run from scratch


class PixelTarget(nn.Module):
    """What a patch shows, as wide as a teacher's target: y = sqrt(max(D / n, 1)) R p, of variance about one.

    p [n] are a patch's n = C*P*P pixels, less their mean and over their deviation, as in MAE (He et al. 2021, section
    4.1); R [D, n] is a random matrix, fixed, whose columns are orthonormal, or whose rows are where D < n. So a head
    of the width D does for both targets, and while D >= n the squared error is that of the pixels, times a constant.
    """

    turn: Tensor

    def __init__(self, patch_size: int, n_pixels: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        turn = nn.init.orthogonal_(torch.empty(width, n_pixels), gain=max(width / n_pixels, 1) ** 0.5)
        self.register_buffer("turn", turn)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], or the patches [B, S, n], -> [B, S, D] in at least fp32."""
        patches = at_least_fp32(patchify(images, self.patch_size) if images.dim() == 4 else images)
        mean, deviation = patch_statistics(patches)
        with torch.autocast(images.device.type, enabled=False):
            return F.linear((patches - mean) / deviation, self.turn.to(patches.dtype))


class MeanOfBlocks(Method):
    """A method whose target is the mean over the teacher's top blocks of a state of theirs; and pixels at first."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        center: bool = knob(True, "take from the target what a patch's place alone tells", paper="false")
        pixel_pct: float = knob(
            0.0,
            "share of the run, at its start, whose target is pixels; the teacher follows with tau 0 meanwhile; train "
            "takes 0.125 from scratch",
            "[0, 1)",
            "0",
        )

    @classmethod
    def derived(cls, facts: Facts) -> dict[str, tuple[Any, str]]:
        return {} if facts.pretrained else {"pixel_pct": (PIXEL_PCT, "an untrained teacher says little")}

    @property
    def prediction_head(self) -> nn.Linear:
        """The last layer of what predicts, with D outputs."""
        raise NotImplementedError

    def build_target(self, top_k_blocks: int | None, output: str, norm: str) -> None:
        """Makes the teacher and what its target needs: `output` "ffn" or "block", `norm` a name in NORMS.

        To be called in `build` after all that draws weights, so that the pixels' matrix changes none of them.
        """
        student, pct = self.student, self.config.pixel_pct
        if output == "ffn" and not has_separate_ffn(student.vit):
            remedy = "--set target_output=block" if hasattr(self.config, "target_output") else "another --model"
            raise InputError(f"the blocks of this encoder have no separate feed-forward network; use {remedy}")
        self.top_blocks = student.top_blocks(top_k_blocks)
        self.output, self.norm = output, norm
        self.teacher = frozen_copy(student)
        S, D, n_pixels = student.n_patches, student.embed_dim, student.vit.patch_embed.proj.weight[0].numel()
        self.position_mean = PositionMean(S, D) if self.config.center else None
        self.pixels = PixelTarget(student.patch_size, n_pixels, D) if pct else None
        self.on_pixels = pct > 0

    @property
    def beginning(self) -> str:
        """For `describe`: what the run begins with."""
        pct = self.config.pixel_pct
        return f"; pixels in the first {100 * pct:g} % of the run" if pct else ""

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """What is predicted of each patch, in at least fp32: [B, C, H, W] -> [B, S, D]."""
        return self.pixels(images) if self.on_pixels and self.pixels is not None else self.latent(images)

    def latent(self, images: Tensor) -> Tensor:
        """y = LN((1 / T) sum over the top T blocks of norm(h) - m): [B, C, H, W] -> [B, S, D] in at least fp32.

        h is a block's state in the teacher's pass over the whole image; m what the sum has at a place on average over
        images, zero without `center`.
        """
        assert self.teacher is not None
        y = mean_of_blocks(self.teacher.encode(images, hidden=self.top_blocks, output=self.output).hidden, self.norm)
        return layer_norm(y if self.position_mean is None else self.position_mean(y))

    def scheduled(self, progress: float) -> dict[str, float]:
        """tau: 0 while the target is pixels, so that the teacher is the student; its ramp takes what is left."""
        if self.on_pixels:
            return {"tau": 0.0}
        pct = self.config.pixel_pct
        return super().scheduled(max(0.0, (progress - pct) / (1 - pct)))

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        if self.on_pixels:
            if progress >= self.config.pixel_pct:
                self.skip_beginning()
                # What was right for pixels is wrong now, and its gradients would undo what the encoder has learned.
                # AdamW's moments stay: an optimizer is not the method's.
                nn.init.zeros_(self.prediction_head.weight)
                nn.init.zeros_(self.prediction_head.bias)
        elif self.position_mean is not None:
            self.position_mean.after_step()

    @property
    def phase(self) -> str:
        return "pixels" if self.on_pixels else ""

    def skip_beginning(self) -> None:
        self.on_pixels = False

    # Where a run stands is no buffer: the choice between two targets must not wait for a device.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.on_pixels)

    def set_extra_state(self, state: Tensor) -> None:
        self.on_pixels = bool(state)
