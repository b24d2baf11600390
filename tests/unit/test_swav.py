"""SwAV against naive code: codes, the swapped prediction, the queue, and prototypes that rest and stay on the sphere."""

import io
import pickle

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from data2vec_vision.distributed import BatchNorm
from data2vec_vision.errors import InputError
from data2vec_vision.methods.swav import SwAV

SMALL = {"n_prototypes": 6, "head_dim": 12, "projection_dim": 8, "queue_length": 0, "epsilon": 0.05}
QUEUE = {"queue_length": 8, "queue_start": 0.0}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
REGISTERS = {"reg_tokens": 2}


def make(tiny_vit, vit=None, **knobs):
    torch.manual_seed(0)
    method = SwAV(tiny_vit(**(vit or {})), **(SMALL | knobs)).double()
    for p in method.parameters():
        nn.init.normal_(p, std=0.3)
    return method.train()


def batch(local=6, size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, s, s, generator=generator, dtype=torch.float64) for s in [16, 16] + [8] * local]


def naive_projections(method, views):
    """View by view and image by image through the encoder; then one batch norm over all crops; [V][B] unit vectors."""
    encoder, features = method.student, []
    for view in views:
        for b in range(len(view)):
            encoded = encoder.encode(view[b : b + 1])
            features.append(encoded.tokens[0].mean(dim=0) if encoder.vit.cls_token is None else encoded.prefix[0, 0])
    first, norm, _, last = method.head
    x = torch.stack(features) @ first.weight.T
    x = (x - x.mean(dim=0)) / ((x - x.mean(dim=0)).square().mean(dim=0) + 1e-5).sqrt() * norm.weight + norm.bias
    z = torch.stack([v / v.norm() for v in x.clamp(min=0) @ last.weight.T + last.bias])
    return z.view(len(views), len(views[0]), -1)


def naive_codes(scores, earlier=None):
    """The published loop on exponentials of one crop's scores [B, K], of a queue's too where there is one."""
    B, scores = len(scores), scores if earlier is None else torch.cat([scores, earlier])
    N, K = scores.shape
    Q = (scores / 0.05).exp().T
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(dim=1, keepdim=True) / K
        Q = Q / Q.sum(dim=0, keepdim=True) / N
    return (Q * N).T[:B]


def unit_prototypes(method):
    return torch.stack([w / w.norm() for w in method.prototypes.weight.detach()])


def naive_loss(method, views, prototypes):
    V, z = len(views), naive_projections(method, views)
    pairs = [(i, v) for i in range(2) for v in range(V) if v != i]
    total = 0
    for i, v in pairs:
        code = naive_codes((z[i] @ prototypes.T).detach())
        for b in range(len(views[0])):
            scores = torch.stack([z[v, b] @ w for w in prototypes]) / 0.1
            total = total - sum(code[b, k] * (scores[k] - scores.exp().sum().log()) for k in range(6))
    return total / len(views[0]) / len(pairs), len(pairs)


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN, REGISTERS, NO_CLASS_TOKEN | REGISTERS])
@pytest.mark.parametrize(("local", "pairs"), [(6, 14), (1, 4), (0, 2)])
def test_loss_and_its_gradient_equal_naive_code_over_all_pairs(tiny_vit, vit, local, pairs):
    """Codes come from the two large crops only; the gradient is that of plain products with the unit prototypes."""
    method, views = make(tiny_vit, vit), batch(local)
    prototypes = unit_prototypes(method).requires_grad_()
    out, (expected, n) = method(views), naive_loss(method, views, prototypes)
    assert n == pairs and out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()
    trained = [*method.student.parameters(), *method.head.parameters()]
    ours = torch.autograd.grad(out.loss, [*trained, method.prototypes.weight])
    naive = torch.autograd.grad(expected, [*trained, prototypes])
    for one, other in zip(ours, naive):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # timm resamples positions in fp32


