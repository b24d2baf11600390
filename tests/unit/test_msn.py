"""MSN against naive code: its targets, its loss, what the student sees, and what moves how."""

import copy
import math
import pickle

import pytest
import torch
from PIL import Image
from torch import nn

from data2vec_vision.distributed import BatchNorm
from data2vec_vision.errors import InputError
from data2vec_vision.methods.msn import MSN

SMALL = {"n_prototypes": 6, "head_dim": 12, "projection_dim": 8, "mask_ratio": 0.4}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
REGISTERS = {"reg_tokens": 2}


def make(tiny_vit, vit=None, **knobs):
    """In float64, with weights at random, the teacher's others than the student's."""
    torch.manual_seed(0)
    method = MSN(tiny_vit(**(vit or {})), **(SMALL | knobs)).double()
    for p in method.parameters():
        nn.init.normal_(p, std=0.3)
    return method.train()


def batch(focal=3, size=4, side=16, focal_side=8):
    generator = torch.Generator().manual_seed(1)
    sides = [side, side] + [focal_side] * focal
    return [torch.randn(size, 3, s, s, generator=generator, dtype=torch.float64) for s in sides]


def keeps(method, size=4):
    generator, draw = torch.Generator().manual_seed(2), method.masks()
    return torch.stack([draw(generator, generator)["keep"] for _ in range(size)])


def naive_head(head, x):
    """Layer by layer; a batch norm takes the rows it is given."""
    for layer in head:
        if isinstance(layer, BatchNorm):
            x = (x - x.mean(dim=0)) / ((x - x.mean(dim=0)).square().mean(dim=0) + 1e-5).sqrt()
            x = x * layer.weight + layer.bias
        elif isinstance(layer, nn.Linear):
            x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        else:  # GELU
            x = x * (1 + torch.erf(x / 2**0.5)) / 2
    return x


def naive_feature(encoder, images, keep=None):
    """Image by image: the class token, or where there is none the mean of the patch tokens."""
    features = []
    for b in range(len(images)):
        if keep is None and images.shape[-1] == 16:
            tokens = encoder.vit.forward_features(images[b : b + 1])[0]
            prefix, patches = tokens[: encoder.vit.num_prefix_tokens], tokens[encoder.vit.num_prefix_tokens :]
        else:
            encoded = encoder.encode(images[b : b + 1], keep=None if keep is None else keep[b : b + 1])
            prefix, patches = encoded.prefix[0], encoded.tokens[0]
        features.append(patches.mean(dim=0) if encoder.vit.cls_token is None else prefix[0])
    return torch.stack(features)


def naive_probabilities(method, projections, temperature):
    rows = []
    for z in projections:
        cosine = torch.stack([z @ q / z.norm() / q.norm() for q in method.prototypes.weight])
        rows.append((cosine / temperature).exp() / (cosine / temperature).exp().sum())
    return torch.stack(rows)


@torch.no_grad()
def naive_target(method, images):
    """Probabilities at the temperature of the anchors, sharpened, then Sinkhorn on the probabilities."""
    projections = naive_head(method.teacher_head, naive_feature(method.teacher, images))
    p = naive_probabilities(method, projections, 0.1)
    p = p ** (1 / 0.25) / (p ** (1 / 0.25)).sum(dim=1, keepdim=True)
    if method.config.sinkhorn:
        Q, (B, K) = p.T / p.sum(), p.shape
        for _ in range(3):
            Q = Q / Q.sum(dim=1, keepdim=True) / K
            Q = Q / Q.sum(dim=0, keepdim=True) / B
        p = (Q * B).T
    return p


