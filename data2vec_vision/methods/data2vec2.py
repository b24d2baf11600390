"""data2vec 2.0: one pass of the teacher is the target of several masks; the student encodes what they leave.

Baevski et al. 2023, "Efficient Self-supervised Learning with Contextualized Target Representations for
Vision, Speech and Language", section 3. Shapes: B batch, M masks an image, S patches in rows x columns, K kept,
Q hidden, D width of the encoder, W of the decoder, T blocks in the target.

What differs from the published code: the blocks are timm's, with the norm first, so that timm's models and
their weights can be used; the final norm therefore precedes the decoder, there is no norm before the blocks, and
none of the blocks is left out of the target. The decoder's noise is the same for all images of a step, so that
slicing a step changes nothing. Some defaults are for small data, each measured in benchmarks/RESULTS.md: runs
begin with pixels (see latent.py) and with MAE's first weights; targets lose their mean at each place (`center`); of a
small grid single patches are kept instead of blocks; and the class token has no loss (its target, a mean over
patches after an instance norm, is next to nothing, and its loss outweighed the patches').
"""

import math
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from data2vec_vision.config import Facts
from data2vec_vision.knobs import knob
from data2vec_vision.masking import MaskSampler, inverse_block_mask, others, share
from data2vec_vision.methods.base import Output
from data2vec_vision.methods.latent import MeanOfBlocks
from data2vec_vision.patches import take
from data2vec_vision.recipes import VIT_B, PaperRecipe
from data2vec_vision.targets import at_least_fp32, layer_norm, target_health
from data2vec_vision.transforms import Views, ViewTransform, augmentation
from data2vec_vision.vit import initialize_as_mae, run_block

LARGE_GRID = 12  # patches a side; below it single patches are kept, which did better on 8 x 8
SHORT_RUN = 5000  # steps, below which fewer masks, and so more steps in the same time, get further
NOISE = 0.01  # deviation of what the decoder gets at hidden places


@dataclass(frozen=True)
class InverseBlockMasks:
    """Draws {"keep": what the student sees under each mask, int64 [M, K], "query": the rest, int64 [M, Q]}."""

    grid: tuple[int, int]
    n_masks: int
    n_keep: int
    adjust: float
    side: int

    def __call__(self, generator: Generator, shared: Generator) -> dict[str, Tensor]:
        keep = [
            inverse_block_mask(self.grid, self.n_keep, generator, self.adjust, self.side) for _ in range(self.n_masks)
        ]
        S = self.grid[0] * self.grid[1]
        return {"keep": torch.stack(keep), "query": torch.stack([others(k, S) for k in keep])}