def test_each_large_crop_is_balanced_by_itself(tiny_vit):
    method = make(tiny_vit)
    out = method(batch())
    scores, codes = out.extras["scores"].detach(), out.extras["codes"]
    assert codes.shape == (2, 4, 6) and not codes.requires_grad
    for i in range(2):
        torch.testing.assert_close(codes[i], naive_codes(scores[i]), rtol=1e-9, atol=1e-12)
    together = naive_codes(torch.cat([scores[0], scores[1]]))[:4]
    assert not codes[0].allclose(together, rtol=0.01)


def test_prototypes_are_on_the_unit_sphere_when_they_are_scored(tiny_vit):
    method, views = make(tiny_vit), batch()
    units = F.normalize(method.prototypes.weight.detach(), dim=1)
    method.prototypes.weight.data *= torch.tensor([[0.1], [1], [2], [3], [10], [100]])
    out = method(views)
    torch.testing.assert_close(method.prototypes.weight.detach(), units)
    torch.testing.assert_close(out.extras["scores"], out.extras["projection"] @ units.T)
    torch.testing.assert_close(out.extras["projection"].norm(dim=2), torch.ones(8, 4, dtype=torch.float64))
    fresh = SwAV(tiny_vit(), **SMALL).prototypes.weight
    torch.testing.assert_close(fresh.norm(dim=1), torch.ones(6))


def test_one_pass_of_the_encoder_a_resolution_and_one_of_the_head(tiny_vit):
    method, encoder_saw, head_saw = make(tiny_vit), [], []
    method.student.vit.blocks[0].register_forward_pre_hook(lambda m, x: encoder_saw.append(tuple(x[0].shape[:2])))
    method.head[1].register_forward_pre_hook(lambda m, x: head_saw.append(len(x[0])))
    method(batch())
    assert encoder_saw == [(8, 17), (24, 5)] and head_saw == [32]
    method(batch(0))
    assert encoder_saw[2:] == [(8, 17)] and head_saw[1:] == [8]


def test_ways_to_give_the_views_are_the_same(tiny_vit):
    method, (one, two, *local) = make(tiny_vit), batch()
    loss, pair = method([one, two, *local]).loss, method(one, two).loss
    for same in (
        method(one, two, *local),
        method([one, two], local),
        method(global_views=[one, two], local_views=local),
        method(local_views=local, global_views=[one, two]),
    ):
        torch.testing.assert_close(same.loss, loss)  # the prototypes are normalised again, which may move the last bit
    for same in (method([one, two]), method(global_views=[one, two])):
        torch.testing.assert_close(same.loss, pair)
    assert abs(pair - loss) > 1e-4


def test_too_few_views_and_unknown_names_are_refused(tiny_vit):
    method, views = make(tiny_vit), batch()
    with pytest.raises(ValueError, match="SwAV takes at least 2 views of each image, got 1"):
        method(views[0])
    for names in ({"global_views": views[:1], "local_views": views[2:]}, {"local_views": views}):
        with pytest.raises(ValueError, match="SwAV takes 2 global_views, got [01]"):  # else small crops had codes
            method(**names)
    with pytest.raises(ValueError, match="takes views to train on or images=... to embed, not both"):
        method(views[0], views[1], images=views[0])
    with pytest.raises(TypeError, match="SwAV takes no views named crops; it knows global_views, local_views"):
        method(crops=views)


def test_frozen_prototypes_stay_as_they_are_also_under_weight_decay_and_momentum(tiny_vit):
    method, views = make(tiny_vit, freeze_prototypes=0.2), batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.5)

    def step(progress):
        optimizer.zero_grad()
        method(views).loss.backward()
        method.before_step(progress)
        before = method.prototypes.weight.detach().clone()
        optimizer.step()
        return torch.equal(method.prototypes.weight, before)

    assert not step(0.5)  # gives the optimizer its moments
    for progress in (0.1, 0.2):
        assert step(progress) and method.prototypes.weight.grad is None
    assert all(p.grad is not None for p in method.head.parameters())
    assert not step(0.21) and method.prototypes.weight.grad is not None
    never = make(tiny_vit, freeze_prototypes=0.0)
    never(views).loss.backward()
    never.before_step(1e-6)
    assert never.prototypes.weight.grad is not None


