"""data2vec 2.0 against naive code: target, decoder, loss; many masks an image, and slices of a step, change nothing."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F

from data2vec_vision.config import Facts
from data2vec_vision.errors import InputError
from data2vec_vision.methods.data2vec2 import NOISE, ConvDecoder, Data2Vec2

SMALL = {"n_masks": 3, "mask_ratio": 0.6, "decoder_depth": 2}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
REGISTERS = {"reg_tokens": 2}


def make(tiny_vit, vit=None, **knobs):
    """In float64, with weights at random, the teacher's others than the student's; LayerScale as timm has it."""
    torch.manual_seed(0)
    method = Data2Vec2(tiny_vit(**(vit or {})), **(SMALL | knobs)).double()
    for name, p in method.named_parameters():
        if not name.endswith("gamma"):
            nn.init.normal_(p, std=0.2)
    return method.train()


def batch(size=4):
    return torch.randn(size, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks_of(method, size=4):
    """As a worker and the loop make them: {"keep" [B, M, K], "query" [B, M, Q], "noise" [1, S, D]}."""
    generator, draw = torch.Generator().manual_seed(2), method.masks()
    drawn = [draw(generator, generator) for _ in range(size)]
    masks = {name: torch.stack([sample[name] for sample in drawn]) for name in ("keep", "query")}
    return masks | {name: value.double() for name, value in method.shared_by_step(generator).items()}


def naive_normal(values):
    return (values - values.mean()) / ((values - values.mean()).square().mean() + 1e-5).sqrt()


def naive_target(method, images):
    """Block by block from hooks on the teacher's feed-forward networks, image by image, channel by channel."""
    states, vit = [], method.teacher.vit
    for block in list(vit.blocks)[-(method.config.top_k_blocks or len(vit.blocks)) :]:
        hook = block.mlp.register_forward_hook(lambda m, x, y: states.append(y.detach().clone()))
        vit.forward_features(images)
        hook.remove()
    targets = []
    for b in range(len(images)):
        patches = [state[b, vit.num_prefix_tokens :] for state in states]
        mean = sum(torch.stack([naive_normal(channel) for channel in h.T]).T for h in patches) / len(patches)
        targets.append(torch.stack([naive_normal(token) for token in mean]))
    return torch.stack(targets)


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize(
    "vit",
    [
        {},
        NO_CLASS_TOKEN,
        REGISTERS,
        {"init_values": 1e-5, "drop_path_rate": 0.5, "proj_drop_rate": 0.5},
    ],
)
def test_target_equals_naive_code(tiny_vit, vit, k):
    """The feed-forward output before LayerScale, which would leave nothing of it but rounding, and before drop path."""
    method, images = make(tiny_vit, vit, top_k_blocks=k), batch()
    target = method.target(images)
    assert target.shape == (4, 16, 32) and not target.requires_grad
    torch.testing.assert_close(target, naive_target(method, images), rtol=1e-9, atol=1e-9)
    assert target.std(dim=1).mean() > 0.3


