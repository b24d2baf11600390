"""The masked ViT is timm's ViT, with patches that can be left out or replaced by the mask token."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data2vec_vision.device import set_fused_attention
from data2vec_vision.errors import InputError
from data2vec_vision.patches import patchify
from data2vec_vision.vit import MaskedVisionTransformer, architecture, build_vit, has_separate_ffn, usable_models

VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "norm behind the pooling": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "registers without class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 1},
    "norm before the blocks": {"pre_norm": True},
    "no position embedding": {"pos_embed": "none"},
    "layer scale": {"init_values": 0.1},
    "dynamic size": {"dynamic_img_size": True},
    "not square": {"img_size": (16, 24)},
    "pooled by attention": {"global_pool": "map"},
    "grey images": {"in_chans": 1},
}


@pytest.fixture(params=VARIANTS)
def vit(request, tiny_vit):
    vit = tiny_vit(**VARIANTS[request.param]).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)  # timm starts class tokens and biases at zero, where mistakes hide
    return vit


def batch(vit, size=4):
    torch.manual_seed(1)
    return torch.randn(size, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)


def test_features_are_timms(vit):
    images = batch(vit)
    expected = vit.fc_norm(vit.forward_features(images))[:, vit.num_prefix_tokens :]
    _, hidden = vit.forward_intermediates(images, norm=False, output_fmt="NLC")
    ours = MaskedVisionTransformer(vit)(images)
    torch.testing.assert_close(ours.features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.hidden_states, torch.stack(hidden), rtol=1e-5, atol=1e-5)


def test_hidden_states_of_all_tokens_are_timms(vit):
    """The prefix tokens first, then the patches."""
    images = batch(vit)
    arguments = {"norm": False, "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    # Without prefix tokens timm leaves out the pairs.
    pairs = [s if isinstance(s, tuple) else (s, s[:, :0]) for s in vit.forward_intermediates(images, **arguments)]
    states = MaskedVisionTransformer(vit).encode(images, hidden=(2, 0), output="all").hidden
    for state, (patches, prefix) in zip(states, (pairs[2], pairs[0])):
        torch.testing.assert_close(state, torch.cat([prefix, patches], dim=1), rtol=1e-5, atol=1e-5)


def test_patch_sequences_and_images_give_the_same_features(vit):
    model, images = MaskedVisionTransformer(vit), batch(vit)
    assert torch.equal(model(images).features, model(patchify(images, 4)).features)


def test_keeping_all_patches_in_another_order_only_reorders(vit):
    """Each kept patch takes its own position along."""
    model, images = MaskedVisionTransformer(vit), batch(vit)
    order = torch.stack([torch.randperm(model.grid[0] * model.grid[1]) for _ in images])
    full, kept = model.encode(images), model.encode(images, keep=order)
    expected = torch.stack([tokens[index] for tokens, index in zip(full.tokens, order)])
    torch.testing.assert_close(kept.tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.prefix, full.prefix, rtol=1e-4, atol=1e-5)


def test_patches_that_are_not_kept_have_no_influence(vit):
    model, images = MaskedVisionTransformer(vit), batch(vit)
    keep = torch.tensor([[0, 3, 5]]).expand(len(images), -1)
    sequence = patchify(images, 4)
    other = torch.randn_like(sequence)
    other[:, [0, 3, 5]] = sequence[:, [0, 3, 5]]
    assert torch.equal(model.encode(sequence, keep=keep).tokens, model.encode(other, keep=keep).tokens)


def test_query_replaces_patch_embeddings_by_the_mask_token(vit):
    """Against timm's own forward with the embeddings replaced by hand."""
    model, images = MaskedVisionTransformer(vit, mask_token=True), batch(vit)
    query = torch.tensor([[1, 4], [0, 15], [2, 3], [7, 8]])
    embed = vit.patch_embed.forward

    def with_mask_tokens(x):
        tokens = embed(x)
        flat = tokens.reshape(len(x), -1, tokens.shape[-1]).clone()
        for b, row in enumerate(query):
            for i in row:
                flat[b, i] = model.mask_token[0, 0]
        return flat.reshape(tokens.shape)

    vit.patch_embed.forward = with_mask_tokens
    expected = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(model.encode(images, query=query).tokens, expected, rtol=1e-5, atol=1e-5)


def test_ffn_outputs_are_those_of_the_mlp_modules(vit):
    model, images, caught = MaskedVisionTransformer(vit), batch(vit), []
    hooks = [b.mlp.register_forward_hook(lambda m, x, y: caught.append(y)) for b in vit.blocks]
    plain = model.encode(images)
    expected = [y[:, vit.num_prefix_tokens :] for y in caught]
    for hook in hooks:
        hook.remove()
    encoded = model.encode(images, hidden=(0, 2), output="ffn")
    assert torch.equal(encoded.tokens, plain.tokens)
    assert torch.equal(encoded.hidden[0], expected[0]) and torch.equal(encoded.hidden[1], expected[2])


def test_features_of_an_image_do_not_depend_on_its_batch_mates(vit):
    model, images = MaskedVisionTransformer(vit), batch(vit)
    before = model(images).features[0]
    images[1:] = torch.randn_like(images[1:])
    torch.testing.assert_close(model(images).features[0], before, rtol=1e-6, atol=1e-6)


def test_tokens_of_an_image_do_influence_each_other(vit):
    model, images = MaskedVisionTransformer(vit), batch(vit)
    before = model(images).features[0, 0]
    images[0, :, -4:, -4:] += 1
    assert (model(images).features[0, 0] - before).abs().max() > 1e-4


