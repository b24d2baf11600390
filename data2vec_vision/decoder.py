"""The decoder that masked methods share: it answers queries about patches from the tokens of other patches.

Shapes: R rows (images, or images times their target blocks), S patches, N prefix tokens, n tokens, q
queries, W the decoder's width. Indices are absolute: [0, N) are the prefix tokens, N + j is patch j.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data2vec_vision.errors import InputError
from data2vec_vision.patches import sincos_position, take
from data2vec_vision.vit import run_block, xavier


class Decoded(NamedTuple):
    """What the decoder makes of its input, after its last norm."""

    tokens: Tensor  # [R, n, W]
    queries: Tensor  # [R, q, W]


class MaskedVisionTransformerDecoder(nn.Module):
    """Transformer blocks over tokens at known places and mask tokens at the places to be predicted.

    `forward(tokens, index, query)` adds to each token the sin-cos position of its index, appends one
    learned mask token a query with the query's position, and runs the blocks over all of them. Attention
    does not care for the order, so no canvas of all patches is needed, and the places of tokens and queries
    may overlap. The same class is MAE's decoder (queries: all hidden patches) and I-JEPA's predictor
    (queries: one target block a row). The maps to the decoder's width and to what is predicted stay outside.

    grid: (rows, columns) of patches. n_prefix: how many prefix tokens precede the patches; their position is
    zero. init: "xavier" as in MAE, or "trunc_normal" as in I-JEPA's code. drop_path rises linearly over the blocks.
    Raises InputError when `dim` is not a multiple of 4 and of `num_heads`.
    """

    position: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        num_heads: int,
        n_prefix: int = 0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        init: Literal["xavier", "trunc_normal"] = "xavier",
    ):
        super().__init__()
        if dim % (unit := math.lcm(4, num_heads)):
            raise InputError(f"a decoder of width {dim} cannot have {num_heads} head(s); use a multiple of {unit}")
        self.grid, self.dim, self.n_prefix = grid, dim, n_prefix
        position = torch.cat([torch.zeros(n_prefix, dim), sincos_position(grid, dim)])
        self.register_buffer("position", position, persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        rates: Any = calculate_drop_path_rates(drop_path, depth)  # of one stage: a list of numbers
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates)
        )
        self.norm = norm(dim)
        self.grad_checkpointing = False
        self.apply(xavier if init == "xavier" else trunc_normal)
        trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, index: Tensor, query: Tensor | None = None) -> Decoded:
        """tokens [R, n, W] at index int64 [R, n], queries at query int64 [R, q] -> both, decoded.

        Indices in [0, N + S). Without queries the second output is empty.
        """
        n = tokens.shape[1]
        x = (
            tokens + self.position[index]
        )  # in fp32, as the encoder's residual stream, whatever autocast makes of tokens
        if query is not None:
            x = torch.cat([x, self.mask_token + self.position[query]], dim=1)
        x = self._decode(x)
        return Decoded(x[:, :n], x[:, n:])

    def forward_full(
        self, tokens: Tensor, mask: Tensor | None = None, query: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """The form for callers who have a token for every place: [R, N + S, W] -> [R, N + S or k, W].

        The places of `mask`, bool [R, N + S], or of `query`, int64 [R, q], get the mask token instead; with
        `keep`, int64 [R, k], only these places are decoded. Raises ValueError for both mask and query.
        """
        if mask is not None and query is not None:
            raise ValueError("give mask or query, not both")
        if query is not None:
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, query, True)
        if mask is not None:
            # Chosen, not multiplied: what stands at a masked place, NaN included, must not leak.
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        x = tokens + self.position
        return self._decode(x if keep is None else take(x, keep))

    def _decode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, recompute=self.grad_checkpointing and self.training)
        return self.norm(x)


def trunc_normal(module: nn.Module) -> None:
    """The weights of BERT, DeiT and I-JEPA: normal of deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def decoder_width(share: float, width: int, heads: int) -> int:
    """About `share` of an encoder's `width`, such that `heads` and sin-cos positions (4) divide it."""
    unit = math.lcm(heads, 4)
    return unit * max(1, round(share * width / unit))