class ConvDecoder(nn.Module):
    """Convolutions over the grid of patches, each with a norm, GELU and a residual: [R, S, D] -> [R, S, W].

    The norm is over channels and has no parameters; the first residual is left out where the
    widths differ. Weights as PyTorch has them.
    """

    def __init__(self, grid: tuple[int, int], width: int, dim: int, depth: int, kernel: int, groups: int = 16):
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList(
            nn.Conv2d(n, dim, kernel, padding=kernel // 2, groups=math.gcd(groups, n, dim))
            for n in [width] + [dim] * (depth - 1)
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, self.grid)  # [R, D, rows, columns]
        for layer in self.layers:
            x = run_block(partial(_convolve, layer), x, recompute=self.grad_checkpointing and self.training)
        return x.flatten(2).transpose(1, 2)


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of the ConvDecoder with what goes around it: [R, D, rows, columns] -> [R, W, rows, columns]."""
    y = F.gelu(layer_norm(layer(x).movedim(1, -1))).movedim(-1, 1)
    return x + y if x.shape == y.shape else y


class Data2Vec2(MeanOfBlocks):
    """data2vec 2.0 (Baevski et al. 2023): data2vec for several masks at once; it encodes what they leave."""

    @dataclass(frozen=True)
    class Config(MeanOfBlocks.Config):
        top_k_blocks: int | None = knob(
            None, "how many of the last blocks are averaged into the target; none: all", "[1, inf)", "10 of 12", "k"
        )
        mask_ratio: float = knob(0.8, "share of the patches that a mask hides", "(0, 1)", "0.8", "mask_erase_pct")
        n_masks: int = knob(8, "masks an image; train takes 2 in runs of less than 5,000 steps", "[1, 1000]", "16")
        mask_adjust: float = knob(0.07, "share of the grid that blocks cover beyond what is kept", "[0, 1)", "0.07")
        block_size: int | None = knob(
            None, "side of a kept block, in patches; none: 3, or 1 below 12 patches a side", "[1, inf)", "3"
        )
        decoder_dim: int | None = knob(None, "width of the decoder; none: the encoder's", "[1, inf)", "768")
        decoder_depth: int | None = knob(
            None, "convolutions of the decoder; none: 6, or 3 below 12 patches a side", "[1, 1000]", "6"
        )
        decoder_kernel: Literal[3, 5, 7] = knob(3, "side of a convolution's kernel", paper="3")
        class_token_weight: float = knob(
            0.0, "weight of the class token's loss", "[0, inf)", "2.56, 0.01 a mask of 16 x 16"
        )
        tau_initial: float = knob(0.9998, "the teacher's EMA factor at the start", "[0, 1]", "0.9998", "tau_initial")
        tau_end: float = knob(0.99999, "the teacher's EMA factor after its rise", "[0, 1]", "0.99999", "tau_end")
        tau_increase_pct: float = knob(
            0.27, "share of the run in which tau rises", "[0, 1]", "100,000 of 375,300 steps", "tau_increase_pct"
        )
        crop_min: float = knob(0.2, "smallest share of the image that a crop keeps", "(0, 1]", "0.2")
        flip: float = knob(0.5, "probability of a mirror image", "[0, 1]", "0.5")

    recipe = MappingProxyType(
        {"max_lr_at_256": 1e-3, "warmup_pct": 0.13, "weight_decay": 0.05, "clip_grad": 4.0, "tau_memory": 0.5}
    )
    paper = PaperRecipe(
        "Baevski et al. 2023, ViT-B, as run by facebookresearch/fairseq (examples/data2vec/config/v2, base images)",
        options=VIT_B | dict(
            epochs=75, batch_size=256, max_lr=1e-3, warmup_pct=50_040 / 375_300, weight_decay=0.05, clip_grad=4.0,
            k=10, mask_erase_pct=0.8, tau_initial=0.9998, tau_end=0.99999, tau_increase_pct=100_000 / 375_300
        ),
        knobs=dict(
            n_masks=16, mask_adjust=0.07, block_size=3, decoder_dim=768, decoder_depth=6, decoder_kernel=3,
            center=False, pixel_pct=0.0, class_token_weight=2.56, crop_min=0.2, flip=0.5
        ),
        notes=(
            "Of the paper but not here: blocks with the norm after them, a norm before the first, and a linear "
            "warm-up with a cosine, where ours is one-cycle. First weights are MAE's. The length is the "
            "configuration's, 375,300 updates of 256 images."
        ),
    )  # fmt: skip
    betas = (0.9, 0.95)

    @classmethod
    def derived(cls, facts: Facts) -> dict[str, tuple[Any, str]]:
        short = 0 < (facts.steps or 0) < SHORT_RUN
        return super().derived(facts) | ({"n_masks": (2, f"in only {facts.steps:,} steps")} if short else {})

    def build(self) -> None:
        c, student = self.config, self.student
        self.n_keep = student.n_patches - share(c.mask_ratio, student.n_patches)
        D = student.embed_dim
        W = c.decoder_dim or D
        large = min(student.grid) >= LARGE_GRID
        self.block_size = c.block_size or (3 if large else 1)
        self.decoder = ConvDecoder(student.grid, D, W, c.decoder_depth or (6 if large else 3), c.decoder_kernel)
        self.regressor = nn.Linear(W, D)
        self.build_target(c.top_k_blocks, "ffn", "instance")

    @property
    def prediction_head(self) -> nn.Linear:
        return self.regressor

    @staticmethod
    def initialize(vit: VisionTransformer) -> None:
        initialize_as_mae(vit)

    def describe(self) -> str:
        return (
            f"1 view and {self.config.n_masks} masks an image, {self.n_keep} of {self.student.n_patches} patches seen; "
            f"the target is the feed-forward outputs of the top {len(self.top_blocks)} of {self.student.depth} blocks"
            f"{self.beginning}"
        )

    def views(self) -> ViewTransform:
        return Views(augmentation(self.student.image_size, (self.config.crop_min, 1.0), self.config.flip))

    def masks(self) -> MaskSampler:
        c = self.config
        return InverseBlockMasks(self.student.grid, c.n_masks, self.n_keep, c.mask_adjust, self.block_size)

    def shared_by_step(self, generator: Generator) -> dict[str, Tensor]:
        return {"noise": NOISE * torch.randn(1, self.student.n_patches, self.student.embed_dim, generator=generator)}

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        keep, query = masks["keep"], masks["query"]
        B, M, Q = query.shape
        target = self.target(views[0])  # [B, S, D], once for all masks
        hidden_target = take(target, query.flatten(1)).view(B, M, Q, -1)
        encoded = self.student.encode(views[0], keep=keep)  # [B*M, K, D]
        prediction = self.decode(encoded.tokens, keep.flatten(0, 1), query.flatten(0, 1), masks.get("noise"))
        prediction = prediction.view(B, M, Q, -1)
        loss = scaled_square(prediction, hidden_target)
        logs = target_health(hidden_target, prediction)
        if self.student.vit.cls_token is not None and self.config.class_token_weight and not self.on_pixels:
            class_token = at_least_fp32(encoded.prefix[:, 0]).view(B, M, -1)
            class_loss = scaled_square(class_token, target.mean(dim=1, keepdim=True).expand_as(class_token))
            logs["class_loss"] = class_loss.detach()
            loss = loss + self.config.class_token_weight * class_loss
        embedding = encoded.tokens.detach().mean(dim=1).view(B, M, -1).mean(dim=1)
        extras = {"prediction": prediction, "target": hidden_target, "keep": keep, "query": query}
        return Output(loss, embedding, logs, extras)

    def decode(self, tokens: Tensor, keep: Tensor, query: Tensor, noise: Tensor | None = None) -> Tensor:
        """Visible tokens [R, K, D] at keep [R, K] -> predictions [R, Q, D] at query [R, Q], in at least fp32.

        The other places of the grid hold noise [1, S, D], drawn unless given.
        """
        if noise is None:
            noise = NOISE * torch.randn(1, self.student.n_patches, tokens.shape[-1], device=tokens.device)
        canvas = noise.to(tokens.dtype).expand(len(tokens), -1, -1)
        canvas = canvas.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens)
        return at_least_fp32(self.regressor(take(self.decoder(canvas), query)))


def scaled_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the D channels, over root D, mean over tokens (the published code's scale)."""
    return F.mse_loss(prediction, target) * prediction.shape[-1] ** 0.5