def test_an_encoder_is_built_again_from_its_description(vit):
    model, images = MaskedVisionTransformer(vit), batch(vit)
    if vit.pos_embed is None or isinstance(vit.norm_pre, nn.LayerNorm):
        with pytest.raises(InputError, match="no timm name describes"):
            architecture(vit)
        return
    described = architecture(vit)
    twin = MaskedVisionTransformer(build_vit(described["model"], **described["arguments"]))
    twin.vit.load_state_dict(vit.state_dict())
    assert torch.equal(twin.eval()(images).features, model(images).features)


@pytest.mark.parametrize("output", ["block", "ffn"])
def test_gradients_reach_every_parameter_of_a_method_with_a_mask_token(tiny_vit, output):
    model = MaskedVisionTransformer(tiny_vit(), mask_token=True)
    encoded = model.encode(torch.randn(2, 3, 16, 16), query=torch.tensor([[1], [2]]), hidden=(2,), output=output)
    encoded.tokens.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_other_image_sizes_resample_the_positions_as_timm_does(tiny_vit):
    vit = tiny_vit(dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 24, 32)
    expected = vit.forward_features(images)[:, 1:]
    torch.testing.assert_close(MaskedVisionTransformer(vit)(images).features, expected, rtol=1e-5, atol=1e-5)


def test_embed_is_the_mean_of_the_patches_or_the_class_token(tiny_vit):
    model, images = MaskedVisionTransformer(tiny_vit().eval()), torch.randn(2, 3, 16, 16)
    tokens = model.vit.forward_features(images)
    torch.testing.assert_close(model.embed(images), tokens[:, 1:].mean(1))
    torch.testing.assert_close(model.embed(images, "cls"), tokens[:, 0])
    with pytest.raises(InputError, match="pool must be mean or cls"):
        model.embed(images, "max")
    with pytest.raises(InputError, match="no class token"):
        MaskedVisionTransformer(tiny_vit(class_token=False, global_pool="avg")).embed(images, "cls")


def test_activation_checkpointing_changes_nothing(tiny_vit):
    model, images = MaskedVisionTransformer(tiny_vit()).train(), torch.randn(2, 3, 16, 16)

    def gradients():
        model.zero_grad()
        model.encode(images).tokens.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.vit.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain))


def test_wrong_shapes_are_named(tiny_vit):
    model = MaskedVisionTransformer(tiny_vit())
    with pytest.raises(ValueError, match=r"patch sequences \[B, 16, 48\], got a tensor of shape \[2, 9, 48\]"):
        model(torch.zeros(2, 9, 48))
    with pytest.raises(ValueError, match="keep or query, not both"):
        model.encode(torch.zeros(1, 3, 16, 16), keep=torch.tensor([[0]]), query=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="without a mask token"):
        model.encode(torch.zeros(1, 3, 16, 16), query=torch.tensor([[1]]))


@pytest.mark.parametrize("name", ["vit_relpos_small_patch16_224", "resnet18", "deit_tiny_distilled_patch16_224"])
def test_other_architectures_are_refused_by_name(name):
    with torch.device("meta"):
        vit = timm.create_model(name)
    with pytest.raises(InputError, match=f"{type(vit).__name__} is not a plain timm VisionTransformer"):
        MaskedVisionTransformer(vit)


def test_encoders_that_hide_patches_themselves_or_have_no_plain_ones_are_refused(tiny_vit):
    with pytest.raises(InputError, match="patch_drop_rate=0"):
        MaskedVisionTransformer(tiny_vit(patch_drop_rate=0.5))
    with pytest.raises(InputError, match="18 pixels cannot be cut into patches of 4; use --image-size 16"):
        MaskedVisionTransformer(tiny_vit(img_size=18))
    with torch.device("meta"), pytest.raises(InputError, match="HybridEmbed has no plain patches"):
        MaskedVisionTransformer(timm.create_model("vit_tiny_r_s16_p8_224"))


def test_a_mistyped_name_gets_the_nearest_ones():
    with pytest.raises(InputError, match="no model named 'vit_smal_patch16_224'; did you mean vit_small_patch16_224"):
        build_vit("vit_smal_patch16_224")
    with pytest.raises(InputError, match="timm cannot build vit_small_patch16_224"):
        build_vit("vit_small_patch16_224", no_such_argument=1)


def test_usable_models_can_be_used():
    names = usable_models("vit_small*")
    assert "vit_small_patch16_224" in names and names == sorted(names)
    assert not any("distilled" in name for name in usable_models())
    with torch.device("meta"):
        for name in names[:5]:
            MaskedVisionTransformer(build_vit(name))


def test_blocks_without_a_feed_forward_of_their_own_are_recognised(tiny_vit):
    from timm.models.vision_transformer import ParallelScalingBlock

    assert has_separate_ffn(tiny_vit())
    assert not has_separate_ffn(
        VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2, block_fn=ParallelScalingBlock)
    )


def test_fused_and_plain_attention_are_the_same_function(tiny_vit):
    model, images = MaskedVisionTransformer(tiny_vit().eval()), torch.randn(2, 3, 16, 16)
    fused = model(images).features
    set_fused_attention(model, False)
    assert not any(block.attn.fused_attn for block in model.vit.blocks)
    torch.testing.assert_close(model(images).features, fused, rtol=1e-5, atol=1e-5)