def naive_decoder(decoder, x):
    """One grid [D, rows, columns]: convolution, norm over the channels of each place, GELU, then what came in."""
    for layer in decoder.layers:
        y = F.conv2d(x[None], layer.weight, layer.bias, padding=layer.kernel_size[0] // 2, groups=layer.groups)[0]
        for row in range(y.shape[1]):
            for column in range(y.shape[2]):
                y[:, row, column] = naive_normal(y[:, row, column].clone())
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + y if x.shape[0] == y.shape[0] else y
    return x


def naive_prediction(method, image, keep, query, noise):
    """One image, one mask: the student's tokens at the places kept, noise at the others."""
    rows, columns = method.student.grid
    tokens = method.student.encode(image[None], keep=keep[None]).tokens[0]
    grid = noise[0].clone()
    for token, place in zip(tokens, keep):
        grid[place] = token
    decoded = naive_decoder(method.decoder, grid.T.reshape(-1, rows, columns)).flatten(1).T
    return decoded[query] @ method.regressor.weight.T + method.regressor.bias


def naive_losses(method, images, keep, query, noise):
    """Of patches: squared error summed over channels, over root D, mean over hidden patches; of the class token."""
    target, patches, classes = naive_target(method, images), [], []
    D = target.shape[2]
    for b in range(len(images)):
        for m in range(keep.shape[1]):
            prediction = naive_prediction(method, images[b], keep[b, m], query[b, m], noise)
            for place, predicted in zip(query[b, m], prediction):
                patches.append(sum((predicted[d] - target[b, place, d]) ** 2 for d in range(D)) / D**0.5)
            if method.student.vit.cls_token is not None:
                token = method.student.encode(images[b : b + 1], keep=keep[b : b + 1, m]).prefix[0, 0]
                classes.append((token - target[b].mean(dim=0)).square().sum() / D**0.5)
    return sum(patches) / len(patches), sum(classes) / max(len(classes), 1)


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN, REGISTERS, NO_CLASS_TOKEN | REGISTERS])
def test_loss_equals_naive_code(tiny_vit, vit):
    method, images = make(tiny_vit, vit, class_token_weight=1.7), batch(2)
    masks = masks_of(method, 2)
    out, (patches, classes) = method(images, masks=masks), naive_losses(method, images, **masks)
    assert out.loss.item() == pytest.approx((patches + 1.7 * classes).item() if classes else patches.item(), rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()


@pytest.mark.parametrize(
    "knobs", [{"decoder_dim": 16}, {"decoder_kernel": 5, "decoder_depth": 3}, {"decoder_depth": 1}]
)
def test_loss_equals_naive_code_with_other_decoders(tiny_vit, knobs):
    method, images = make(tiny_vit, class_token_weight=0.0, **knobs), batch(2)
    masks = masks_of(method, 2)
    assert method(images, masks=masks).loss.item() == pytest.approx(naive_losses(method, images, **masks)[0].item())


@pytest.mark.parametrize(("width", "dim", "groups"), [(32, 32, [16, 16]), (32, 48, [16, 16]), (20, 24, [4, 8])])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_decoder_is_convolution_norm_gelu_and_residual(grid, width, dim, groups):
    """The first residual is left out where the widths differ; the groups are 16, or what divides the widths."""
    torch.manual_seed(0)
    decoder = ConvDecoder(grid, width, dim, 2, 3).double()
    assert [layer.groups for layer in decoder.layers] == groups
    x = torch.randn(2, grid[0] * grid[1], width, dtype=torch.float64)
    out = decoder(x)
    for row in range(2):
        expected = naive_decoder(decoder, x[row].T.reshape(width, *grid)).flatten(1).T
        torch.testing.assert_close(out[row], expected, rtol=1e-9, atol=1e-9)


def test_the_class_token_predicts_the_mean_of_the_target_with_a_weight_of_its_own(tiny_vit):
    method, images = make(tiny_vit, class_token_weight=2.5), batch(2)
    masks = masks_of(method, 2)
    out, (patches, classes) = method(images, masks=masks), naive_losses(method, images, **masks)
    assert out.logs["class_loss"].item() == pytest.approx(classes.item())
    assert out.loss.item() == pytest.approx((patches + 2.5 * classes).item())
    # Neither more images nor more masks change the share of the class token.
    for repeat in ((3, 1, 1), (1, 4, 1)):
        more = {name: masks[name].repeat(repeat) for name in ("keep", "query")} | {"noise": masks["noise"]}
        again = method(images.repeat(repeat[0], 1, 1, 1), masks=more)
        assert again.loss.item() == pytest.approx(out.loss.item())
        assert again.logs["class_loss"].item() == pytest.approx(classes.item())


@pytest.mark.parametrize(("vit", "weight"), [({}, 0.0), (NO_CLASS_TOKEN, 1.0), (NO_CLASS_TOKEN | REGISTERS, 1.0)])
def test_without_a_class_token_or_a_weight_there_is_no_loss_of_it(tiny_vit, vit, weight):
    method, images = make(tiny_vit, vit, class_token_weight=weight), batch(2)
    masks = masks_of(method, 2)
    out = method(images, masks=masks)
    assert "class_loss" not in out.logs
    assert out.loss.item() == pytest.approx(naive_losses(method, images, **masks)[0].item())


def test_the_teacher_takes_each_image_once_and_whole_the_student_only_what_is_kept(tiny_vit):
    method, seen = make(tiny_vit), {"student": [], "teacher": []}
    for name, encoder in method.encoders.items():
        encoder.vit.blocks[0].norm1.register_forward_hook(lambda m, x, y, name=name: seen[name].append(y.shape[:2]))
    method(batch(), masks=masks_of(method))
    assert method.n_keep == 6 and method.student.mask_token is None
    assert seen == {"student": [(4 * 3, 6 + 1)], "teacher": [(4, 16 + 1)]}


def test_pixels_that_a_mask_hides_change_no_prediction_under_it(tiny_vit):
    method, images = make(tiny_vit), batch()
    masks = masks_of(method)
    before = method(images, masks=masks).extras
    for m in range(3):
        hidden = torch.zeros(4, 16, dtype=torch.bool).scatter(1, masks["query"][:, m], True)
        cells = hidden.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        after = method(torch.where(cells, torch.randn_like(images), images), masks=masks).extras
        assert torch.equal(after["prediction"][:, m], before["prediction"][:, m])
        assert not torch.equal(after["prediction"][:, m - 1], before["prediction"][:, m - 1])
        assert not after["target"][:, m].allclose(before["target"][:, m])


def one_mask(masks, m):
    return {"keep": masks["keep"][:, m : m + 1], "query": masks["query"][:, m : m + 1], "noise": masks["noise"]}


def test_masks_of_an_image_together_are_its_masks_one_by_one(tiny_vit):
    method, images = make(tiny_vit), batch()
    masks = masks_of(method)
    out, parts = method(images, masks=masks), [method(images, masks=one_mask(masks, m)) for m in range(3)]
    for m, part in enumerate(parts):
        for name in ("prediction", "target"):
            torch.testing.assert_close(out.extras[name][:, m], part.extras[name][:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, sum(part.loss for part in parts) / 3)
    torch.testing.assert_close(out.embedding, sum(part.embedding for part in parts) / 3)


def test_predictions_and_targets_of_an_image_stay_with_it(tiny_vit):
    """Images of one grey each: a prediction paired with another image's mask or target is far off."""
    method, greys = make(tiny_vit), torch.tensor([-3.0, 0.5, 1.0, 7.0], dtype=torch.float64)
    images = greys.view(4, 1, 1, 1).expand(4, 3, 16, 16)
    masks = masks_of(method)
    extras = method(images, masks=masks).extras
    assert extras["prediction"].shape == extras["target"].shape == (4, 3, 10, 32)
    for b in range(4):
        alone = {"keep": masks["keep"][b : b + 1], "query": masks["query"][b : b + 1], "noise": masks["noise"]}
        expected = method(images[b : b + 1], masks=alone).extras
        whole = naive_target(method, images[b : b + 1])[0]
        torch.testing.assert_close(extras["prediction"][b], expected["prediction"][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(extras["target"][b], whole[masks["query"][b]], rtol=1e-7, atol=1e-7)
    assert not extras["prediction"][0].allclose(extras["prediction"][3], atol=0.1)


def test_hidden_places_hold_small_noise_and_no_mask_token(tiny_vit):
    method, images, canvases = make(tiny_vit), batch(), []
    masks = masks_of(method)
    method.decoder.register_forward_pre_hook(lambda m, x: canvases.append(x[0]))
    method(images, masks=masks)
    canvas, tokens = canvases[0].view(4, 3, 16, 32), method.student.encode(images, keep=masks["keep"]).tokens
    for b in range(4):
        for m in range(3):
            assert torch.equal(canvas[b, m, masks["query"][b, m]], masks["noise"][0, masks["query"][b, m]])
            torch.testing.assert_close(canvas[b, m, masks["keep"][b, m]], tokens.view(4, 3, 6, 32)[b, m])
    assert not any("mask" in name for name, _ in method.named_parameters())
    method(images, masks={name: masks[name] for name in ("keep", "query")})  # draws noise itself
    drawn = canvases[1].view(4, 3, 16, 32)[0, 0, masks["query"][0, 0]]
    assert drawn.std().item() == pytest.approx(NOISE, rel=0.2) and not torch.equal(
        drawn, canvas[0, 0, masks["query"][0, 0]]
    )


def test_the_noise_is_one_table_a_step_of_deviation_001(tiny_vit):
    method = make(tiny_vit, {"img_size": 64})
    first, again, other = (method.shared_by_step(torch.Generator().manual_seed(s))["noise"] for s in (0, 0, 1))
    assert first.shape == (1, 256, 32) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.01, rel=0.05) and abs(first.mean().item()) < 0.001
    assert method.sample_masks(2, torch.device("cpu"))["noise"].shape == (1, 256, 32)


def test_passes_of_2_equal_one_pass_of_8(tiny_vit):
    method, images = make(tiny_vit), batch(8)
    masks = masks_of(method, 8)
    method.after_step(0.5)  # as a loop would have

    def gradients(size):
        method.zero_grad()
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            part = {"keep": masks["keep"][rows], "query": masks["query"][rows], "noise": masks["noise"]}
            (method(images[rows], masks=part).loss * size / 8).backward()
        return [p.grad for p in method.parameters() if p.requires_grad]

    for a, b in zip(gradients(2), gradients(8)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("grid", "ratio", "kept"), [((4, 4), 0.8, 3), ((4, 4), 0.001, 15), ((4, 6), 0.999, 1)])
def test_masks_are_as_many_as_asked_for_and_hide_their_share(tiny_vit, grid, ratio, kept):
    method = make(tiny_vit, {"img_size": (grid[0] * 4, grid[1] * 4)}, mask_ratio=ratio, n_masks=5)
    views, draw = pickle.loads(pickle.dumps((method.views(), method.masks())))
    [view] = views(Image.new("RGB", (30, 40)))
    masks, S = draw(torch.Generator().manual_seed(0), torch.Generator()), grid[0] * grid[1]
    assert view.dtype == torch.uint8 and view.shape == (3, grid[0] * 4, grid[1] * 4)
    assert masks["keep"].shape == (5, kept) and masks["query"].shape == (5, S - kept)
    for keep, query in zip(masks["keep"], masks["query"]):
        assert sorted([*keep.tolist(), *query.tolist()]) == list(range(S))
    assert kept in (1, 15) or len({tuple(keep.tolist()) for keep in masks["keep"]}) > 1
    assert f"5 masks an image, {kept} of {S} patches seen" in method.describe()


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_parameter_that_is_optimised_has_a_gradient(tiny_vit, vit, weight):
    method = make(tiny_vit, vit, class_token_weight=weight)
    method(batch()).loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_decayed_parameters_are_the_matrices_of_student_and_decoder(tiny_vit):
    method = make(tiny_vit, {"depth": 1})
    names, groups = {id(p): n for n, p in method.named_parameters()}, method.param_groups(0.05)
    optimized = {names[id(p)] for group in groups for p in group["params"]}
    assert optimized == {n for n, p in method.named_parameters() if p.requires_grad}
    block = "student.vit.blocks.0."
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == {
        "student.vit.patch_embed.proj.weight",
        *(block + n for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")),
        "decoder.layers.0.weight",
        "decoder.layers.1.weight",
        "regressor.weight",
    }


def test_the_teacher_makes_no_noise_takes_no_gradient_and_moves_once_a_step(tiny_vit):
    method = make(tiny_vit, {"drop_path_rate": 0.5}, tau_initial=0.9, tau_end=0.99, tau_increase_pct=0.5)
    images = batch()
    assert method.training and method.student.training and not any(m.training for m in method.teacher.modules())
    assert torch.equal(method.target(images), method.target(images))
    method(images).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    for progress, tau in ((0.25, 0.945), (1.0, 0.99)):
        old = copy.deepcopy(method.teacher)
        method.after_step(progress)
        for t, o, s in zip(method.teacher.parameters(), old.parameters(), method.student.parameters(), strict=True):
            torch.testing.assert_close(t, tau * o + (1 - tau) * s)
    fresh = Data2Vec2(tiny_vit())
    assert all(torch.equal(t, s) for t, s in zip(fresh.teacher.parameters(), fresh.student.parameters()))


def test_a_loop_that_forgets_after_step_is_warned(tiny_vit):
    method = make(tiny_vit).float()
    optimizer = torch.optim.AdamW(method.parameters())

    def step():
        method(batch().float()).loss.backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    with pytest.warns(UserWarning, match=r"the teacher of Data2Vec2 has not moved: call after_step"):
        step()


def test_predictions_and_loss_stay_in_fp32_under_autocast(tiny_vit):
    method = make(tiny_vit).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch().float())
    assert out.loss.dtype == out.extras["prediction"].dtype == out.extras["target"].dtype == torch.float32


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN | REGISTERS])
def test_in_eval_mode_it_gives_the_mean_patch_of_the_whole_image(tiny_vit, vit):
    method, images = make(tiny_vit, vit).eval(), batch()
    out, n = method(images), method.student.vit.num_prefix_tokens
    torch.testing.assert_close(out.embedding, method.student.vit.forward_features(images)[:, n:].mean(dim=1))
    assert out.loss.item() == 0


def test_an_encoder_built_by_name_has_fixed_positions_and_starts_as_the_paper_says():
    method = Data2Vec2("vit_tiny_patch16_224", image_size=64, decoder_depth=1)
    vit = method.student.vit
    assert not vit.pos_embed.requires_grad and (vit.pos_embed[:, 0] == 0).all() and vit.cls_token is not None
    weight = vit.patch_embed.proj.weight
    bound = (6 / (192 + 768)) ** 0.5  # Xavier's, of the flattened kernel
    assert 0.98 * bound < weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(method.teacher.vit.patch_embed.proj.weight, weight)
    assert method.train()(torch.randn(2, 3, 64, 64)).loss.requires_grad


def test_the_target_does_not_collapse_and_is_predicted_better_than_by_a_constant(tiny_vit):
    """500 steps of a tiny model on smooth images; a collapsed target has no spread over tokens and images."""
    tiny = {"embed_dim": 16, "depth": 2}
    torch.manual_seed(0)
    method = Data2Vec2(tiny_vit(**tiny), n_masks=2, decoder_depth=2, tau_initial=0.99, tau_end=0.999).train()
    optimizer, generator = torch.optim.AdamW(method.param_groups(0.05), 1e-3), torch.Generator().manual_seed(0)
    spreads = []
    for step in range(500):
        images = F.interpolate(torch.randn(8, 3, 3, 3, generator=generator), 16, mode="bicubic")
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step((step + 1) / 500)
        spreads.append(out.logs["target_std"].item() ** 2)
    assert min(spreads) > 0.5
    with torch.no_grad():
        out, target = method(images), method.target(images)
    prediction, hidden = out.extras["prediction"], out.extras["target"]
    assert target.var(dim=0).mean() > 0.5  # over images at a place: it is not of positions only
    assert 1 - (prediction - hidden).square().mean() / hidden.var(dim=(0, 1, 2)).mean() > 0.1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k_blocks": 4}, "--k 4 is more than the 3 blocks of the encoder; use --k 3 or less"),
        ({"top_k_blocks": 0}, "--k must be at least 1"),
        ({"mask_ratio": 0.0}, "--mask-erase-pct must be between 0 and 1"),
        ({"n_masks": 0}, "n_masks must be at least 1"),
        ({"mask_adjust": 1.0}, "mask_adjust must be between 0 and 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"decoder_dim": 0}, "decoder_dim must be at least 1"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1"),
        ({"decoder_kernel": 4}, "decoder_kernel must be 3 or 5 or 7, got 4"),
        ({"n_masks": 2.0}, "n_masks must be a whole number, got 2.0"),
        ({"class_token_weight": -1.0}, "class_token_weight must be at least 0"),
        ({"tau_initial": -0.1}, "--tau-initial must be between 0 and 1"),
        ({"crop_min": 0.0}, "crop_min must be between 0 and 1, 0 excluded"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        Data2Vec2(tiny_vit(), **knobs)


def test_an_encoder_without_feed_forward_networks_is_refused():
    vit = VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2, block_fn=ParallelScalingBlock)
    with pytest.raises(InputError, match="no separate feed-forward network; use another --model"):
        Data2Vec2(vit)


@pytest.mark.parametrize(("side", "block", "depth"), [(224, 3, 6), (192, 3, 6), (176, 1, 3), (64, 1, 3)])
def test_on_a_small_grid_single_patches_are_kept_and_the_decoder_is_shallow(side, block, depth):
    method = Data2Vec2("vit_tiny_patch16_224", image_size=side)
    assert (method.block_size, len(method.decoder.layers)) == (block, depth)
    assert method.masks().side == block
    typed = Data2Vec2("vit_tiny_patch16_224", image_size=side, block_size=2, decoder_depth=4)
    assert (typed.masks().side, len(typed.decoder.layers)) == (2, 4)


def test_short_runs_have_fewer_masks():
    facts = Facts(n_images=50_000, image_size=32, depth=6, recipe={}, device="cpu", native_bf16=True, cores=2)
    assert Data2Vec2.derived(replace(facts, steps=4_999))["n_masks"] == (2, "in only 4,999 steps")
    assert "n_masks" not in Data2Vec2.derived(replace(facts, steps=5_000)) | Data2Vec2.derived(facts)