def naive_loss(method, views, keep):
    """The anchor and the focal views each have a batch norm of their own; view 0 of all images comes first."""
    target, B = naive_target(method, views[1]), len(views[0])
    projections = [naive_head(method.head, naive_feature(method.student, views[0], keep))]
    if views[2:]:
        features = torch.cat([naive_feature(method.student, view) for view in views[2:]])
        projections.append(naive_head(method.head, features))
    p = naive_probabilities(method, torch.cat(projections), 0.1)
    cross_entropy, mean = 0, 0
    for row in range(len(p)):
        for k in range(6):
            cross_entropy = cross_entropy - target[row % B, k] * p[row, k].log() / len(p)
        mean = mean + p[row] / len(p)
    entropy = -sum(m * m.log() for m in mean)
    return cross_entropy + method.config.mean_entropy_weight * (math.log(6) - entropy)


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN, REGISTERS, NO_CLASS_TOKEN | REGISTERS])
@pytest.mark.parametrize("knobs", [{}, {"sinkhorn": False}, {"mean_entropy_weight": 3.0}])
def test_loss_and_its_gradient_equal_naive_code(tiny_vit, vit, knobs):
    method, views = make(tiny_vit, vit, **knobs), batch()
    keep = keeps(method)
    out, expected = method(views, masks={"keep": keep}), naive_loss(method, views, keep)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()
    trained = [p for p in method.parameters() if p.requires_grad]
    for ours, naive in zip(torch.autograd.grad(out.loss, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-6)  # timm resamples positions in fp32


@pytest.mark.parametrize("focal", [0, 1, 4])
def test_loss_equals_naive_code_with_any_number_of_focal_views(tiny_vit, focal):
    method, views = make(tiny_vit), batch(focal)
    keep = keeps(method)
    loss = method(views, masks={"keep": keep}).loss
    assert loss.item() == pytest.approx(naive_loss(method, views, keep).item(), rel=1e-9)


@pytest.mark.parametrize("balanced", [True, False])
def test_targets_are_sharpened_and_balanced_and_carry_no_gradient(tiny_vit, balanced):
    method, views = make(tiny_vit, sinkhorn=balanced), batch(size=8)
    target = method.target(views[1])
    torch.testing.assert_close(target, naive_target(method, views[1]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert not target.requires_grad
    assert torch.equal(method(views).extras["target"], target)


def test_without_the_sharpening_a_target_has_the_temperature_of_the_anchors(tiny_vit):
    method, views = make(tiny_vit, sinkhorn=False, sharpening=1.0, temperature=0.3), batch()
    projections = naive_head(method.teacher_head, naive_feature(method.teacher, views[1]))
    torch.testing.assert_close(method.target(views[1]), naive_probabilities(method, projections, 0.3))


def pixels_of(hidden):
    """Where the hidden patches [B, 16] are in images of 16 px."""
    return hidden.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_the_student_sees_only_the_kept_patches_of_the_anchor_and_the_teacher_sees_all(tiny_vit):
    method, (anchor, target, *focal) = make(tiny_vit), batch()
    keep = keeps(method)
    hidden = pixels_of(torch.ones(4, 16, dtype=torch.bool).scatter(1, keep, False))
    before = method(anchor, target, focal, masks={"keep": keep})
    elsewhere = torch.where(hidden, torch.randn_like(anchor), anchor)
    after = method(elsewhere, target, focal, masks={"keep": keep})
    assert torch.equal(after.loss, before.loss) and torch.equal(after.embedding, before.embedding)
    seen = torch.where(hidden, anchor, torch.randn_like(anchor))
    assert not torch.equal(method(seen, target, focal, masks={"keep": keep}).loss, before.loss)
    assert not method.target(torch.where(hidden, torch.randn_like(target), target)).allclose(method.target(target))


def lengths_seen(method, views, keep):
    """Images and tokens of each pass through the first blocks of student and teacher."""
    seen = {"student": [], "teacher": []}
    for name, encoder in method.encoders.items():
        encoder.vit.blocks[0].register_forward_pre_hook(
            lambda m, x, name=name: seen[name].append(tuple(x[0].shape[:2]))
        )
    method(views, masks={"keep": keep})
    return seen


def test_hidden_patches_are_left_out_and_each_resolution_takes_one_pass(tiny_vit):
    method = make(tiny_vit)
    assert method.student.mask_token is None and method.n_keep == 9
    seen = lengths_seen(method, batch(focal=5), keeps(method))
    assert seen == {"student": [(4, 10), (5 * 4, 5)], "teacher": [(4, 17)]}
    seen = lengths_seen(make(tiny_vit), batch(focal=0), keeps(method))
    assert seen == {"student": [(4, 10)], "teacher": [(4, 17)]}


def test_focal_views_of_the_size_of_the_anchor_are_not_masked_either(tiny_vit):
    method, views = make(tiny_vit), batch(focal=2, focal_side=16)
    keep = keeps(method)
    assert lengths_seen(method, views, keep)["student"] == [(4, 10), (8, 17)]
    assert method(views, masks={"keep": keep}).loss.item() == pytest.approx(naive_loss(method, views, keep).item())


def test_masks_leave_out_the_share_asked_for_and_differ_between_images(tiny_vit):
    for ratio, kept in ((0.15, 13), (0.5, 8), (0.001, 15), (0.999, 1)):
        assert keeps(make(tiny_vit, mask_ratio=ratio)).shape == (4, kept)
    method = make(tiny_vit, mask_ratio=0.5)
    assert len({tuple(keep.tolist()) for keep in keeps(method, 20)}) > 15
    assert len({tuple(keep.tolist()) for keep in method.sample_masks(20, torch.device("cpu"))["keep"]}) > 15


@pytest.mark.parametrize(("vit", "pool"), [({}, "cls"), (REGISTERS, "cls"), (NO_CLASS_TOKEN | REGISTERS, "mean")])
def test_the_embedding_is_the_class_token_or_the_mean_of_the_patches_alone(tiny_vit, vit, pool):
    method, views = make(tiny_vit, vit), batch()
    keep = keeps(method)
    assert method.student.pool == method.teacher.pool == pool
    embedding = method(views, masks={"keep": keep}).embedding
    torch.testing.assert_close(embedding, naive_feature(method.student, views[0], keep).detach())
    whole = method.eval()(views[0])
    torch.testing.assert_close(whole.embedding, naive_feature(method.student, views[0]))
    assert whole.loss.item() == 0


def test_ways_to_give_the_views_are_the_same(tiny_vit):
    method, (anchor, target, *focal) = make(tiny_vit), batch()
    masks = {"keep": keeps(method)}
    loss = method([anchor, target, *focal], masks=masks).loss
    assert torch.equal(method(anchor, target, *focal, masks=masks).loss, loss)
    assert torch.equal(method(anchor, target, focal, masks=masks).loss, loss)
    assert torch.equal(method(anchor=anchor, target=target, focal_views=focal, masks=masks).loss, loss)
    assert torch.equal(method(focal_views=focal, target=target, anchor=anchor, masks=masks).loss, loss)
    two = method([anchor, target], masks=masks).loss
    assert torch.equal(method(anchor, target, masks=masks).loss, two)
    assert torch.equal(method(anchor=anchor, target=target, masks=masks).loss, two) and not torch.equal(two, loss)


def test_too_few_views_and_unknown_names_are_refused(tiny_vit):
    method, views = make(tiny_vit), batch()
    for call in (lambda: method(views[0]), lambda: method(views[:1])):
        with pytest.raises(ValueError, match="MSN takes at least 2 views of each image, got 1"):
            call()
    for names, message in (
        ({"anchor": views[0]}, "MSN takes 1 target, got 0"),
        ({"anchor": views[0], "focal_views": [views[2]]}, "MSN takes 1 target, got 0"),
        ({"focal_views": views[:2]}, "MSN takes 1 anchor, got 0"),
        ({"anchor": views[:2], "target": views[1]}, "MSN takes 1 anchor, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            method(**names)
    with pytest.raises(ValueError, match="MSN was given target by position and by name"):
        method(views[0], target=views[1])
    with pytest.raises(ValueError, match="of different numbers of images"):
        method(views[0], views[1][:2])
    with pytest.raises(ValueError, match="MSN compares images: it takes at least 2 at a time"):
        method(views[0][:1], views[1][:1])
    with pytest.raises(TypeError, match="MSN takes no views named focal; it knows anchor, target, focal_views"):
        method(views[0], views[1], focal=views[2])


def test_prototypes_are_shared_trained_by_the_anchors_and_outside_the_teacher(tiny_vit):
    method, views = make(tiny_vit), batch()
    assert [n for n, _ in method.named_parameters() if "prototypes" in n] == ["prototypes.weight"]
    method(views).loss.backward()
    assert method.prototypes.weight.grad.abs().max() > 0
    before, target = method.prototypes.weight.detach().clone(), method.target(views[1])
    method.prototypes.weight.data += torch.randn_like(before)
    assert not method.target(views[1]).allclose(target)  # the teacher scores with the prototypes of now
    moved = method.prototypes.weight.detach().clone()
    method.after_step(1.0)
    assert torch.equal(method.prototypes.weight, moved)


def test_the_teacher_and_its_head_move_once_by_the_tau_of_the_step(tiny_vit):
    method = make(tiny_vit, tau_initial=0.9, tau_end=0.99, tau_increase_pct=0.5)
    for progress, tau in ((0.1, 0.918), (0.25, 0.945), (0.5, 0.99), (1.0, 0.99)):
        old = copy.deepcopy((method.teacher, method.teacher_head))
        method.after_step(progress)
        for new, was, source in zip((method.teacher, method.teacher_head), old, (method.student, method.head)):
            for t, o, s in zip(new.parameters(), was.parameters(), source.parameters(), strict=True):
                torch.testing.assert_close(t, tau * o + (1 - tau) * s)
    fresh = MSN(tiny_vit(), **SMALL)
    assert all(torch.equal(t, s) for t, s in zip(fresh.teacher_head.parameters(), fresh.head.parameters()))
    assert all(torch.equal(t, s) for t, s in zip(fresh.teacher.parameters(), fresh.student.parameters()))


def test_the_teacher_is_in_eval_mode_takes_no_gradient_and_normalises_its_own_batch(tiny_vit):
    method, views = make(tiny_vit, {"drop_path_rate": 0.5, "proj_drop_rate": 0.5}, sinkhorn=False), batch()
    assert method.training and method.student.training and not method.teacher.training
    target = method.target(views[1])
    method.teacher_head.eval()
    assert torch.equal(method.target(views[1]), target)
    others = torch.cat([views[1][:1], views[0][1:]])
    assert not method.target(others)[0].allclose(target[0])  # the first image with other batch mates
    method(views).loss.backward()
    for frozen in (method.teacher, method.teacher_head):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN])
def test_what_is_optimised_has_a_gradient_and_decay_is_for_matrices_but_not_for_prototypes(tiny_vit, vit):
    method = make(tiny_vit, vit | {"depth": 1})
    method(batch()).loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    names, groups = {id(p): n for n, p in method.named_parameters()}, method.param_groups(0.04)
    optimized = {names[id(p)] for group in groups for p in group["params"]}
    assert optimized == {n for n, p in method.named_parameters() if p.requires_grad}
    block = "student.vit.blocks.0."
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == {
        "student.vit.patch_embed.proj.weight",
        *(block + n for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")),
        *(f"head.{layer}.weight" for layer in (0, 3, 6)),
    }


def test_the_head_has_no_bias_that_a_batch_norm_would_remove(tiny_vit):
    linears = [layer for layer in make(tiny_vit).head if isinstance(layer, nn.Linear)]
    assert [layer.bias is None for layer in linears] == [True, True, False]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(32, 12), (12, 12), (12, 8)]


def test_weight_decay_rises_by_a_cosine(tiny_vit):
    method = make(tiny_vit)
    given = [method.weight_decay(0.04, progress) for progress in (0, 0.25, 0.5, 1)]
    assert given == pytest.approx([0.04, 0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2, 0.22, 0.4])
    assert make(tiny_vit, weight_decay_end=0.1).weight_decay(0.3, 1) == pytest.approx(0.1)


def test_loss_and_targets_stay_in_fp32_under_autocast(tiny_vit):
    method, views = make(tiny_vit).float(), [view.float() for view in batch()]
    with torch.autocast("cpu", torch.bfloat16):
        out = method(views)
    assert out.loss.dtype == out.extras["target"].dtype == out.extras["log_prediction"].dtype == torch.float32
    assert out.loss.isfinite()


def test_it_stays_finite_at_a_low_temperature(tiny_vit):
    method, views = make(tiny_vit, temperature=0.005).float(), [view.float() for view in batch()]
    loss = method(views).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_extras_and_logs_say_what_was_computed(tiny_vit):
    method, views = make(tiny_vit), batch(focal=3)
    out = method(views)
    shapes = {name: tuple(x.shape) for name, x in out.extras.items()}
    assert shapes == {"log_prediction": (16, 6), "target": (4, 6), "projection": (16, 8), "keep": (4, 9)}
    gap = out.loss.item() - out.logs["cross_entropy"].item()
    assert out.logs["entropy"].item() == pytest.approx(1 - gap / math.log(6))
    assert all(not value.requires_grad and value.shape == () for value in out.logs.values())


@pytest.mark.parametrize(
    ("size", "patch", "count", "crop", "kept"),
    [
        (224, 16, 10, (96, 96), 166),
        (32, 4, 6, (12, 12), 54),
        (16, 4, 3, (8, 8), 13),
        ((32, 16), 4, 3, (12, 8), 27),
        ((64, 96), 16, 3, (32, 48), 20),
    ],
)
def test_views_fit_the_size_of_the_images(tiny_vit, size, patch, count, crop, kept):
    method = MSN(tiny_vit(img_size=size, patch_size=patch), **(SMALL | {"mask_ratio": 0.15}))
    views, masks = pickle.loads(pickle.dumps((method.views(), method.masks())))
    drawn = views(Image.new("RGB", (30, 40)))
    large = size if isinstance(size, tuple) else (size, size)
    assert [tuple(v.shape[1:]) for v in drawn] == [large] * 2 + [crop] * count
    assert all(v.dtype == torch.uint8 for v in drawn) and method.n_focal == count
    assert masks(torch.Generator(), torch.Generator())["keep"].shape == (kept,)
    assert f"2 views and {count} small crops an image, {kept} of" in method.describe()
    if method.student.n_patches < 100:
        out = method.train()([torch.stack([v, v]) / 255 for v in drawn])
        assert out.loss.isfinite()


def test_the_number_of_small_crops_can_be_set(tiny_vit):
    for count in (0, 5):
        method = MSN(tiny_vit(), **SMALL, n_focal=count)
        assert len(method.views()(Image.new("RGB", (20, 20)))) == 2 + count


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mask_ratio": 1.0}, "--mask-erase-pct must be between 0 and 1"),
        ({"n_focal": -1}, "n_focal must be at least 0"),
        ({"n_prototypes": 1}, "n_prototypes must be at least 2"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"sharpening": 0.0}, "sharpening must be between 0 and 1"),
        ({"sharpening": 4.0}, "sharpening must be between 0 and 1"),
        ({"mean_entropy_weight": -1.0}, "mean_entropy_weight must be at least 0"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
        ({"tau_end": 1.5}, "--tau-end must be between 0 and 1"),
        ({"weight_decay_end": -0.1}, "weight_decay_end must be at least 0"),
        ({"focal_min": 0.0}, "focal_min must be between 0 and 1, 0 excluded"),
        ({"blur": 2.0}, "blur must be between 0 and 1"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        MSN(tiny_vit(), **knobs)
