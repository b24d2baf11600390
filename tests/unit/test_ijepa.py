"""I-JEPA against naive code: its blocks, which image and block a prediction is of, its target, what sees what."""

import copy
import math
import pickle

import pytest
import torch
from PIL import Image
from torch import nn

import data2vec_vision as d2v
from data2vec_vision.errors import InputError
from data2vec_vision.masking import multiblock, multiblock_official, stack_masks
from data2vec_vision.methods.ijepa import IJEPA
from data2vec_vision.vit import build_vit

ENCODERS = {
    "no class token": {"class_token": False, "global_pool": "avg"},
    "class token": {},
    "registers": {"reg_tokens": 2},
    "registers without class token": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 1},
    "not square": {"img_size": (16, 24)},
}
FEW = ["no class token", "class token", "registers"]
PAPER = {"targets": "blocks", "target_output": "last", "center": False}
TAU = {"tau_initial": 0.9, "tau_end": 0.99, "tau_increase_pct": 0.5}


def make(tiny_vit, encoder="no class token", **knobs):
    vit_arguments = {
        name: knobs.pop(name) for name in ("proj_drop_rate", "drop_path_rate", "img_size") if name in knobs
    }
    torch.manual_seed(0)
    method = IJEPA(
        tiny_vit(**(ENCODERS[encoder] | vit_arguments)), **(PAPER | TAU | {"predictor_depth": 2} | knobs)
    ).double()
    for p in [*method.parameters()]:
        nn.init.normal_(p, std=0.2)
    return method.train()


def batch(method, size=4):
    torch.manual_seed(1)
    return torch.randn(size, 3, *method.student.image_size, dtype=torch.float64)


def draw(method, size=4, seed=0):
    """Masks as a run has them: a generator for each image, and one for the step, the same for all its images."""
    sampler = method.masks()
    own = [torch.Generator().manual_seed(100 * seed + image) for image in range(size)]
    return stack_masks([sampler(g, torch.Generator().manual_seed(seed)) for g in own])


def cells(method, index):
    """bool [B, 1, H, W]: the pixels of the patches of each image in `index`."""
    rows, columns = method.student.grid
    chosen = torch.zeros(len(index), rows * columns, dtype=torch.bool).scatter(1, index, True)
    return chosen.view(-1, 1, rows, columns).repeat_interleave(4, 2).repeat_interleave(4, 3)


def naive_encode(vit, image, keep):
    """timm's modules on one image: embed and place all patches, drop those not kept; prefix tokens go in, not out."""
    tokens = []
    for token in (vit.cls_token, vit.reg_token):
        tokens += [] if token is None else list(token[0])
    N = len(tokens)
    if not vit.no_embed_class:
        tokens = [token + position for token, position in zip(tokens, vit.pos_embed[0])]
    patches = vit.patch_embed(image[None])[0]
    positions = vit.pos_embed[0, vit.pos_embed.shape[1] - len(patches) :]
    x = torch.stack(tokens + [patches[i] + positions[i] for i in keep])[None]
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)[0, N:]


def naive_target(method, image, patches):
    """The teacher's last tokens of the whole image, each less its mean over its deviation."""
    states = method.teacher.vit.forward_features(image[None])[0, method.teacher.vit.num_prefix_tokens :]
    return torch.stack(
        [(states[i] - states[i].mean()) / (states[i].var(unbiased=False) + 1e-5).sqrt() for i in patches]
    )


