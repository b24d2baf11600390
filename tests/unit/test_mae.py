"""MAE against naive code: its loss, the official un-shuffling, what the encoder sees and what the decoder restores."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data2vec_vision as d2v
from data2vec_vision.errors import InputError
from data2vec_vision.masking import stack_masks
from data2vec_vision.methods.mae import MAE
from data2vec_vision.vit import build_vit

ENCODERS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "registers without class token": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 1},
    "not square": {"img_size": (16, 24)},
}
SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}


def make(tiny_vit, encoder="class token", **knobs):
    torch.manual_seed(0)
    method = MAE(tiny_vit(**ENCODERS[encoder]), **(SMALL | knobs)).double()
    for p in method.parameters():
        nn.init.normal_(p, std=0.2)
    return method.train()


def batch(method, size=4):
    """Noise; and in the first image a patch of one colour and one that is nearly so."""
    torch.manual_seed(1)
    images = torch.randn(size, 3, *method.student.image_size, dtype=torch.float64)
    images[0, :, :4, :4] = 0.5
    images[0, :, :4, 4:8] = 0.5 + 1e-3 * images[0, :, :4, 4:8]
    return images


def draw(method, size=4, seed=0):
    generator, sampler = torch.Generator().manual_seed(seed), method.masks()
    return stack_masks([sampler(generator, generator) for _ in range(size)])


def cells(method, index):
    """bool [B, 1, H, W]: the pixels of the patches of each image in `index`."""
    rows, columns = method.student.grid
    chosen = torch.zeros(len(index), rows * columns, dtype=torch.bool).scatter(1, index, True)
    return chosen.view(-1, 1, rows, columns).repeat_interleave(4, 2).repeat_interleave(4, 3)


def naive_encode(method, image, keep):
    """timm's modules on one image: embed and place all patches, drop the hidden ones, prefix tokens in front."""
    vit, tokens = method.student.vit, []
    for token in (vit.cls_token, vit.reg_token):
        tokens += [] if token is None else list(token[0])
    N = len(tokens)
    placed = [] if vit.no_embed_class else list(vit.pos_embed[0, :N])
    tokens = [token + position for token, position in zip(tokens, placed)] if placed else tokens
    patches = vit.patch_embed(image[None])[0]
    positions = vit.pos_embed[0, vit.pos_embed.shape[1] - len(patches) :]
    tokens += [patches[i] + positions[i] for i in keep.tolist()]
    x = torch.stack(tokens)[None]
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[0], N


def unshuffled(method, image, keep):
    """The official decoder on one image: mask tokens appended, all gathered into place, positions, blocks, head.

    The prefix tokens, in front again, have a position of zero. [S, 3*P*P], every patch's prediction.
    """
    encoded, N = naive_encode(method, image, keep)
    S, decoder = method.student.n_patches, method.decoder
    x = method.embed(encoded)
    appended = torch.cat([x[N:], decoder.mask_token[0].expand(S - len(keep), -1)])
    shuffle = keep.tolist() + [i for i in range(S) if i not in keep.tolist()]
    restore = torch.tensor(shuffle).argsort()
    x = torch.cat([x[:N], appended[restore]])
    x = x + torch.cat([x.new_zeros(N, x.shape[1]), decoder.position[-S:]])
    for block in decoder.blocks:
        x = block(x[None])[0]
    return method.head(decoder.norm(x))[N:]


