"""The encoder that all methods share: a timm VisionTransformer that can see, or miss, chosen patches.

Shapes: B batch, C channels, H x W pixels, P patch side, S patches, K kept, Q queried, N prefix tokens (class
token, registers), D width, L blocks.
"""

import contextlib
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import DropPath, LayerScale, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data2vec_vision.errors import InputError, one_line
from data2vec_vision.patches import patchify, sincos_position, take
from data2vec_vision.transforms import ImageTransform

DEFAULT_MODEL = "vit_small_patch16_224"


class Features(NamedTuple):
    """What the encoder gives a user: patch tokens only, in row-major order."""

    features: Tensor  # [B, S, D], after the final norm
    hidden_states: Tensor  # [L, B, S, D], the output of every block


class Encoded(NamedTuple):
    """What the encoder gives a method."""

    tokens: Tensor  # [B, S or K, D] patch tokens after the final norm
    prefix: Tensor  # [B, N, D] prefix tokens after the final norm
    hidden: list[Tensor]  # the hidden states asked for, each [B, S or K, D], or [B, N + S or K, D] of all tokens


def pooled(encoded: Encoded, pool: str) -> Tensor:
    """One vector an image, [B, D]: the class token ("cls") or the mean of the patch tokens ("mean")."""
    return encoded.prefix[:, 0] if pool == "cls" else encoded.tokens.mean(dim=1)


