"""MAE: encode a quarter of the patches, and reconstruct the pixels of the others with a small decoder.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3. Shapes: B batch, S patches,
C channels, K kept, Q hidden, N prefix tokens, D width of the encoder, W of the decoder, P patch side.

What differs from the published code: the decoder is smaller for small encoders, and gradients are clipped.
The decoder gets the visible tokens at their places and mask tokens at the hidden ones, without a canvas in
between; it is the same function as the paper's un-shuffling, in another order of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from data2vec_vision.decoder import MaskedVisionTransformerDecoder
from data2vec_vision.knobs import knob
from data2vec_vision.masking import MaskSampler, others, random_keep, share
from data2vec_vision.methods.base import Method, Output
from data2vec_vision.patches import patch_statistics, patchify, take, unpatchify
from data2vec_vision.pictures import grid, masked, shown
from data2vec_vision.recipes import VIT_B, PaperRecipe
from data2vec_vision.targets import at_least_fp32, target_health
from data2vec_vision.transforms import UnNormalize, Views, ViewTransform, augmentation
from data2vec_vision.vit import initialize_as_mae, xavier


@dataclass(frozen=True)
class RandomMasks:
    """Draws {"keep": the patches of one image that the encoder sees, int64 [K], "query": the others, int64 [Q]}."""

    S: int
    n_keep: int

    def __call__(self, generator: Generator, shared: Generator) -> dict[str, Tensor]:
        keep = random_keep(self.S, self.n_keep, generator)
        return {"keep": keep, "query": others(keep, self.S)}


class MAE(Method):
    """MAE (He et al. 2021): reconstruct the pixels of the patches that the encoder does not see."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        mask_ratio: float = knob(0.75, "share of the patches that is hidden", "(0, 1)", "0.75", "mask_erase_pct")
        norm_pix: bool = knob(True, "reconstruct each patch less its mean, over its deviation", paper="true")
        decoder_dim: int | None = knob(
            None, "width of the decoder; none: two thirds of the encoder's", "[4, inf)", "512"
        )
        decoder_depth: int | None = knob(
            None, "blocks of the decoder; none: 8 from width 768 on, else 4", "[1, 1000]", "8"
        )
        decoder_heads: int | None = knob(None, "heads of the decoder; none: of 32 channels", "[1, inf)", "16")
        crop_min: float = knob(0.2, "smallest share of the image that a crop keeps", "(0, 1]", "0.2")
        flip: float = knob(0.5, "probability of a mirror image", "[0, 1]", "0.5")

    recipe = MappingProxyType({"max_lr_at_256": 1e-3, "warmup_pct": 0.1, "weight_decay": 0.05, "clip_grad": 3.0})
    paper = PaperRecipe(
        "He et al. 2022, ViT-B, and facebookresearch/mae (PRETRAIN.md)",
        options=VIT_B | dict(
            epochs=1600, batch_size=4096, max_lr=2.4e-3, warmup_pct=40 / 1600, weight_decay=0.05, clip_grad=0.0,
            mask_erase_pct=0.75
        ),
        knobs=dict(
            norm_pix=True, decoder_dim=512, decoder_depth=8, decoder_heads=16, crop_min=0.2, flip=0.5
        ),
        notes=(
            "The rate, 1.5e-4 x 4096 / 256 at its peak, is one-cycle instead of a linear warm-up and a cosine. Of the "
            "published 800 and 1,600 epochs the longer is taken."
        ),
    )  # fmt: skip
    betas = (0.9, 0.95)

    def build(self) -> None:
        c, student = self.config, self.student
        self.n_keep = student.n_patches - share(c.mask_ratio, student.n_patches)
        W = c.decoder_dim or min(512, 32 * max(1, round(student.embed_dim / 48)))
        depth = c.decoder_depth or (8 if student.embed_dim >= 768 else 4)
        heads = c.decoder_heads or next(h for h in range(max(1, W // 32), 0, -1) if W % h == 0)
        self.embed = nn.Linear(student.embed_dim, W)
        self.decoder = MaskedVisionTransformerDecoder(
            student.grid, W, depth, heads, student.vit.num_prefix_tokens, init="xavier"
        )
        self.head = nn.Linear(W, student.vit.patch_embed.proj.weight[0].numel())  # C*P*P
        self.embed.apply(xavier)
        self.head.apply(xavier)

    @staticmethod
    def initialize(vit: VisionTransformer) -> None:
        initialize_as_mae(vit)

    def describe(self) -> str:
        S, decoder = self.student.n_patches, self.decoder
        pixels = "pixels, normalised in each patch" if self.config.norm_pix else "pixels"
        return (
            f"1 view an image, {self.n_keep} of {S} patches seen; a decoder of {decoder.dim} x {len(decoder.blocks)} "
            f"reconstructs the {pixels}, of the others"
        )

    def views(self) -> ViewTransform:
        return Views(augmentation(self.student.image_size, (self.config.crop_min, 1.0), self.config.flip))

    def masks(self) -> MaskSampler:
        return RandomMasks(self.student.n_patches, self.n_keep)

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        target = take(self.target(views[0]), masks["query"])
        encoded = self.student.encode(views[0], keep=masks["keep"])
        prediction = self.decode(encoded.prefix, encoded.tokens, masks)
        loss = F.mse_loss(prediction, target)
        extras = {"prediction": prediction, "target": target, **masks}
        return Output(loss, encoded.tokens.detach().mean(dim=1), target_health(target, prediction), extras)

    def decode(self, prefix: Tensor, tokens: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """Tokens after the encoder, [B, N, D] and [B, K, D] -> patches at `query` [B, Q, C*P*P] in at least fp32."""
        B, N = prefix.shape[:2]
        first = torch.arange(N, device=tokens.device).expand(B, N)
        seen = self.embed(torch.cat([prefix, tokens], dim=1))
        decoded = self.decoder(seen, torch.cat([first, N + masks["keep"]], dim=1), N + masks["query"])
        return at_least_fp32(self.head(decoded.queries))

    def target(self, images: Tensor) -> Tensor:
        """The pixels of every patch, [B, C, H, W] -> [B, S, C*P*P]; with norm_pix of mean 0 and variance 1 each."""
        patches = at_least_fp32(patchify(images, self.student.patch_size) if images.dim() == 4 else images)
        if not self.config.norm_pix:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, masks: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, C, H, W] with their hidden patches as the decoder sees them; and the masks, drawn unless given.

        With norm_pix the decoder knows a patch up to its mean and deviation: these are taken from the image.
        """
        self.refuse_other_size(images)
        masks = self.sample_masks(len(images), images.device) if masks is None else masks
        encoded = self.student.encode(images, keep=masks["keep"])
        prediction = self.decode(encoded.prefix, encoded.tokens, masks)
        patches = at_least_fp32(patchify(images, self.student.patch_size))
        if self.config.norm_pix:
            mean, deviation = (take(s, masks["query"]) for s in patch_statistics(patches))
            prediction = prediction * deviation + mean
        index = masks["query"].unsqueeze(-1).expand_as(prediction)
        patches = patches.scatter(1, index, prediction.to(patches.dtype))
        rows, columns = images.shape[2] // self.student.patch_size, images.shape[3] // self.student.patch_size
        return unpatchify(patches, self.student.patch_size, (rows, columns)), masks

    def picture(self, images: Sequence[Image.Image | Tensor], masks: dict[str, Tensor] | None = None) -> Image.Image:
        """A row an image, as `open_image` gives it: the image, what the encoder sees of it, and the reconstruction."""
        transform = self.student.transform
        views = torch.stack([transform.resized(image) for image in images])
        device = next(self.parameters()).device
        pixels, masks = self.reconstruct(transform.normalized(views.to(device)), masks)
        pixels = UnNormalize(transform.mean, transform.std)(pixels).cpu()
        rows = []
        for n, view in enumerate(views):
            seen = masked(view, self.student.patch_size, {name: mask[n].cpu() for name, mask in masks.items()})
            drawn = shown((pixels[n].clamp(0, 1) * 255).round().byte() if len(view) == 3 else pixels[n], like=view)
            tiles = (shown(view), "image"), (seen, "what it sees"), (drawn, "reconstruction")
            rows.append([(tile, caption, None) for tile, caption in tiles])
        return grid(rows, side=144)
