"""data2vec: predict, from an image with hidden patches, what a slow copy of the network makes of the whole image.

Baevski et al. 2022, "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and
Language", sections 3 and 4.1. Shapes: B batch, S patches, Q hidden patches, D width, K top blocks.

What differs from the paper's vision recipe: the target is the feed-forward outputs with instance norm, as
in the paper's speech recipe and in data2vec 2.0, because it learns on small data sets, where block
outputs with layer norm (`target_output=block target_norm=layer`) hardly do; it loses its mean at each place
(`center`), without which it comes to tell the place and not the image; every image has exactly the same number
of hidden patches; the teacher's tau may rise; positions are fixed and first weights MAE's, because from timm's it
had not begun to learn in 400 steps; and `train` begins with pixels (see latent.py). The loss is a mean over images of
equal weight, so gradient accumulation changes nothing.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from data2vec_vision.knobs import knob
from data2vec_vision.masking import MaskSampler, block_mask, share
from data2vec_vision.methods.base import Output
from data2vec_vision.methods.latent import MeanOfBlocks
from data2vec_vision.patches import take
from data2vec_vision.recipes import VIT_B, PaperRecipe
from data2vec_vision.targets import at_least_fp32, target_health
from data2vec_vision.transforms import Views, ViewTransform, augmentation
from data2vec_vision.vit import initialize_as_mae


@dataclass(frozen=True)
class BlockMasks:
    """Draws {"query": the hidden patches of one image, int64 [Q]}."""

    grid: tuple[int, int]
    n_masked: int

    def __call__(self, generator: Generator, shared: Generator) -> dict[str, Tensor]:
        return {"query": block_mask(self.grid, self.n_masked, generator)}


class Data2Vec(MeanOfBlocks):
    """data2vec (Baevski et al. 2022): predict, at hidden patches, what a slow copy makes of the whole image."""

    @dataclass(frozen=True)
    class Config(MeanOfBlocks.Config):
        top_k_blocks: int | None = knob(
            None, "how many of the last blocks are averaged into the target; none: all", "[1, inf)", "6 of 12", "k"
        )
        mask_ratio: float = knob(0.6, "share of the patches that is hidden", "(0, 1)", "0.61", "mask_erase_pct")
        beta: float = knob(2.0, "error at which smooth L1 turns from square to straight", "[0, inf)", "2", "beta")
        tau_initial: float = knob(0.9998, "the teacher's EMA factor at the start", "[0, 1]", "0.9998", "tau_initial")
        tau_end: float = knob(0.9998, "the teacher's EMA factor after its rise", "[0, 1]", "0.9998", "tau_end")
        tau_increase_pct: float = knob(
            0.3, "share of the run in which tau rises", "[0, 1]", "no rise", "tau_increase_pct"
        )
        target_output: Literal["ffn", "block"] = knob("ffn", "the state of a block that is predicted", paper="block")
        target_norm: Literal["instance", "layer"] = knob("instance", "norm of each block's state", paper="layer")
        crop_min: float = knob(0.2, "smallest share of the image that a crop keeps", "(0, 1]", "0.08")
        color_jitter: float = knob(0.4, "strength of the colour jitter", "[0, 1]", "0.4")
        flip: float = knob(0.5, "probability of a mirror image", "[0, 1]", "0.5")

    recipe = MappingProxyType(
        {"max_lr_at_256": 1e-3, "warmup_pct": 0.1, "weight_decay": 0.05, "clip_grad": 3.0, "tau_memory": 0.5}
    )
    paper = PaperRecipe(
        "Baevski et al. 2022, ViT-B, as run by facebookresearch/data2vec_vision (beit/README.md)",
        options=VIT_B | dict(
            epochs=800, batch_size=2048, max_lr=2e-3, warmup_pct=10 / 800, weight_decay=0.05, clip_grad=3.0, k=6,
            beta=2.0, mask_erase_pct=0.61, tau_initial=0.9998, tau_end=0.9998, tau_increase_pct=0.0
        ),
        knobs=dict(
            target_output="block", target_norm="layer", center=False, pixel_pct=0.0, crop_min=0.08, color_jitter=0.4,
            flip=0.5
        ),
        notes=(
            "Of the paper but not here: relative positions shared by all layers, layer scale, drop path of 0.25, "
            "attention dropout of 0.05, and a linear warm-up with a cosine, where ours is one-cycle. Warm-up and "
            "masks are those of the code, which hides at most 120 of 196 patches, here always 120. First weights and "
            "the fixed positions are MAE's."
        ),
    )  # fmt: skip
    mask_token = True

    def build(self) -> None:
        c, student = self.config, self.student
        self.n_masked = share(c.mask_ratio, student.n_patches)
        self.regressor = nn.Linear(student.embed_dim, student.embed_dim)
        self.build_target(c.top_k_blocks, c.target_output, c.target_norm)

    @property
    def prediction_head(self) -> nn.Linear:
        return self.regressor

    @staticmethod
    def initialize(vit: VisionTransformer) -> None:
        initialize_as_mae(vit)

    def describe(self) -> str:
        c, S = self.config, self.student.n_patches
        state = "feed-forward outputs" if c.target_output == "ffn" else "outputs"
        return (
            f"1 view an image, {self.n_masked} of {S} patches hidden in blocks; the target is the {state} "
            f"of the top {len(self.top_blocks)} of {self.student.depth} blocks, {c.target_norm} norm{self.beginning}"
        )

    def views(self) -> ViewTransform:
        c = self.config
        return Views(augmentation(self.student.image_size, (c.crop_min, 1.0), c.flip, c.color_jitter))

    def masks(self) -> MaskSampler:
        return BlockMasks(self.student.grid, self.n_masked)

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        target = take(self.target(views[0]), masks["query"])
        encoded = self.student.encode(views[0], query=masks["query"])
        prediction = at_least_fp32(self.regressor(take(encoded.tokens, masks["query"])))
        loss = F.smooth_l1_loss(prediction, target, beta=self.config.beta)
        embedding = encoded.tokens.detach().mean(dim=1)
        extras = {"prediction": prediction, "target": target, **masks}
        return Output(loss, embedding, target_health(target, prediction), extras)
