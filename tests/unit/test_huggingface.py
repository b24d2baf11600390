"""transformers' own models, with our files, compute what our encoder computes."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from data2vec_vision.errors import InputError
from data2vec_vision.huggingface import as_huggingface
from data2vec_vision.images import open_image
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer, build_vit

VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "norm behind the pooling": {"global_pool": "avg"},
    "positions of patches only": {"no_embed_class": True},
    "no position embedding": {"pos_embed": "none"},
    "layer scale": {"init_values": 0.1},
    "no bias of queries": {"qkv_bias": False},
    "narrow feed-forward network": {"mlp_ratio": 2.0},
    "GELU by tanh": {"act_layer": "gelu_tanh"},
    "quick GELU": {"act_layer": "quick_gelu"},
    "another epsilon": {"norm_layer": partial(nn.LayerNorm, eps=0.1)},
    "not square": {"img_size": (16, 24)},
    "not square, no class token": {"img_size": (24, 16), "class_token": False, "global_pool": "avg"},
    "grey images": {"in_chans": 1},
}


def encoder(tiny_vit, **arguments):
    """An encoder whose every weight counts: timm starts class tokens and biases at zero."""
    vit = tiny_vit(**arguments).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return MaskedVisionTransformer(vit).eval()


def written(model, folder, transform=None):
    configs, weights = as_huggingface(model.vit, transform or model.transform)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_transformers(tiny_vit, tmp_path, variant):
    model = encoder(tiny_vit, **VARIANTS[variant])
    images = torch.randn(2, model.vit.patch_embed.proj.in_channels, *model.image_size)
    theirs = AutoModel.from_pretrained(written(model, tmp_path / "out"), add_pooling_layer=False).eval()
    with torch.no_grad():
        states, encoded = theirs(images).last_hidden_state, model.encode(images)
    torch.testing.assert_close(states, torch.cat([encoded.prefix, encoded.tokens], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg", "qkv_bias": False}])
def test_weights_have_the_names_that_transformers_itself_saves(tiny_vit, tmp_path, arguments):
    model = encoder(tiny_vit, **arguments)
    AutoModel.from_pretrained(written(model, tmp_path / "a"), add_pooling_layer=False).save_pretrained(tmp_path / "b")
    ours, theirs = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_classifier_starts_from_the_weights(tiny_vit, tmp_path):
    model = encoder(tiny_vit)
    classifier = AutoModelForImageClassification.from_pretrained(written(model, tmp_path / "out"), num_labels=5).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = classifier.classifier(model.embed(images, "cls"))
        torch.testing.assert_close(classifier(images).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_image_processor_gives_our_pixels(tiny_vit, tmp_path, images):
    """Exactly with its Pillow backend; its other one rounds a level of 255 differently here and there."""
    transform = ImageTransform((16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    folder = written(encoder(tiny_vit), tmp_path / "out", transform)
    for backend, tolerance in (("pil", 1e-6), (None, 1.01 / 255 / 0.4)):
        processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        for path in sorted(images.rglob("*.*"))[:6]:
            image = open_image(path)
            theirs = processor(image, return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(theirs, transform(image), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"reg_tokens": 2}, "no register tokens"),
        ({"pre_norm": True}, "no norm before the blocks"),
        ({"reg_tokens": 2, "pre_norm": True}, "no register tokens and no norm before the blocks"),
        ({"qk_norm": True}, "no place for blocks.0.attn.q_norm.weight"),
        ({"act_layer": "silu"}, "no SiLU for an activation"),
        ({"norm_layer": "rmsnorm"}, "no RmsNorm for a norm"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_by_name(tiny_vit, arguments, part):
    model = encoder(tiny_vit, **arguments)
    with pytest.raises(InputError, match=r"use --format timm") as error:
        as_huggingface(model.vit, model.transform)
    assert part in str(error.value)


def test_blocks_of_another_kind_are_refused_by_name():
    vit = MaskedVisionTransformer(build_vit("vit_pwee_patch16_reg1_gap_256", img_size=32, depth=1)).vit
    with pytest.raises(InputError, match="no register tokens and no blocks like timm's ParallelScalingBlock"):
        as_huggingface(vit, ImageTransform((32, 32)))
