"""I-JEPA: from one block of an image, predict what a slow copy of the encoder makes of four other blocks.

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
section 3. Shapes: B batch, S patches, K context patches, M target blocks, Q patches of a block, D width of
the encoder, W of the predictor.

What differs from the published code: the sampler's biases are mended (`multiblock` says which;
`official_sampler=true` has them back), and the context has the same size whatever the batch. And by default, because
on small images the paper's setting learned nothing in runs of minutes (benchmarks/RESULTS.md): the target is that of
data2vec 2.0, the mean of all feed-forward outputs less what the place tells, and a run from scratch begins with pixels;
all first weights are MAE's; on small grids all patches outside the context are predicted at once instead of
four blocks. `target_output=last center=false targets=blocks` is the paper's.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from data2vec_vision.decoder import MaskedVisionTransformerDecoder, decoder_width
from data2vec_vision.errors import InputError
from data2vec_vision.knobs import knob
from data2vec_vision.masking import (
    MaskSampler,
    largest_context,
    multiblock,
    multiblock_official,
    others,
    random_keep,
    share,
)
from data2vec_vision.methods.base import Output
from data2vec_vision.methods.latent import MeanOfBlocks
from data2vec_vision.patches import take
from data2vec_vision.recipes import VIT_B, PaperRecipe
from data2vec_vision.schedules import cosine
from data2vec_vision.targets import at_least_fp32, layer_norm, target_health
from data2vec_vision.transforms import Views, ViewTransform, augmentation
from data2vec_vision.vit import initialize_as_mae, xavier

SMALLEST_GRID = 4  # patches a side; below it a target block would be a single patch
LARGE_GRID = 12  # patches a side, from which on blocks are predicted


@dataclass(frozen=True)
class MultiBlockMasks:
    """Draws {"keep": the context of one image, int64 [K], "query": its target blocks, int64 [M, Q]}."""

    grid: tuple[int, int]
    n_targets: int
    n_context: int
    official: bool

    def __call__(self, generator: Generator, shared: Generator) -> dict[str, Tensor]:
        if self.official:
            context, targets = multiblock_official(self.grid, self.n_targets, generator, shared)
        else:
            context, targets = multiblock(self.grid, self.n_targets, self.n_context, generator, shared)
        return {"keep": context, "query": targets}


@dataclass(frozen=True)
class PatchMasks:
    """Draws {"keep": the context of one image, int64 [K], "query": all its other patches, int64 [1, Q]}."""

    n_patches: int
    n_context: int

    def __call__(self, generator: Generator, shared: Generator) -> dict[str, Tensor]:
        keep = random_keep(self.n_patches, self.n_context, generator)
        return {"keep": keep, "query": others(keep, self.n_patches).unsqueeze(0)}


class IJEPA(MeanOfBlocks):
    """I-JEPA (Assran et al. 2023): predict, from a part of an image, what a slow copy makes of the rest."""

    @dataclass(frozen=True)
    class Config(MeanOfBlocks.Config):
        targets: Literal["auto", "blocks", "patches"] = knob(
            "auto",
            "what is predicted: blocks, or all patches outside the context; auto: below 12 a side patches",
            paper="blocks",
        )
        target_output: Literal["ffn", "last"] = knob(
            "ffn", "what of the teacher is predicted: the mean of all feed-forward outputs, or its last", paper="last"
        )
        n_targets: int = knob(4, "target blocks an image", "[1, 1000]", "4")
        context_ratio: float = knob(0.25, "share of the patches in the context", "(0, 1)", "about 0.25, by its batches")
        official_sampler: bool = knob(False, "sample blocks as the published code does, biases included", paper="true")
        predictor_dim: int | None = knob(None, "width of the predictor; none: half the encoder's", "[4, inf)", "384")
        predictor_depth: int | None = knob(
            None, "blocks of the predictor; none: half the encoder's", "[1, 1000]", "6 to 16"
        )
        beta: float = knob(1.0, "error at which smooth L1 turns from square to straight", "[0, inf)", "1", "beta")
        tau_initial: float = knob(0.996, "the teacher's EMA factor at the start", "[0, 1]", "0.996", "tau_initial")
        tau_end: float = knob(1.0, "the teacher's EMA factor after its rise", "[0, 1]", "1", "tau_end")
        tau_increase_pct: float = knob(1.0, "share of the run in which tau rises", "[0, 1]", "1", "tau_increase_pct")
        weight_decay_end: float = knob(
            0.4, "weight decay at the end, by a cosine, unless --weight-decay is 0", "[0, inf)", "0.4"
        )
        crop_min: float = knob(0.3, "smallest share of the image that a crop keeps", "(0, 1]", "0.3")
        flip: float = knob(0.0, "probability of a mirror image", "[0, 1]", "0")

    # No clipping, and no decay at first but little: the published configuration.
    recipe = MappingProxyType(
        {"max_lr_at_256": 1e-3, "warmup_pct": 0.1, "weight_decay": 0.04, "clip_grad": 0.0, "tau_memory": 0.5}
    )
    paper = PaperRecipe(
        "Assran et al. 2023, ViT-B/16, and facebookresearch/ijepa (configs of ViT-H/14)",
        options=VIT_B | dict(
            epochs=600, batch_size=2048, max_lr=1e-3, warmup_pct=15 / 600, weight_decay=0.04, clip_grad=0.0,
            beta=1.0, tau_initial=0.996, tau_end=1.0, tau_increase_pct=1.0
        ),
        knobs=dict(
            targets="blocks", target_output="last", center=False, pixel_pct=0.0, n_targets=4, context_ratio=0.25,
            official_sampler=True, predictor_dim=384, predictor_depth=6, weight_decay_end=0.4, crop_min=0.3, flip=0.0
        ),
        notes=(
            "First weights are MAE's. No configuration of a ViT-B was published. Epochs and warm-up are the paper's, "
            "where the code of ViT-H/14 warms up for 40 of 300 epochs; the loss is the code's smooth L1, not the "
            "paper's L2; 6 predictor blocks are the code's default. The rate is one-cycle instead of a linear warm-up "
            "and a cosine. The official sampler cuts contexts to the shortest of a pass: with 128 images in a pass "
            "they are about as long as the published ones."
        ),
    )  # fmt: skip
    class_token = False

    def build(self) -> None:
        c, student = self.config, self.student
        small = min(student.grid) < LARGE_GRID and not c.official_sampler
        self.in_blocks = c.targets == "blocks" or (c.targets == "auto" and not small)
        if self.in_blocks and min(student.grid) < SMALLEST_GRID:
            rows, columns = student.grid
            raise InputError(
                f"a grid of {rows} x {columns} patches is too small for the blocks of I-JEPA, which needs "
                f"{SMALLEST_GRID} x {SMALLEST_GRID}; use a larger --image-size or a smaller --patch-size"
            )
        if c.official_sampler and not self.in_blocks:
            raise InputError("official_sampler=true draws blocks; leave out targets=patches")
        if c.n_targets != type(c).n_targets and not self.in_blocks:
            raise InputError(
                f"n_targets={c.n_targets} is for blocks, and single patches are predicted; add targets=blocks"
            )
        self.n_context = share(c.context_ratio, student.n_patches)
        W = c.predictor_dim or decoder_width(1 / 2, student.embed_dim, student.num_heads)
        depth = c.predictor_depth or max(1, student.depth // 2)
        self.embed = nn.Linear(student.embed_dim, W)
        self.predictor = MaskedVisionTransformerDecoder(student.grid, W, depth, student.num_heads)
        self.head = nn.Linear(W, student.embed_dim)
        self.embed.apply(xavier)
        self.head.apply(xavier)
        self.build_target(None, "block" if c.target_output == "last" else "ffn", "instance")
        if self.in_blocks:
            self._refuse_masks_that_do_not_fit()

    @property
    def prediction_head(self) -> nn.Linear:
        return self.head

    @staticmethod
    def initialize(vit: VisionTransformer) -> None:
        initialize_as_mae(vit)

    def _refuse_masks_that_do_not_fit(self) -> None:
        """Raises InputError when the blocks asked for leave no context: now, rather than in a worker."""
        c, draw, (rows, columns) = self.config, self.masks(), self.student.grid
        generators = [(Generator().manual_seed(seed), Generator().manual_seed(seed)) for seed in range(20)]
        with torch.device("cpu"):  # also where the method is built without memory
            drawn = [draw(*pair)["query"] for pair in generators]
        if c.official_sampler:  # which raises by itself
            return
        # All targets at one place is the last resort of the sampler.
        at_one_place = c.n_targets > 1 and all((query == query[0]).all() for query in drawn)
        if self.n_context > largest_context(self.student.grid) or at_one_place:
            raise InputError(
                f"{c.n_targets} target blocks of a sixth of the grid leave no room for a context of {self.n_context} "
                f"of the {rows} x {columns} patches; use a smaller context_ratio, or fewer n_targets"
            )

    def describe(self) -> str:
        c, predictor, S = self.config, self.predictor, self.student.n_patches
        context = "what they leave of a large block" if c.official_sampler else f"{self.n_context} patches"
        targets = f"{c.n_targets} blocks" if self.in_blocks else "the others"
        return (
            f"1 view an image; from {context} of {S} a predictor of {predictor.dim} x "
            f"{len(predictor.blocks)} tells what the teacher makes of {targets}{self.beginning}"
        )

    def views(self) -> ViewTransform:
        return Views(augmentation(self.student.image_size, (self.config.crop_min, 1.0), self.config.flip))

    def masks(self) -> MaskSampler:
        c = self.config
        if not self.in_blocks:
            return PatchMasks(self.student.n_patches, self.n_context)
        return MultiBlockMasks(self.student.grid, c.n_targets, self.n_context, c.official_sampler)

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        keep, query = masks["keep"], masks["query"]
        B, M, Q = query.shape
        target = take(self.target(views[0]), query.flatten(1)).view(B, M, Q, -1)
        encoded = self.student.encode(views[0], keep=keep)
        # A row is one block of one image, image by image, so that blocks do not see each other's queries.
        context, places = (x.repeat_interleave(M, dim=0) for x in (self.embed(encoded.tokens), keep))
        predicted = self.predictor(context, places, query.flatten(0, 1)).queries
        prediction = at_least_fp32(self.head(predicted)).view(B, M, Q, -1)
        loss = F.smooth_l1_loss(prediction, target, beta=self.config.beta)
        logs = target_health(target, prediction)
        logs |= {"context_patches": loss.new_full((), keep.shape[1]), "target_patches": loss.new_full((), Q)}
        extras = {"prediction": prediction, "target": target, **masks}
        return Output(loss, encoded.tokens.detach().mean(dim=1), logs, extras)

    def latent(self, images: Tensor) -> Tensor:
        if self.config.target_output == "ffn":
            return super().latent(images)
        y = at_least_fp32(self.teacher.encode(images).tokens)
        return layer_norm(y if self.position_mean is None else self.position_mean(y))

    def weight_decay(self, first: float, progress: float) -> float:
        return cosine(first, self.config.weight_decay_end, progress)