def naive_prediction(method, image, keep, block):
    """One block of one image: its mask tokens behind the context, each with its position, through the predictor."""
    predictor, context = method.predictor, method.embed(naive_encode(method.student.vit, image, keep))
    rows = [token + predictor.position[i] for token, i in zip(context, keep)]
    rows += [predictor.mask_token[0, 0] + predictor.position[i] for i in block]
    x = torch.stack(rows)[None]
    for layer in predictor.blocks:
        x = layer(x)
    return method.head(predictor.norm(x)[0, len(keep) :])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_target_and_prediction_equal_naive_code_for_each_image_and_block(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    out = method(images, masks=masks)
    assert out.extras["target"].shape == out.extras["prediction"].shape == (*masks["query"].shape, 32)
    assert not out.extras["target"].requires_grad
    for b, image in enumerate(images):
        for m, block in enumerate(masks["query"][b].tolist()):
            expected = naive_prediction(method, image, masks["keep"][b].tolist(), block)
            torch.testing.assert_close(out.extras["prediction"][b, m], expected, rtol=1e-9, atol=1e-9)
            expected = naive_target(method, image, block)
            torch.testing.assert_close(out.extras["target"][b, m], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoder", FEW)
@pytest.mark.parametrize("beta", [1.0, 0.1, 0.0])
def test_loss_equals_naive_code(tiny_vit, encoder, beta):
    method = make(tiny_vit, encoder, beta=beta)
    images, masks = batch(method), draw(method)
    total = count = 0
    for image, keep, blocks in zip(images, masks["keep"].tolist(), masks["query"].tolist()):
        for block in blocks:
            errors = naive_prediction(method, image, keep, block) - naive_target(method, image, block)
            for e in errors.flatten().tolist():
                total += e * e / (2 * beta) if abs(e) < beta else abs(e) - beta / 2
                count += 1
    out = method(images, masks=masks)
    assert out.loss.item() == pytest.approx(total / count, rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()


@pytest.mark.parametrize("encoder", FEW)
def test_predictions_and_targets_are_of_the_image_they_stand_for(tiny_vit, encoder):
    """Images of one colour each and no positions: a target tells its image, and so does a prediction."""
    method = make(tiny_vit, encoder)
    for vit in (method.student.vit, method.teacher.vit):
        nn.init.zeros_(vit.pos_embed)
    method.predictor.position.zero_()
    images = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    out = method(images, masks=draw(method, 5))
    for name in ("target", "prediction"):
        values = out.extras[name]
        alone = torch.stack([method(image[None], masks=draw(method, 1)).extras[name][0, 0, 0] for image in images])
        assert torch.cdist(alone, alone).add(10 * torch.eye(5)).min() > 1e-3
        for b in range(5):
            torch.testing.assert_close(values[b], alone[b].expand_as(values[b]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoder", FEW)
def test_an_image_changes_its_own_predictions_and_targets_only(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    before = method(images, masks=masks).extras
    changed = images.clone()
    changed[2] = torch.randn_like(images[2])
    after = method(changed, masks=masks).extras
    for name in ("prediction", "target"):
        moved = (after[name] - before[name]).abs().amax(dim=(2, 3))
        assert moved[2].min() > 1e-3 and moved[[0, 1, 3]].max() < 1e-9


def test_blocks_do_not_see_each_others_queries(tiny_vit):
    """Other places for one block leave the predictions of the other blocks as they are."""
    method = make(tiny_vit)
    images, masks = batch(method), draw(method)
    before = method(images, masks=masks).extras["prediction"]
    for m in range(4):
        query = masks["query"].clone()
        query[:, m] = (query[:, m] + 5) % 16
        after = method(images, masks=masks | {"query": query}).extras["prediction"]
        others = [i for i in range(4) if i != m]
        torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-9, atol=1e-9)
        assert (after[:, m] - before[:, m]).abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_student_sees_the_context_alone_and_the_teacher_the_whole_image(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    lengths = {"student": set(), "teacher": set(), "predictor": set()}
    for name, blocks in (
        ("student", method.student.vit.blocks),
        ("teacher", method.teacher.vit.blocks),
        ("predictor", method.predictor.blocks),
    ):
        for block in blocks:
            block.register_forward_pre_hook(lambda module, inputs, name=name: lengths[name].add(inputs[0].shape[1]))
    one = method(images, masks=masks)
    K, Q, N = masks["keep"].shape[1], masks["query"].shape[2], method.student.vit.num_prefix_tokens
    # The prefix tokens stay in the encoder; what reaches the predictor is patches.
    assert lengths == {"student": {N + K}, "teacher": {N + method.student.n_patches}, "predictor": {K + Q}}
    assert method.predictor.n_prefix == 0 and len(method.predictor.position) == method.student.n_patches
    outside = ~cells(method, masks["keep"])
    two = method(torch.where(outside, torch.randn_like(images), images), masks=masks)
    assert torch.equal(one.extras["prediction"], two.extras["prediction"])
    assert torch.equal(one.embedding, two.embedding)
    assert (one.extras["target"] - two.extras["target"]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    # Patches that are in no block and not in the context matter to the target too.
    neither = outside & ~cells(method, masks["query"].flatten(1))
    assert neither.any(dim=(1, 2, 3)).any()
    three = method(torch.where(neither, torch.randn_like(images), images), masks=masks)
    for b in neither.any(dim=(1, 2, 3)).nonzero().flatten():
        assert (one.extras["target"][b] - three.extras["target"][b]).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", ["class token", "registers"])
def test_prefix_tokens_do_not_reach_the_predictor(tiny_vit, encoder):
    """They take part in the encoder; but what it makes of them is not handed on."""
    method = make(tiny_vit, encoder)
    images, masks = batch(method), draw(method)
    before, encode = method(images, masks=masks), method.student.encode
    method.student.encode = lambda *args, **kwargs: (e := encode(*args, **kwargs))._replace(prefix=e.prefix + torch.nan)
    assert torch.equal(method(images, masks=masks).loss, before.loss)
    method.student.encode = encode
    method.student.vit.cls_token.data.normal_()
    assert not torch.allclose(method(images, masks=masks).extras["prediction"], before.extras["prediction"])


def test_targets_have_no_scale_of_their_own(tiny_vit):
    """Each target is layer-normed without parameters, after the teacher's own last norm."""
    method = make(tiny_vit)
    images = batch(method)
    target = method.target(images)
    assert target.shape == (4, 16, 32)
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 16, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        target.var(-1, unbiased=False), torch.ones(4, 16, dtype=torch.float64), rtol=0, atol=0.01
    )
    last_norm = method.teacher.vit.norm
    last_norm.weight.data[0] *= 50
    assert not torch.allclose(method.target(images), target, atol=1e-2)


@pytest.mark.parametrize("side", [16, 24, 32])
def test_masks_are_those_of_the_sampler(tiny_vit, side):
    method = make(tiny_vit, img_size=side, n_targets=3, context_ratio=0.3)
    sampler, grid = method.masks(), method.student.grid
    n_context = round(0.3 * grid[0] * grid[1])
    for seed in range(10):
        generators = [torch.Generator().manual_seed(s) for s in (seed, 50 + seed)]
        masks = sampler(*generators)
        generators = [torch.Generator().manual_seed(s) for s in (seed, 50 + seed)]
        context, targets = multiblock(grid, 3, n_context, *generators)
        assert set(masks) == {"keep", "query"}
        assert torch.equal(masks["keep"], context) and torch.equal(masks["query"], targets)


def test_the_context_has_the_same_size_however_the_images_are_batched(tiny_vit):
    method = make(tiny_vit, img_size=32)
    whole = draw(method, 12)
    assert method.n_context == 16 and whole["keep"].shape == (12, 16)
    for size in (1, 2, 5):
        assert torch.equal(draw(method, size)["keep"], whole["keep"][:size])
        assert method.sample_masks(size, torch.device("cpu"))["keep"].shape == (size, 16)


def test_without_masks_it_draws_blocks_of_one_size_for_all_images(tiny_vit):
    method = make(tiny_vit, img_size=32)
    out = method(batch(method))
    assert out.extras["keep"].shape == (4, 16) and out.extras["query"].shape[:2] == (4, 4)
    assert out.logs["context_patches"] == 16 and out.logs["target_patches"] == out.extras["query"].shape[2]
    sizes = {tuple(method.sample_masks(2, torch.device("cpu"))["query"].shape) for _ in range(30)}
    assert len(sizes) > 1


def test_the_official_sampler_is_a_knob(tiny_vit):
    method = make(tiny_vit, img_size=32, official_sampler=True)
    sampler, lengths = method.masks(), set()
    for seed in range(10):
        generators = [torch.Generator().manual_seed(s) for s in (seed, 0)]
        masks = sampler(*generators)
        generators = [torch.Generator().manual_seed(s) for s in (seed, 0)]
        context, targets = multiblock_official((8, 8), 4, *generators)
        assert torch.equal(masks["keep"], context) and torch.equal(masks["query"], targets)
        lengths.add(len(context))
    assert len(lengths) > 1
    masks = draw(method, 8)
    assert masks["keep"].shape[1] == min(draw(method, i)["keep"].shape[1] for i in range(1, 9))
    images = batch(method, 8)
    out = method(images, masks=masks)
    out.loss.backward()
    expected = naive_prediction(method, images[7], masks["keep"][7].tolist(), masks["query"][7, 3].tolist())
    torch.testing.assert_close(out.extras["prediction"][7, 3], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", [4, 8, 12])
def test_grids_too_small_for_blocks_are_refused(tiny_vit, side):
    message = f"a grid of {side // 4} x {side // 4} patches is too small .* needs 4 x 4; use a larger --image-size"
    with pytest.raises(InputError, match=message):
        IJEPA(tiny_vit(img_size=side), targets="blocks")
    with pytest.raises(InputError, match=f"a grid of {side // 4} x 8 patches is too small"):
        IJEPA(tiny_vit(img_size=(side, 32)), targets="blocks")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_targets": 60}, "60 target blocks .* leave no room for a context of 4 of the 4 x 4 patches"),
        ({"context_ratio": 0.95}, "4 target blocks .* leave no room for a context of 15"),
        (
            {"official_sampler": True},
            "4 x 4 patches are too few for the official sampler; use --set official_sampler=false",
        ),
    ],
)
def test_masks_that_cannot_be_are_refused_at_once(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        IJEPA(tiny_vit(), **({} if "official_sampler" in knobs else {"targets": "blocks"}), **knobs)


def test_single_patches_and_the_official_sampler_contradict_each_other(tiny_vit):
    with pytest.raises(InputError, match="official_sampler=true draws blocks; leave out targets=patches"):
        IJEPA(tiny_vit(), official_sampler=True, targets="patches")


@pytest.mark.parametrize(("side", "blocks"), [(4 * 11, False), (4 * 12, True)])
def test_small_grids_have_all_patches_outside_the_context_as_targets(tiny_vit, side, blocks):
    method = IJEPA(tiny_vit(img_size=side, depth=1), predictor_depth=1)
    masks, S = draw(method, 3), (side // 4) ** 2
    K = masks["keep"].shape[1]
    assert round(S / 4) == K and masks["query"].shape[:2] == (3, 4 if blocks else 1)
    assert ("4 blocks" in method.describe()) == blocks != ("the others" in method.describe())
    if not blocks:
        both = torch.cat([masks["keep"], masks["query"][:, 0]], dim=1)
        assert torch.equal(both.sort(dim=1).values, torch.arange(S).expand(3, -1))
        assert len({tuple(k.tolist()) for k in masks["keep"]}) == 3
    out = method(torch.randn(3, 3, side, side), masks=masks)
    assert out.extras["prediction"].shape == (*masks["query"].shape, 32)


def test_the_default_target_is_that_of_data2vec_2(tiny_vit):
    """Naive code: feed-forward outputs of all blocks, instance norm, mean, layer norm; the rest is in test_latent."""
    assert IJEPA.Config().target_output == "ffn" and IJEPA.Config().center
    method = make(tiny_vit, target_output="ffn")
    images, outputs = batch(method), []
    hooks = [b.mlp.register_forward_hook(lambda m, i, o: outputs.append(o)) for b in method.teacher.vit.blocks]
    target = method.target(images)
    [hook.remove() for hook in hooks]
    y = 0
    for o in outputs[:3]:
        y = y + (o - o.mean(1, keepdim=True)) / (o.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() / 3
    expected = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("side", "knobs"),
    [(32, {"context_ratio": 0.5}), (32, {"n_targets": 12}), (24, {"n_targets": 8}), (16, {}), (32, {})],
)
def test_masks_that_are_not_refused_at_once_can_be_drawn_for_ever(tiny_vit, side, knobs):
    """A sampler that fails now and then would end a run in a worker, hours later."""
    try:
        sampler = IJEPA(tiny_vit(img_size=side, depth=1), targets="blocks", predictor_depth=1, **knobs).masks()
    except InputError:
        assert knobs  # the defaults are for every grid from 4 x 4 on
        return
    for seed in range(300):
        sampler(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed))


@pytest.mark.parametrize("image_size", [64, (64, 96)])
def test_encoders_from_a_name_have_no_class_token_and_fixed_positions(image_size):
    torch.manual_seed(0)
    method = IJEPA("vit_tiny_patch16_224", image_size=image_size, predictor_depth=1)
    vit, (rows, columns) = method.student.vit, method.student.grid
    assert vit.cls_token is None and vit.num_prefix_tokens == 0 and method.student.pool == "mean"
    assert isinstance(vit.norm, nn.LayerNorm) and isinstance(vit.fc_norm, nn.Identity)
    for encoder in (method.student, method.teacher):
        position = encoder.vit.pos_embed[0]
        assert len(position) == rows * columns and not encoder.vit.pos_embed.requires_grad
        for patch, vector in enumerate(position):
            angles = [place / 10000 ** (k / 48) for place in reversed(divmod(patch, columns)) for k in range(48)]
            column, row = torch.tensor(angles, dtype=torch.float64).split(48)
            expected = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
            torch.testing.assert_close(vector.double(), expected, rtol=0, atol=1e-7)
    optimised = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert id(vit.pos_embed) not in optimised


def test_first_weights_are_those_of_mae():
    """Xavier's in encoder and predictor: with normal ones of deviation 0.02 some seeds had not begun in 700 steps."""
    torch.manual_seed(0)
    method = IJEPA("vit_tiny_patch16_224", image_size=64, predictor_depth=1)
    parts = nn.ModuleList([method.student.vit.blocks, method.predictor, method.embed, method.head])
    for linear in (m for m in parts.modules() if isinstance(m, nn.Linear)):
        rows, columns = linear.weight.shape
        bound = math.sqrt(6 / (rows + columns))
        assert 0.95 * bound < linear.weight.abs().max().item() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not linear.bias.any()
    mask_token = method.predictor.mask_token
    assert mask_token.all() and mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_ready_encoder_is_taken_as_it_is(tiny_vit):
    vit = tiny_vit()
    before = {name: (p.clone(), p.requires_grad) for name, p in vit.named_parameters()}
    IJEPA(vit)
    assert {name for name, _ in vit.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in vit.named_parameters())


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "expected"),
    [(768, 1, 12, (384, 1)), (384, 2, 6, (192, 1)), (32, 12, 2, (16, 6)), (54, 5, 3, (24, 2))],
)
def test_the_predictor_is_half_the_encoder_with_its_heads(dim, depth, heads, expected):
    """384 wide and 6 blocks deep for ViT-B as in the paper; for ViT-S 384 would be no bottleneck."""
    vit = build_vit(img_size=16, patch_size=4, embed_dim=dim, depth=depth, num_heads=heads)
    method = IJEPA(vit)
    predictor = method.predictor
    assert (predictor.dim, len(predictor.blocks)) == expected
    assert {block.attn.num_heads for block in predictor.blocks} == {heads}
    assert method.embed.weight.shape == (expected[0], dim) and method.head.weight.shape == (dim, expected[0])


def test_the_predictor_can_be_chosen(tiny_vit):
    method = IJEPA(tiny_vit(), predictor_dim=48, predictor_depth=3)
    assert (method.predictor.dim, len(method.predictor.blocks)) == (48, 3)
    method(torch.randn(2, 3, 16, 16)).loss.backward()


@pytest.mark.parametrize("encoder", ["no class token", "class token"])
def test_decayed_parameters_are_the_matrices_and_the_mask_token(tiny_vit, encoder):
    """Not the class token, the positions, biases and norms; the mask token as in the official code."""
    method = IJEPA(tiny_vit(depth=1, **ENCODERS[encoder]))
    names = {id(p): n for n, p in method.named_parameters()}
    decayed = {names[id(p)] for group in method.param_groups(0.04) if group["weight_decay"] for p in group["params"]}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert decayed == {
        "student.vit.patch_embed.proj.weight",
        *(f"student.vit.blocks.0.{name}" for name in matrices),
        "embed.weight",
        "predictor.mask_token",
        *(f"predictor.blocks.0.{name}" for name in matrices),
        "head.weight",
    }


def test_weight_decay_rises_by_a_cosine(tiny_vit):
    method = IJEPA(tiny_vit())
    decays = [method.weight_decay(0.04, progress / 8) for progress in range(9)]
    assert decays == pytest.approx([0.4 - 0.36 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(9)])
    assert (decays[0], decays[4], decays[8]) == (pytest.approx(0.04), pytest.approx(0.22), pytest.approx(0.4))
    assert IJEPA(tiny_vit(), weight_decay_end=0.1).weight_decay(0.1, 0.5) == pytest.approx(0.1)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_that_is_optimised_has_a_gradient_and_none_of_the_teachers(tiny_vit, encoder):
    method = make(tiny_vit, encoder)
    method(batch(method)).loss.backward()
    optimised = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert optimised == {id(p) for p in method.parameters() if p.requires_grad}
    assert [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_makes_no_noise(tiny_vit):
    method = make(tiny_vit, proj_drop_rate=0.5, drop_path_rate=0.5)
    assert method.training and method.student.training and not any(m.training for m in method.teacher.modules())
    assert torch.equal(method.target(batch(method)), method.target(batch(method)))


def test_the_teacher_starts_as_the_student_and_follows_it_by_the_tau_of_the_step(tiny_vit):
    method = IJEPA(tiny_vit())
    assert all(torch.equal(t, s) for t, s in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    for p in method.student.parameters():
        nn.init.normal_(p)
    for progress, tau in ((0.25, 0.997), (0.5, 0.998), (1.0, 1.0)):
        old = copy.deepcopy(method.teacher)
        method.after_step(progress)
        assert method.scheduled(progress)["tau"] == pytest.approx(tau)
        for t, o, s in zip(method.teacher.parameters(), old.parameters(), method.student.parameters(), strict=True):
            torch.testing.assert_close(t, tau * o + (1 - tau) * s)


def test_four_passes_of_4_equal_one_pass_of_16(tiny_vit):
    method = make(tiny_vit)
    images, masks = batch(method, 16), draw(method, 16)
    method.after_step(0.5)  # as a loop would have

    def gradients(size):
        method.zero_grad()
        for start in range(0, 16, size):
            part = {name: mask[start : start + size] for name, mask in masks.items()}
            (method(images[start : start + size], masks=part).loss * size / 16).backward()
        return [p.grad for p in method.parameters() if p.requires_grad]

    for a, b in zip(gradients(4), gradients(16)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoder", FEW)
def test_predictions_and_loss_stay_in_fp32_under_autocast(tiny_vit, encoder):
    method = make(tiny_vit, encoder).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch(method).float())
    assert out.loss.dtype == out.extras["prediction"].dtype == out.extras["target"].dtype == torch.float32


@pytest.mark.parametrize("encoder", FEW)
def test_in_eval_mode_it_gives_the_mean_of_the_patches_of_the_whole_image(tiny_vit, encoder):
    method = make(tiny_vit, encoder).eval()
    images, N = batch(method), method.student.vit.num_prefix_tokens
    out = method(images)
    torch.testing.assert_close(out.embedding, method.student.vit.forward_features(images)[:, N:].mean(1))
    assert out.loss.item() == 0


def test_it_learns_to_predict_better_than_a_constant(tiny_vit):
    """Smooth images, so that hidden patches can be told from their neighbours."""
    method, r2 = IJEPA(tiny_vit(depth=1), **PAPER).train(), []
    optimizer, generator = torch.optim.AdamW(method.parameters(), 5e-3), torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(32, 3, 2, 2, generator=generator), 16, mode="bilinear")
    torch.manual_seed(0)
    for step in range(80):
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step((step + 1) / 80)
        prediction, target = out.extras["prediction"], out.extras["target"]
        r2.append(1 - (prediction - target).square().mean() / target.flatten(0, 2).var(dim=0).mean())
    assert sum(r2[-20:]) / 20 > 0.08 and out.logs["target_std"] > 0.5


def test_views_and_masks_travel_to_workers(tiny_vit):
    method = make(tiny_vit)
    views, masks = pickle.loads(pickle.dumps((method.views(), method.masks())))
    [view] = views(Image.new("RGB", (30, 40)))
    assert view.dtype == torch.uint8 and view.shape == (3, 16, 16)
    assert masks(torch.Generator(), torch.Generator())["keep"].shape == (4,)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_targets": 0}, "n_targets must be at least 1"),
        ({"context_ratio": 1.0}, "context_ratio must be between 0 and 1"),
        ({"predictor_dim": 2}, "predictor_dim must be at least 4"),
        ({"predictor_dim": 18}, "a decoder of width 18 cannot have 2 head"),
        ({"tau_end": 1.2}, "--tau-end must be between 0 and 1"),
        ({"beta": -1.0}, "--beta must be at least 0"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        IJEPA(tiny_vit(), **knobs)


def test_it_is_public_and_builds_from_a_name():
    method = d2v.IJEPA(encoder="vit_tiny_patch16_224", image_size=64, context_ratio=0.5, predictor_depth=1)
    assert method.student.grid == (4, 4) and method(torch.randn(1, 3, 64, 64)).loss.requires_grad


def test_a_number_of_blocks_is_refused_where_patches_are_predicted(tiny_vit):
    with pytest.raises(
        InputError, match="n_targets=7 is for blocks, and single patches are predicted; add targets=blocks"
    ):
        IJEPA(tiny_vit(), n_targets=7)