def newest(out):
    """The projections of a pass as the queue is to hold them: [2, B, E], the last image first."""
    return out.extras["projection"][:2].detach().flip(1)


def steps(method, count, size=3):
    """`count` steps of one pass each; gives their outputs."""
    outs = []
    for step in range(count):
        outs.append(method(batch(1, size, seed=10 + step)))
        method.after_step(1.0)
    return outs


def test_the_queue_holds_the_images_last_seen_newest_first(tiny_vit):
    method, rows = make(tiny_vit, **QUEUE), torch.zeros(2, 0, 8, dtype=torch.float64)
    for step in range(5):
        rows = torch.cat([newest(steps(method, 1)[0]), rows], dim=1)
        filled = min(3 * (step + 1), 8)
        assert method.queued == filled and method.queue.shape == (2, 8, 8) and not method.queue.requires_grad
        torch.testing.assert_close(method.queue[:, :filled], rows[:, :filled])
        assert (method.queue[:, filled:] == 0).all()


def test_only_a_full_queue_takes_part_and_is_scored_with_the_prototypes_of_now(tiny_vit):
    method = make(tiny_vit, **QUEUE)
    for step in range(5):
        views, queue, full = batch(1, 3, seed=step), method.queue.clone(), step >= 3
        out = method(views)
        scores, prototypes = out.extras["scores"].detach(), unit_prototypes(method)
        for i in range(2):
            alone = naive_codes(scores[i])
            expected = naive_codes(scores[i], queue[i] @ prototypes.T) if full else alone
            torch.testing.assert_close(out.extras["codes"][i], expected, rtol=1e-9, atol=1e-12)
            assert not full or not expected.allclose(alone, rtol=0.01)
        method.after_step(1.0)
        method.prototypes.weight.data += 0.5 * torch.randn(6, 8)


def without_batch_norm(tiny_vit):
    """Passes of any size then give the same projections."""
    method = make(tiny_vit, **QUEUE)
    method.head[1] = nn.Identity()
    return method


def test_the_queue_moves_once_a_step_whatever_the_number_of_passes(tiny_vit):
    one, many = without_batch_norm(tiny_vit), without_batch_norm(tiny_vit)
    for step in range(3):
        views, before = batch(1, 8, seed=step), many.queue.clone()
        whole = one(views)
        for start in range(0, 8, 2):
            out = many([view[start : start + 2] for view in views])
            assert torch.equal(many.queue, before)  # all passes of a step see the old one
            for i in range(2):
                scores = out.extras["scores"][i].detach()
                earlier = before[i] @ unit_prototypes(many).T if step else None
                torch.testing.assert_close(out.extras["codes"][i], naive_codes(scores, earlier))
        for method in (one, many):
            method.after_step(1.0)
        torch.testing.assert_close(many.queue, one.queue)
        torch.testing.assert_close(one.queue, newest(whole))
        assert one.queued == many.queued == 8


@pytest.mark.parametrize("passes", [1, 3])
def test_a_queue_shorter_than_a_step_holds_its_last_images(tiny_vit, passes):
    method = make(tiny_vit, queue_length=2, queue_start=0.0)
    for _ in range(2):
        outs = [method(batch(1, 3, seed=p)) for p in range(passes)]
        method.after_step(1.0)
        torch.testing.assert_close(method.queue, newest(outs[-1])[:, :2])
        assert method.queued == 2


def test_a_pass_of_less_than_the_queue_keeps_what_the_passes_before_it_brought(tiny_vit):
    method = make(tiny_vit, queue_length=5, queue_start=0.0)
    first, last = method(batch(1, 4, seed=0)), method(batch(1, 3, seed=1))
    method.after_step(1.0)
    torch.testing.assert_close(method.queue, torch.cat([newest(last), newest(first)], dim=1)[:, :5])