def naive_target(image, patch, columns, norm_pix):
    """The pixels of one patch of 4 x 4, channel by channel; less their mean, over their deviation."""
    top, left = 4 * (patch // columns), 4 * (patch % columns)
    pixels = image[:, top : top + 4, left : left + 4].flatten().tolist()
    if not norm_pix:
        return pixels
    mean = sum(pixels) / 48
    variance = sum((p - mean) ** 2 for p in pixels) / 47
    return [(p - mean) / (variance + 1e-6) ** 0.5 for p in pixels]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_equals_naive_code(tiny_vit, encoder, norm_pix):
    method = make(tiny_vit, encoder, norm_pix=norm_pix)
    images, masks = batch(method), draw(method)
    masks["query"][0, :2] = torch.tensor([0, 1])  # the patches of one colour, and of nearly one
    masks["keep"][0] = torch.arange(len(masks["keep"][0])) + 2
    masks["query"][0] = torch.tensor([i for i in range(method.student.n_patches) if i not in masks["keep"][0]])
    total, count = 0.0, 0
    for image, keep, query in zip(images, masks["keep"], masks["query"]):
        predicted = unshuffled(method, image, keep)
        for patch in query.tolist():
            target = naive_target(image, patch, method.student.grid[1], norm_pix)
            total += sum((p - t) ** 2 for p, t in zip(predicted[patch].tolist(), target)) / 48
            count += 1
    out = method(images, masks=masks)
    assert out.loss.item() == pytest.approx(total / count, rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_predicting_by_concatenation_equals_the_official_unshuffling(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    ours = method(images, masks=masks).extras["prediction"]
    for image, keep, query, prediction in zip(images, masks["keep"], masks["query"], ours):
        torch.testing.assert_close(prediction, unshuffled(method, image, keep)[query], rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoder", ["class token", "registers"])
def test_prefix_tokens_take_part_in_the_decoder(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    encoded = method.student.encode(images, keep=masks["keep"])
    assert not method.decoder.position[: encoded.prefix.shape[1]].any()
    before = method.decode(encoded.prefix, encoded.tokens, masks)
    for n in range(encoded.prefix.shape[1]):
        changed = encoded.prefix.clone()
        changed[:, n] += torch.randn(32, dtype=torch.float64)
        assert (method.decode(changed, encoded.tokens, masks) - before).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_never_sees_the_hidden_patches(tiny_vit, encoder):
    """Nor does it compute anything at their places: its blocks get the kept patches and the prefix tokens."""
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    lengths = []
    for block in method.student.vit.blocks:
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    changed = torch.where(cells(method, masks["query"]), torch.randn_like(images), images)
    one, two = method(images, masks=masks), method(changed, masks=masks)
    assert torch.equal(one.extras["prediction"], two.extras["prediction"])
    assert torch.equal(one.embedding, two.embedding)
    assert not torch.equal(one.extras["target"], two.extras["target"])
    assert set(lengths) == {masks["keep"].shape[1] + method.student.vit.num_prefix_tokens}


def test_the_decoder_predicts_from_every_patch_that_is_seen(tiny_vit):
    method = make(tiny_vit)
    images, masks = batch(method), draw(method)
    before = method(images, masks=masks).extras["prediction"]
    for k in range(masks["keep"].shape[1]):
        seen = cells(method, masks["keep"][:, k : k + 1])
        out = method(torch.where(seen, torch.randn_like(images), images), masks=masks)
        assert (out.extras["prediction"] - before).abs().amax(dim=(1, 2)).min() > 1e-4


def test_the_loss_is_over_the_hidden_patches_only(tiny_vit):
    method = make(tiny_vit)
    images, masks = batch(method), draw(method)
    before, target = method(images, masks=masks).loss, method.target(images)
    assert method(images, masks=masks).extras["target"].shape == (4, 12, 48)
    for name, changes in (("keep", False), ("query", True)):
        chosen = torch.zeros(4, 16, 1, dtype=torch.bool).scatter(1, masks[name].unsqueeze(-1), True)
        method.target = lambda images, chosen=chosen: torch.where(chosen, target + 100, target)
        assert torch.equal(method(images, masks=masks).loss, before) != changes


def test_a_quarter_of_the_patches_is_seen_and_all_others_are_predicted(tiny_vit):
    for ratio, n_keep in ((0.75, 4), (0.5, 8), (0.001, 15), (0.999, 1)):
        masks = draw(make(tiny_vit, mask_ratio=ratio))
        assert masks["keep"].shape == (4, n_keep) and masks["query"].shape == (4, 16 - n_keep)
        for keep, query in zip(masks["keep"].tolist(), masks["query"].tolist()):
            assert sorted(keep + query) == list(range(16))


def test_the_official_count_of_patches_is_kept():
    """49 of 196, where the float 196 * (1 - 0.75) is exact, and 20 of 100, where 100 * (1 - 0.8) is 19.999..."""
    for side, ratio, n_keep in ((56, 0.75, 49), (40, 0.8, 20)):
        vit = build_vit(img_size=side, patch_size=4, embed_dim=16, depth=1, num_heads=1)
        assert MAE(vit, mask_ratio=ratio, **SMALL).n_keep == n_keep


def test_no_patch_is_favoured(tiny_vit):
    seen = draw(make(tiny_vit), 2000)["keep"].flatten().bincount(minlength=16) / 2000
    assert (seen - 0.25).abs().max() < 0.05


@pytest.mark.parametrize("encoder", ["class token", "no class token", "registers", "not square"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_reconstruction_is_the_image_with_its_hidden_patches_predicted(tiny_vit, encoder, norm_pix):
    """Seen pixels come back bit for bit; a normalised prediction gets the mean and deviation of the true patch."""
    method = make(tiny_vit, encoder, norm_pix=norm_pix)
    images, masks = batch(method), draw(method)
    restored, same = method.reconstruct(images, masks)
    assert same is masks and not restored.requires_grad and restored.shape == images.shape
    seen = cells(method, masks["keep"]).expand_as(images)
    assert torch.equal(restored[seen], images[seen]) and not torch.isclose(restored[~seen], images[~seen]).all()
    for image, pixels, keep, query in zip(images, restored, masks["keep"], masks["query"]):
        predicted = unshuffled(method, image, keep)
        for patch in query.tolist():
            top, left = 4 * (patch // method.student.grid[1]), 4 * (patch % method.student.grid[1])
            cell = (slice(None), slice(top, top + 4), slice(left, left + 4))
            expected = predicted[patch].view(3, 4, 4)
            if norm_pix:
                expected = expected * (image[cell].var() + 1e-6).sqrt() + image[cell].mean()
            torch.testing.assert_close(pixels[cell], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(tiny_vit, norm_pix):
    method = make(tiny_vit, norm_pix=norm_pix)
    images, masks = batch(method), draw(method)
    target = method.target(images)
    method.decode = lambda prefix, tokens, masks: torch.stack([t[q] for t, q in zip(target, masks["query"])])
    torch.testing.assert_close(method.reconstruct(images, masks)[0], images, rtol=1e-9, atol=1e-9)


def test_masks_for_a_reconstruction_are_drawn_unless_given(tiny_vit):
    method = make(tiny_vit)
    restored, masks = method.reconstruct(batch(method))
    assert masks["keep"].shape == (4, 4) and masks["query"].shape == (4, 12)
    assert torch.equal(restored, method.reconstruct(batch(method), masks)[0])


def test_a_picture_shows_the_image_what_is_seen_of_it_and_the_reconstruction(tiny_vit):
    method = MAE(tiny_vit(), **SMALL).eval()
    photos = [Image.fromarray(p) for p in torch.randint(60, 200, (2, 16, 16, 3), dtype=torch.uint8).numpy()]
    masks = draw(method, 2)
    page = method.picture(photos, masks)
    views = torch.stack([method.student.transform.resized(photo) for photo in photos])
    restored, _ = method.reconstruct(method.student.transform.normalized(views), masks)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (method.student.transform.mean, method.student.transform.std))
    seen = cells(method, masks["keep"])
    for row, view in enumerate(views):
        lefts, top = (6, 156, 306), 6 + row * 168  # tiles of 144 pixels, 9 a pixel
        tiles = [page.crop((x, top, x + 144, top + 144)).resize((16, 16), Image.Resampling.NEAREST) for x in lefts]
        whole, part, third = (torch.from_numpy(np.array(tile)).permute(2, 0, 1).long() for tile in tiles)
        assert torch.equal(whole, view.long()) and torch.equal(part, torch.where(seen[row], view, 128).long())
        expected = (restored[row] * std + mean).clamp(0, 1) * 255
        torch.testing.assert_close(third.float(), expected, rtol=0, atol=0.51)
        assert torch.equal(third * seen[row], view * seen[row])


def test_zeros_cost_all_but_one_part_in_n_of_normalised_pixels(tiny_vit):
    """The variance is the unbiased one, so n pixels of a patch have squares of n - 1 in all."""
    method = make(tiny_vit)
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert method(images).loss.item() == pytest.approx(47 / 48, rel=1e-5)


@pytest.mark.parametrize(
    ("dim", "heads", "expected"),
    [
        (768, 12, (512, 8, 16)),
        (384, 6, (256, 4, 8)),
        (192, 3, (128, 4, 4)),
        (1024, 16, (512, 8, 16)),
        (32, 2, (32, 4, 1)),
    ],
)
def test_the_decoder_is_the_papers_for_large_encoders_and_smaller_for_small_ones(dim, heads, expected):
    with torch.device("meta"):
        method = MAE(build_vit(img_size=8, patch_size=4, embed_dim=dim, depth=1, num_heads=heads))
    decoder = method.decoder
    assert (decoder.dim, len(decoder.blocks), decoder.blocks[0].attn.num_heads) == expected
    assert all(block.mlp.fc1.out_features == 4 * decoder.dim for block in decoder.blocks)
    assert method.embed.weight.shape == (expected[0], dim) and method.head.weight.shape == (48, expected[0])


def test_the_decoder_can_be_chosen(tiny_vit):
    method = MAE(tiny_vit(), decoder_dim=48, decoder_depth=3, decoder_heads=4)
    assert (method.decoder.dim, len(method.decoder.blocks), method.decoder.blocks[0].attn.num_heads) == (48, 3, 4)
    method(torch.randn(2, 3, 16, 16)).loss.backward()


def test_decayed_parameters_are_the_matrices_and_the_mask_token(tiny_vit):
    """Not the class token, the positions, biases and norms; the mask token as in the official code."""
    for encoder in ("class token", "no class token"):
        method = MAE(tiny_vit(depth=1, **ENCODERS[encoder]), decoder_depth=1)
        names = {id(p): n for n, p in method.named_parameters()}
        decayed = {
            names[id(p)] for group in method.param_groups(0.05) if group["weight_decay"] for p in group["params"]
        }
        matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
        assert decayed == {
            "student.vit.patch_embed.proj.weight",
            *(f"student.vit.blocks.0.{name}" for name in matrices),
            "embed.weight",
            "decoder.mask_token",
            *(f"decoder.blocks.0.{name}" for name in matrices),
            "head.weight",
        }


@pytest.mark.parametrize("image_size", [64, (64, 96)])
def test_encoders_from_a_name_have_fixed_positions_and_the_first_weights_of_mae(image_size):
    """Sin-cos positions, zero for the class token, without a gradient; xavier weights, the patch embedding's too."""
    torch.manual_seed(0)
    method = MAE("vit_tiny_patch16_224", image_size=image_size)
    vit, (rows, columns) = method.student.vit, method.student.grid
    position = vit.pos_embed[0]
    assert not vit.pos_embed.requires_grad and vit.cls_token is not None and not position[0].any()
    assert len(position) == 1 + rows * columns
    for patch, vector in enumerate(position[1:]):
        angles = [place / 10000 ** (k / 48) for place in reversed(divmod(patch, columns)) for k in range(48)]
        column, row = torch.tensor(angles, dtype=torch.float64).split(48)
        expected = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
        torch.testing.assert_close(vector.detach().double(), expected, rtol=0, atol=1e-7)
    assert id(vit.pos_embed) not in {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    parts = nn.ModuleList([vit.blocks, method.decoder, method.embed, method.head])
    linear = [m.weight for m in parts.modules() if isinstance(m, nn.Linear)]
    for weight in [*linear, vit.patch_embed.proj.weight.flatten(1)]:
        bound = (6 / sum(weight.shape)) ** 0.5
        assert bound * 0.98 < weight.abs().max().item() <= bound
    assert all(not m.bias.any() for m in vit.blocks.modules() if isinstance(m, nn.Linear))


def test_a_ready_encoder_is_taken_as_it_is(tiny_vit):
    vit = tiny_vit()
    before = {name: (p.clone(), p.requires_grad) for name, p in vit.named_parameters()}
    MAE(vit)
    assert {name for name, _ in vit.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in vit.named_parameters())


def test_the_encoder_alone_is_the_product(tiny_vit):
    method = make(tiny_vit)
    assert method.teacher is None and list(method.encoders) == ["student"] and method.scheduled(0.5) == {}
    before = [p.clone() for p in method.parameters()]
    method.after_step(0.5)
    assert all(torch.equal(p, old) for p, old in zip(method.parameters(), before))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_that_is_optimised_has_a_gradient(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    method(batch(method)).loss.backward()
    optimised = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert optimised == {id(p) for p in method.parameters() if p.requires_grad}
    assert [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_four_passes_of_4_equal_one_pass_of_16(tiny_vit):
    method = make(tiny_vit)
    images, masks = batch(method, 16), draw(method, 16)

    def gradients(size):
        method.zero_grad()
        for start in range(0, 16, size):
            part = {name: mask[start : start + size] for name, mask in masks.items()}
            (method(images[start : start + size], masks=part).loss * size / 16).backward()
        return [p.grad for p in method.parameters() if p.requires_grad]

    for a, b in zip(gradients(4), gradients(16)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoder", ["class token", "no class token"])
def test_predictions_and_loss_stay_in_fp32_under_autocast(tiny_vit, encoder):
    method = make(tiny_vit, encoder).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch(method).float())
    assert out.loss.dtype == out.extras["prediction"].dtype == out.extras["target"].dtype == torch.float32
    half = method.target(batch(method).bfloat16())
    assert half.dtype == torch.float32


def test_in_eval_mode_it_gives_the_embedding_of_the_whole_image(tiny_vit):
    method = make(tiny_vit).eval()
    images = batch(method)
    out = method(images)
    torch.testing.assert_close(out.embedding, method.student.vit.forward_features(images)[:, 1:].mean(1))
    assert out.loss.item() == 0


def test_it_learns_to_reconstruct_better_than_the_mean_of_a_patch(tiny_vit):
    """Smooth images, so that hidden patches can be told from their neighbours."""
    method, losses = MAE(tiny_vit(depth=1), decoder_depth=1).train(), []
    optimizer, generator = torch.optim.AdamW(method.parameters(), 5e-3), torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(32, 3, 2, 2, generator=generator), 16, mode="bilinear")
    torch.manual_seed(0)
    for _ in range(60):
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-10:]) / 10 < 0.7


def test_views_and_masks_travel_to_workers(tiny_vit):
    method = make(tiny_vit)
    views, masks = pickle.loads(pickle.dumps((method.views(), method.masks())))
    [view] = views(Image.new("RGB", (30, 40)))
    assert view.dtype == torch.uint8 and view.shape == (3, 16, 16)
    assert masks(torch.Generator(), torch.Generator())["keep"].shape == (4,)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mask_ratio": 1.0}, "--mask-erase-pct must be between 0 and 1"),
        ({"decoder_dim": 2}, "decoder_dim must be at least 4"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1"),
        ({"decoder_dim": 18}, "a decoder of width 18 cannot have 1 head"),
        ({"decoder_dim": 64, "decoder_heads": 3}, "a decoder of width 64 cannot have 3 head"),
        ({"decoder_dim": 100, "decoder_heads": 3}, "use a multiple of 12"),
        ({"norm_pix": "false"}, "norm_pix must be true or false, got 'false'"),
        ({"mask_ratio": "0.5"}, "--mask-erase-pct must be a number, got '0.5'"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        MAE(tiny_vit(), **knobs)


def test_it_is_public_and_builds_from_a_name():
    method = d2v.MAE(encoder="vit_tiny_patch16_224", image_size=32, mask_ratio=0.5, **SMALL)
    assert method.student.grid == (2, 2) and method(torch.randn(1, 3, 32, 32)).loss.requires_grad
