"""timm and onnxruntime, with what `export` writes for them, compute what our encoder computes."""

import json

import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from data2vec_vision.checkpoint import load_weights, save_encoder
from data2vec_vision.formats import FORMATS, for_timm, timm_call
from data2vec_vision.images import open_image
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer, build_vit

# Names and arguments as `train` knows them.
ENCODERS = {
    "class token": ("vit_small_patch16_224", {}),
    "no class token": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "blocks of another kind": ("vit_base_patch16_rpn_224", {"embed_dim": 96, "num_heads": 12}),
    "its own pool": ("vit_medium_patch16_gap_240", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 4}),
    "registers without class token": ("vit_wee_patch16_reg1_gap_256", {}),
    "pooled by attention": ("vit_base_patch16_siglip_224", {}),
    "norm before the blocks": ("vit_base_patch16_clip_quickgelu_224", {}),
    "layer scale, positions of patches only": ("deit3_small_patch16_224", {}),
    "not square": ("vit_small_patch16_224", {"img_size": (16, 24)}),
    "grey images": ("vit_small_patch16_224", {"in_chans": 1}),
}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TRANSFORM = ImageTransform((16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def encoder(variant):
    """One whose every weight counts: timm starts class tokens and biases at zero."""
    name, arguments = ENCODERS[variant]
    torch.manual_seed(0)
    model = MaskedVisionTransformer(build_vit(name, **(SMALL | arguments)), mask_token=True).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.vit.norm.bias.data += 1  # so that it matters whether the pool is before or behind the norm
    return model


def pools(model):
    return ["mean"] if model.vit.cls_token is None else ["mean", "cls"]


def check(model, vit, pool):
    images = torch.randn(2, model.vit.patch_embed.proj.in_channels, *model.image_size)
    with torch.no_grad():
        tokens, embedding = vit.forward_features(images)[:, vit.num_prefix_tokens :], vit(images)
        torch.testing.assert_close(tokens, model.encode(images).tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(embedding, model.embed(images, pool), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ENCODERS)
def test_timm_loads_the_folder_with_our_features(tmp_path, variant):
    model = encoder(variant)
    for pool in pools(model):
        FORMATS["timm"].write(for_timm(model, pool, {}), tmp_path / pool)
        check(model, timm.create_model(f"local-dir:{tmp_path / pool}", pretrained=True).eval(), pool)


@pytest.mark.parametrize("variant", ENCODERS)
def test_timm_loads_the_student_file_with_the_arguments_that_are_named(tmp_path, variant):
    model = encoder(variant)
    save_encoder(model, tmp_path / "student.pt", method="mae")
    for pool in pools(model):
        line = timm_call(for_timm(model, pool, {}), checkpoint_path=str(tmp_path / "student.pt"))
        check(model, eval(line).eval(), pool)


def test_no_arguments_are_named_that_timm_has_anyway():
    model = MaskedVisionTransformer(build_vit("vit_tiny_patch16_224", depth=12))
    assert timm_call(for_timm(model, "cls", {})) == "timm.create_model('vit_tiny_patch16_224', num_classes=0)"
    pooled = "timm.create_model('vit_tiny_patch16_224', num_classes=0, global_pool='avg', fc_norm=False)"
    assert timm_call(for_timm(model, "mean", {})) == pooled


@pytest.mark.parametrize("variant", ["class token", "no class token", "registers", "its own pool"])
def test_timm_puts_a_classifier_on_it(tmp_path, variant):
    """As `create_model` is used for fine-tuning: another number of classes, another image size."""
    model = encoder(variant)
    pool = pools(model)[-1]
    FORMATS["timm"].write(for_timm(model, pool, {}), tmp_path / "out")
    vit = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), vit.head(model.embed(images, pool)), rtol=1e-5, atol=1e-5)
        larger = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=32).eval()
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(larger(images), model.embed(images, pool), rtol=1e-4, atol=1e-4)


def test_timms_transform_gives_our_pixels_exactly(tmp_path, images):
    model = encoder("not square")
    model.transform = TRANSFORM
    FORMATS["timm"].write(for_timm(model, "mean", {}), tmp_path / "out")
    vit = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    for path in images.rglob("*.*"):
        torch.testing.assert_close(theirs(open_image(path)), TRANSFORM(open_image(path)), rtol=0, atol=1e-6)


def test_safetensors_have_timms_names_and_say_how_to_use_them(tmp_path):
    model = encoder("registers")
    model.transform = TRANSFORM
    FORMATS["safetensors"].write(for_timm(model, "mean", {"method": "mae"}), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == model.vit.state_dict().keys()  # no mask token
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transform"] == TRANSFORM.to_dict()
    assert config["data2vec_vision"] == {"method": "mae", "pool": "mean"}
    vit = timm.create_model(config["model"], num_classes=0, **config["arguments"]).eval()
    vit.load_state_dict(weights)
    check(model, vit, "mean")
    again = MaskedVisionTransformer(build_vit(ENCODERS["registers"][0], **SMALL))
    load_weights(again.vit, tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.vit.parameters(), model.vit.parameters()))


@pytest.mark.parametrize("variant", ["class token", "registers without class token"])
def test_onnx_takes_any_number_of_images(tmp_path, variant):
    model = encoder(variant)
    model.transform = TRANSFORM
    pool = pools(model)[-1]
    FORMATS["onnx"].write(for_timm(model, pool, {"method": "mae", "step": 7}), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    assert b".py" not in (tmp_path / "out.onnx").read_bytes()  # no stack traces of the machine that wrote it
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 16, 16)
        features, embedding = session.run(["features", "embedding"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(features), model.encode(images).tokens, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(embedding), model.embed(images, pool), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == [0.1, 0.2, 0.3] and json.loads(about["image_size"]) == [16, 24]
    assert about["method"] == "mae" and about["pool"] == pool and about["step"] == "7"