def test_the_queue_starts_to_fill_at_its_share_of_the_run(tiny_vit):
    method = make(tiny_vit, queue_length=8, queue_start=0.5)
    for progress in (0.1, 0.49):
        method(batch(1, 8))
        method.after_step(progress)
        assert method.queued == 0 and (method.queue == 0).all()
    out = method(batch(1, 3, seed=5))
    method.after_step(0.5)
    assert method.queued == 3  # and nothing of the steps before
    torch.testing.assert_close(method.queue[:, :3], newest(out))


def test_the_queue_is_saved_and_restored_with_its_count(tiny_vit):
    method = make(tiny_vit, **QUEUE)
    steps(method, 2)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    restored = make(tiny_vit, **QUEUE)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored.queue, method.queue) and restored.queued == method.queued == 6
    for one, two in zip(steps(method, 3), steps(restored, 3)):
        assert torch.equal(one.loss, two.loss) and torch.equal(one.extras["codes"], two.extras["codes"])
    assert torch.equal(restored.queue, method.queue) and restored.queued == 8


def test_a_pass_that_is_not_finite_does_not_spoil_those_to_come(tiny_vit):
    method = make(tiny_vit, **QUEUE)
    steps(method, 2)
    views = batch(1, 3)
    views[0][0, 0, 0, 0] = float("nan")
    assert not method(views).loss.isfinite()
    method.after_step(1.0)
    assert method.queue.isfinite().all() and method.queued == 8
    for out in steps(method, 2):
        assert out.loss.isfinite() and out.extras["codes"].isfinite().all()


def test_without_a_queue_nothing_is_kept(tiny_vit):
    method = make(tiny_vit, queue_length=0, queue_start=0.0)
    first, second = method(batch()), steps(method, 2) and method(batch())
    torch.testing.assert_close(first.loss, second.loss)
    assert method.queued == 0 and method.queue.numel() == 0


def test_the_knobs_it_starts_with_suit_32_images_of_32_pixels(tiny_vit):
    method = SwAV(tiny_vit(img_size=32)).train()
    views = method.views()(Image.new("RGB", (40, 40), (200, 90, 30)))
    assert [tuple(v.shape[1:]) for v in views] == [(32, 32)] * 2 + [(12, 12)] * 3
    for step in range(2):
        torch.manual_seed(step)
        out = method([torch.randn(32, *view.shape) for view in views])
        out.loss.backward()
        method.before_step(1.0)
        method.after_step(1.0)
        assert out.loss.isfinite() and out.extras["codes"].shape == (2, 32, 256)
        torch.testing.assert_close(out.extras["codes"].sum(dim=2), torch.ones(2, 32))
    assert method.queued == 64 and method.queue.shape == (2, 512, 128)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("vit", [{}, NO_CLASS_TOKEN])