class MaskedVisionTransformer(nn.Module):
    """Wraps a timm VisionTransformer so that a method can hide patches from it.

    The timm model is used as it is: with or without class token, register tokens, `no_embed_class`,
    a norm before the blocks. Its classifier head is removed, and where its last norm sat behind the
    pooling (`fc_norm`) it is moved before it, so that every model ends in normalised tokens.

    `mask_token=True` adds the learned token that stands in for a hidden patch. Raises InputError for
    an architecture whose patches cannot be hidden.
    """

    def __init__(self, vit: VisionTransformer, mask_token: bool = False):
        super().__init__()
        refuse_unmaskable(vit)
        if isinstance(vit.norm, nn.Identity) and not isinstance(vit.fc_norm, nn.Identity):
            vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
        vit.attn_pool, vit.head, vit.num_classes, vit.global_pool = None, nn.Identity(), 0, ""
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim)) if mask_token else None
        if self.mask_token is not None:
            trunc_normal_(self.mask_token, std=0.02)  # timm's: torch has changed its own between versions
        self.transform = ImageTransform.of_channels(tuple(vit.patch_embed.img_size), vit.patch_embed.proj.in_channels)
        self.pool = "mean"

    @property
    def embed_dim(self) -> int:
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def patch_size(self) -> int:
        return self.vit.patch_embed.patch_size[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels that the model was built for."""
        height, width = self.vit.patch_embed.img_size
        return height, width

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        parts: list[Any] = list(self.vit.blocks.modules())
        return next(part.num_heads for part in parts if hasattr(part, "num_heads"))

    @property
    def n_patches(self) -> int:
        """S: how many patches an image of the size that the model was built for has."""
        return self.grid[0] * self.grid[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of the image size that the model was built for."""
        return self.vit.patch_embed.grid_size

    def top_blocks(self, k: int | None) -> range:
        """The last `k` blocks, without `k` all. Raises InputError for more than there are."""
        if k is not None and k > self.depth:
            raise InputError(
                f"--k {k} is more than the {self.depth} blocks of the encoder; use --k {self.depth} or less"
            )
        return range(self.depth - (k or self.depth), self.depth)

    def start_mask_token(self, token: Tensor | None) -> None:
        """Take over a learned mask token [1, 1, D], where both sides have one."""
        if token is not None and self.mask_token is not None and token.shape == self.mask_token.shape:
            self.mask_token.data.copy_(token)

    def forward(self, x: Tensor) -> Features:
        """Images [B, C, H, W] or patch sequences [B, S, C*P*P] -> features and all hidden states."""
        encoded = self.encode(x, hidden=range(self.depth))
        return Features(encoded.tokens, torch.stack(encoded.hidden))

    def embed(self, x: Tensor, pool: str | None = None) -> Tensor:
        """One vector an image, [B, D]: the mean of the patch tokens ("mean") or the class token ("cls").

        Without `pool`, what the method that trained this encoder uses. Raises InputError for "cls"
        on a model without class token.
        """
        pool = pool or self.pool
        self.check_pool(pool)
        return pooled(self.encode(x), pool)

    def check_pool(self, pool: str) -> None:
        """Raises InputError unless this encoder can give `pool`."""
        if pool not in ("mean", "cls"):
            raise InputError(f"pool must be mean or cls, got {pool!r}")
        if pool == "cls" and self.vit.cls_token is None:
            raise InputError("this encoder has no class token; use the pool mean")

    def encode(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        query: Tensor | None = None,
        hidden: Sequence[int] = (),
        output: str = "block",
    ) -> Encoded:
        """Encode images [B, C, H, W] or patch sequences [B, S, C*P*P].

        keep [B, K]: encode only these patches, indices in [0, S); with M masks an image, keep [B, M, K], each
        image is embedded once and encoded M times, and the output has B*M rows. query [B, Q]: put the mask
        token in place of these patch embeddings before the first block. hidden: the blocks, in [0, L), whose
        states to return: "block" is a block's output at the patches, "all" the same with the prefix tokens
        before them, [B, N + S, D], and "ffn" the output of its feed-forward network before LayerScale and the
        residual.
        """
        if keep is not None and query is not None:
            raise ValueError("encode takes keep or query, not both")
        tokens, position = self._embed_patches(x)
        if keep is not None:
            kept = keep.flatten(1)
            tokens = take(tokens, kept) + take(position.expand(len(tokens), -1, -1), kept)
            tokens = tokens.reshape(-1, keep.shape[-1], tokens.shape[-1])
        else:
            tokens = (tokens if query is None else self._hide(tokens, query)) + position
        x = self.vit.norm_pre(self.vit.pos_drop(torch.cat([*self._prefix(len(tokens)), tokens], dim=1)))
        N = self.vit.num_prefix_tokens
        states: dict[int, Tensor] = {}
        for index, block in enumerate(self.vit.blocks):
            if index in hidden and output == "ffn":
                x, state = _block_and_ffn(block, x)
                states[index] = state[:, N:]
            else:
                x = self._block(block, x)
                if index in hidden:
                    states[index] = x if output == "all" else x[:, N:]
        x = self.vit.norm(x)
        return Encoded(x[:, N:], x[:, :N], [states[index] for index in hidden])

    def attention(self, x: Tensor) -> Tensor | None:
        """How much the last block attends to each patch: images [B, C, H, W] -> [B, heads, S].

        From the class token where that is the feature, else the mean over patches. None for blocks that are not timm's.
        """
        if not has_separate_ffn(self.vit):
            return None
        attn: Any = self.vit.blocks[-1].attn
        inputs: list[Tensor] = []
        hook = attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            self.encode(x)
        finally:
            hook.remove()
        B, T, _ = inputs[0].shape
        q, k, _ = attn.qkv(inputs[0]).view(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        N = self.vit.num_prefix_tokens
        weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(dim=-1)[..., N:]
        return weights[:, :, 0] if self.pool == "cls" else weights[:, :, N:].mean(dim=2)

    def _embed_patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patch embeddings [B, S, D] and their position embeddings [1, S, D] (or zero)."""
        P = self.patch_size
        grid = self.grid
        if x.dim() == 4:
            grid = x.shape[2] // P, x.shape[3] // P
            x = patchify(x, P)
        kernel = self.vit.patch_embed.proj
        length = kernel.weight[0].numel()
        if x.dim() != 3 or x.shape[1] != grid[0] * grid[1] or x.shape[2] != length:
            raise ValueError(
                f"expected images [B, {kernel.in_channels}, H, W] or patch sequences "
                f"[B, {grid[0] * grid[1]}, {length}], got a tensor of shape {list(x.shape)}"
            )
        # The convolution of timm's patch embedding has stride = kernel, so it is one linear map a patch.
        tokens = self.vit.patch_embed.norm(F.linear(x, kernel.weight.flatten(1), kernel.bias))
        return tokens, self._position(grid)

    def _position(self, grid: tuple[int, int]) -> Tensor:
        if self.vit.pos_embed is None:
            return self.vit.patch_embed.proj.weight.new_zeros(1, 1, 1).expand(1, grid[0] * grid[1], 1)
        prefix = self._embedded_prefix_tokens
        position = self.vit.pos_embed
        if grid != tuple(self.grid):
            position = resample_abs_pos_embed(position, list(grid), list(self.grid), num_prefix_tokens=prefix)
        return position[:, prefix:]

    @property
    def _embedded_prefix_tokens(self) -> int:
        """How many prefix tokens have a row in the position embedding."""
        return 0 if self.vit.no_embed_class or self.vit.pos_embed is None else self.vit.num_prefix_tokens

    def _prefix(self, batch: int) -> list[Tensor]:
        """The class and register tokens with their positions, as a list of at most one [B, N, D]."""
        tokens: list[Tensor] = [t for t in (self.vit.cls_token, self.vit.reg_token) if t is not None]
        if not tokens:
            return []
        prefix = torch.cat(tokens, dim=1)
        if self._embedded_prefix_tokens:
            prefix = prefix + self.vit.pos_embed[:, : self._embedded_prefix_tokens]
        return [prefix.expand(batch, -1, -1)]

    def _hide(self, tokens: Tensor, query: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "this encoder was built without a mask token: MaskedVisionTransformer(vit, mask_token=True)"
            )
        index = query.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return tokens.scatter(1, index, self.mask_token.to(tokens.dtype).expand_as(index))

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        return run_block(block, x, recompute=self.vit.grad_checkpointing and self.training)


def run_block(block: Callable[[Tensor], Tensor], x: Tensor, recompute: bool) -> Tensor:
    """block(x); with `recompute` what is inside is not kept for the backward pass but computed again there.

    Dropout and drop path draw the same numbers then.
    """
    if recompute:
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


def _block_and_ffn(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Block, written out to hand over the feed-forward output: before LayerScale, drop path, residual.

    Before LayerScale because its initial 1e-5 would push the state below a norm's epsilon.
    """
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    ffn = block.mlp(block.norm2(x))
    return x + block.drop_path2(block.ls2(ffn)), ffn


def refuse_unmaskable(vit: nn.Module) -> None:
    """Raises InputError, naming the architecture, unless patches can be hidden from `vit`."""
    other = f"; choose another --model, for example {DEFAULT_MODEL}"
    if type(vit) is not VisionTransformer:
        raise InputError(
            f"{type(vit).__name__} is not a plain timm VisionTransformer, so its patches cannot be masked{other}"
        )
    if type(vit.patch_embed) is not PatchEmbed:
        raise InputError(f"a {type(vit.patch_embed).__name__} has no plain patches to mask{other}")
    (height, width), (P, P2) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if P != P2:
        raise InputError(f"patches of {P} x {P2} pixels are not square{other}")
    if height % P or width % P:
        near = max(P, round(height / P) * P)
        raise InputError(f"images of {height} pixels cannot be cut into patches of {P}; use --image-size {near}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise InputError("build the encoder with patch_drop_rate=0: the method chooses which patches are seen")


def has_separate_ffn(vit: VisionTransformer) -> bool:
    """Whether every block has a feed-forward network of its own behind the attention (timm's Block)."""
    return all(type(block) is Block for block in vit.blocks)


def forward_flops(patches: int, width: int, depth: int) -> int:
    """FLOP of one forward pass of the blocks over one image: the linear maps and the attention."""
    return depth * (24 * patches * width**2 + 4 * patches**2 * width)


def build_vit(model: str = DEFAULT_MODEL, pretrained: bool = False, **arguments: Any) -> VisionTransformer:
    """A timm VisionTransformer by name, without its head; `arguments` as for timm.create_model.

    Raises InputError for an unknown name, with the nearest ones, for arguments that do not fit, and
    when the pretrained weights cannot be had.
    """
    if not timm.is_model(model):
        nearest = difflib.get_close_matches(model, usable_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"try for example {DEFAULT_MODEL}"
        raise InputError(f"timm has no model named {model!r}; {hint}")
    try:
        vit: Any = timm.create_model(model, pretrained=pretrained, num_classes=0, **arguments)
    except (AssertionError, TypeError, ValueError, RuntimeError, OSError) as error:
        if pretrained:
            raise InputError(f"the pretrained weights of {model} cannot be loaded: {one_line(error)}") from error
        plain = None
        with torch.device("meta"), contextlib.suppress(AssertionError, TypeError, ValueError, RuntimeError, OSError):
            plain = timm.create_model(model)
        if plain is not None:  # then the arguments are to blame, or parts that cannot be masked
            refuse_unmaskable(plain)
        raise InputError(f"timm cannot build {model}: {one_line(error)}") from error
    return vit


def usable_models(pattern: str = "") -> list[str]:
    """Names of timm models whose patches can be masked, sorted; `pattern` with * as in timm.list_models."""
    modules = ("vision_transformer", "deit")
    names = {name for module in modules for name in timm.list_models(pattern, module=module)}
    return sorted(name for name in names if "distilled" not in name)


def fix_position(vit: VisionTransformer) -> None:
    """Gives the encoder the fixed sin-cos position of MAE and I-JEPA: zero for prefix tokens, not trained."""
    if vit.pos_embed is None:
        return
    position = sincos_position(vit.patch_embed.grid_size, vit.embed_dim)
    prefix = vit.pos_embed.shape[1] - len(position)
    vit.pos_embed.data.zero_()[0, prefix:] = position
    vit.pos_embed.requires_grad_(False)


def xavier(module: nn.Module) -> None:
    """MAE's weights: xavier uniform, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize_as_mae(vit: VisionTransformer) -> None:
    """MAE's first weights (He et al. 2022, appendix A.1, and its code) and its fixed sin-cos position."""
    fix_position(vit)
    vit.blocks.apply(xavier)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))  # as the linear map that it is
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02)


def architecture(vit: VisionTransformer) -> dict[str, Any]:
    """{"model": a timm name, "arguments": for timm.create_model} that build this encoder again.

    Raises InputError for an encoder made of parts that these cannot name.
    """
    block: Any = vit.blocks[0]
    arguments: dict[str, Any] = {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": vit.patch_embed.patch_size[0],
        "in_chans": vit.patch_embed.proj.in_channels,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": vit.no_embed_class,
    }
    if vit.cls_token is None:
        arguments["global_pool"] = "avg"  # timm refuses its default, the class token
    if has_separate_ffn(vit):
        arguments["num_heads"] = block.attn.num_heads
        arguments["qkv_bias"] = block.attn.qkv.bias is not None
        arguments["init_values"] = 1e-5 if isinstance(block.ls1, LayerScale) else None
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture", DEFAULT_MODEL)
    description = {"model": name, "arguments": arguments}
    with torch.device("meta"):
        twin = MaskedVisionTransformer(build_vit(description["model"], **arguments)).vit
    if _parts(twin) != _parts(vit):
        raise InputError(
            "this encoder was built with parts that no timm name describes; "
            "save the weights of its timm model yourself: torch.save(model.student.vit.state_dict(), path)"
        )
    return description


def _parts(vit: VisionTransformer) -> list[str]:
    """What must agree for two encoders to compute the same function of the same weights."""
    passive = (nn.Identity, nn.Dropout, DropPath)
    parts = [str(m) for m in vit.modules() if not isinstance(m, passive) and not list(m.children())]
    return parts + [f"{name} {list(t.shape)}" for name, t in vit.state_dict().items()]
