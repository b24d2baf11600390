"""A timm ViT in the words of transformers: ViTModel, or IJepaModel, which is its ViT without class token.

Needs no transformers: its models are a config.json and names of weights. The names are those of the files on its
hub, which version 5 renames on loading and earlier ones use themselves.
"""

from typing import Any

import torch
from timm.layers import Attention, GELUTanh, Mlp, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from data2vec_vision.errors import InputError
from data2vec_vision.transforms import ImageTransform

ACTIVATIONS = {nn.GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu"}
INSTEAD = "use --format timm: with timm installed, transformers' AutoModel.from_pretrained loads that folder too"
BILINEAR = 2  # Pillow's number for it
OUTSIDE = {  # what is in no block: timm's name, transformers' name
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {  # a block's parts: timm's name, transformers' name
    "norm1": "layernorm_before",
    "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def as_huggingface(
    vit: VisionTransformer, transform: ImageTransform
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The files of configuration by name, and the weights, for transformers' `from_pretrained`.

    LayerScale is multiplied into the linear layer before it: the features are the same. Raises InputError, naming
    the part, for an encoder with one that transformers' ViT has not.
    """
    refuse_other_parts(vit)
    block: Any = vit.blocks[0]
    height, width = vit.patch_embed.img_size
    kind = ("vit", "ViTModel") if vit.cls_token is not None else ("ijepa", "IJepaModel")
    config = {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": ACTIVATIONS[type(block.mlp.act)],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": height if height == width else [height, width],
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": vit.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    return {"config.json": config, "preprocessor_config.json": processor(transform)}, renamed(vit)


def processor(transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json: the whole image resized, not cropped, then normalised.

    Images of other than three channels are expected as `d2v.open_image` gives them.
    """
    photos = transform.channels == 3
    height, width = transform.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": photos,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": photos,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def refuse_other_parts(vit: VisionTransformer) -> None:
    """Raises InputError, naming the part, for a ViT that transformers' cannot compute."""
    block: Any = vit.blocks[0]
    parts = {
        "register tokens": vit.num_reg_tokens > 0,
        "norm before the blocks": not isinstance(vit.norm_pre, nn.Identity),
        f"blocks like timm's {type(block).__name__}": type(block) is not Block,
    }
    if type(block) is Block:
        parts |= {
            f"{type(block.attn).__name__} for attention": type(block.attn) is not Attention,
            f"{type(block.mlp).__name__} for a feed-forward network": type(block.mlp) is not Mlp,
            f"{type(vit.norm).__name__} for a norm": not isinstance(vit.norm, nn.LayerNorm),
        }
    if type(block) is Block and type(block.mlp) is Mlp:
        parts[f"{type(block.mlp.act).__name__} for an activation"] = type(block.mlp.act) not in ACTIVATIONS
    if lacking := [part for part, present in parts.items() if present]:
        raise InputError(f"transformers' ViT has no {' and no '.join(lacking)}; {INSTEAD}")


def renamed(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights by transformers' names. Raises InputError for one that has no place there."""
    ours = dict(vit.state_dict())
    theirs = {"embeddings.position_embeddings": positions(vit)}
    ours.pop("pos_embed", None)
    for index in range(len(vit.blocks)):
        split_qkv(ours, f"blocks.{index}.attn.")
        fold_layer_scale(ours, f"blocks.{index}.")
    for name, tensor in ours.items():
        if (place := OUTSIDE.get(name) or place_in_block(name)) is None:
            raise InputError(f"transformers' ViT has no place for {name}; {INSTEAD}")
        theirs[place] = tensor
    return theirs


def place_in_block(name: str) -> str | None:
    """transformers' name for blocks.INDEX.PART.KIND, or None where it has no such part."""
    block, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    return f"encoder.layer.{index}.{BLOCK[part]}.{kind}" if block == "blocks" and part in BLOCK else None


def positions(vit: VisionTransformer) -> Tensor:
    """Position embeddings [1, S, D]; where there is a class token, with its row in front, of zeros if it has none."""
    n_class = int(vit.cls_token is not None)
    place = torch.zeros(1, n_class + vit.patch_embed.num_patches, vit.embed_dim)
    if vit.pos_embed is not None:
        place[:, -vit.pos_embed.shape[1] :] = vit.pos_embed.detach()
    return place


def split_qkv(weights: dict[str, Tensor], prefix: str) -> None:
    """Replaces timm's one matrix for queries, keys and values by three."""
    for kind in ("weight", "bias"):
        if (joint := weights.pop(f"{prefix}qkv.{kind}", None)) is not None:
            for name, part in zip(("query", "key", "value"), joint.chunk(3)):
                weights[f"{prefix}{name}.{kind}"] = part.clone()


def fold_layer_scale(weights: dict[str, Tensor], prefix: str) -> None:
    """Multiplies a block's LayerScale into the layers whose output it scales."""
    for scale, linear in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        if (gamma := weights.pop(prefix + scale, None)) is not None:
            weights[f"{prefix}{linear}.weight"] = weights[f"{prefix}{linear}.weight"] * gamma[:, None]
            weights[f"{prefix}{linear}.bias"] = weights[f"{prefix}{linear}.bias"] * gamma