def test_what_is_optimised_has_a_gradient_and_decay_is_for_matrices_but_not_for_prototypes(tiny_vit, vit):
    method = make(tiny_vit, vit | {"depth": 1})
    method(batch()).loss.backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == [] and method.teacher is None
    names, groups = {id(p): n for n, p in method.named_parameters()}, method.param_groups(0.04)
    assert {names[id(p)] for group in groups for p in group["params"]} == set(names.values())
    block = "student.vit.blocks.0."
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == {
        "student.vit.patch_embed.proj.weight",
        *(block + n for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")),
        "head.0.weight",
        "head.3.weight",
    }


def test_the_head_is_the_papers(tiny_vit):
    first, norm, relu, last = make(tiny_vit).head
    assert (first.in_features, first.out_features, first.bias) == (32, 12, None)
    assert isinstance(norm, BatchNorm) and isinstance(relu, nn.ReLU)
    assert (last.in_features, last.out_features) == (12, 8) and last.bias is not None
    assert [n for n, _ in make(tiny_vit).prototypes.named_parameters()] == ["weight"]  # no bias


@pytest.mark.parametrize(("vit", "pool"), [({}, "cls"), (REGISTERS, "cls"), (NO_CLASS_TOKEN | REGISTERS, "mean")])
def test_the_embedding_is_the_class_token_or_the_mean_of_the_patches_alone(tiny_vit, vit, pool):
    method, views = make(tiny_vit, vit), batch()
    tokens, n = method.student.vit.forward_features(views[0]), method.student.vit.num_prefix_tokens
    expected = tokens[:, 0] if pool == "cls" else tokens[:, n:].mean(dim=1)
    assert method.student.pool == pool
    torch.testing.assert_close(method(views).embedding, expected.detach())
    whole = method.eval()(views[0])
    torch.testing.assert_close(whole.embedding, expected)
    assert whole.loss.item() == 0


def test_loss_and_codes_stay_in_fp32_under_autocast(tiny_vit):
    method, views = make(tiny_vit, **QUEUE).float(), [view.float() for view in batch()]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = method(views)
        method.after_step(1.0)
        assert out.loss.dtype == out.extras["codes"].dtype == out.extras["scores"].dtype == torch.float32
        assert out.loss.isfinite() and method.queue.dtype == torch.float32


def test_codes_stay_finite_at_a_low_temperature(tiny_vit):
    method, views = make(tiny_vit, epsilon=0.005, temperature=0.005).float(), [view.float() for view in batch()]
    out = method(views)
    out.loss.backward()
    assert out.loss.isfinite() and out.extras["codes"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_logs_say_how_many_prototypes_are_somebodys(tiny_vit):
    out = make(tiny_vit)(batch())
    codes = out.extras["codes"]
    assert out.logs["prototypes_used"] == len(set(codes.argmax(dim=2).flatten().tolist()))
    assert out.logs["target_max"].item() == pytest.approx(codes.amax(dim=2).mean().item())
    p = (out.extras["scores"][:2] / 0.1).softmax(dim=2).mean(dim=(0, 1))
    assert out.logs["entropy"].item() == pytest.approx(-(p * p.log()).sum().item() / torch.tensor(6.0).log().item())


@pytest.mark.parametrize(
    ("size", "patch", "count", "crop"),
    [
        (224, 16, 6, (96, 96)),
        (32, 4, 3, (12, 12)),
        (16, 4, 2, (8, 8)),
        ((32, 16), 4, 2, (12, 8)),
        ((64, 96), 16, 2, (32, 48)),
        (12, 4, 0, None),
    ],
)
def test_views_fit_the_size_of_the_images(tiny_vit, size, patch, count, crop):
    method = SwAV(tiny_vit(img_size=size, patch_size=patch), **SMALL)
    drawn = pickle.loads(pickle.dumps(method.views()))(Image.new("RGB", (30, 40)))
    large = size if isinstance(size, tuple) else (size, size)
    assert [tuple(v.shape[1:]) for v in drawn] == [large] * 2 + [crop] * count
    assert method.n_local == count and f"2 views and {count} small crops an image" in method.describe()
    assert method.masks()(torch.Generator(), torch.Generator()) == {}
    if method.student.n_patches < 100:
        assert method.train()([torch.stack([v, v]) / 255 for v in drawn]).loss.isfinite()


def test_the_number_of_small_crops_can_be_set(tiny_vit):
    for count in (0, 5):
        assert len(SwAV(tiny_vit(), **SMALL, n_local=count).views()(Image.new("RGB", (20, 20)))) == 2 + count


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_local": -1}, "n_local must be at least 0"),
        ({"n_prototypes": 1}, "n_prototypes must be at least 2"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"queue_length": -1}, "queue_length must be at least 0"),
        ({"queue_start": 1.5}, "queue_start must be between 0 and 1"),
        ({"freeze_prototypes": 1.0}, "freeze_prototypes must be between 0 and 1"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"crop_min": 0.0}, "crop_min must be between 0 and 1, 0 excluded"),
        ({"color_jitter": 1.5}, "color_jitter must be between 0 and 1"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        SwAV(tiny_vit(), **knobs)
