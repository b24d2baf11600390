"""data2vec against naive code: its target, its loss, its teacher; and what a user's own loop can rely on."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import data2vec_vision as d2v
from data2vec_vision.errors import InputError
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.patches import take

TAU = {"tau_initial": 0.9, "tau_end": 0.99, "tau_increase_pct": 0.5}


def make(tiny_vit, **knobs):
    vit_arguments = {name: knobs.pop(name) for name in ("proj_drop_rate", "drop_path_rate", "depth") if name in knobs}
    torch.manual_seed(0)
    method = Data2Vec(tiny_vit(**vit_arguments), **(TAU | knobs)).double()
    for p in method.student.parameters():
        nn.init.normal_(p, std=0.2)
    for p in method.teacher.parameters():
        nn.init.normal_(p, std=0.2)
    return method.train()


def batch(size=4):
    torch.manual_seed(1)
    return torch.randn(size, 3, 16, 16, dtype=torch.float64)


def queries(method, size=4, seed=0):
    generator, draw = torch.Generator().manual_seed(seed), method.masks()
    return torch.stack([draw(generator, generator)["query"] for _ in range(size)])


def naive_target(method, images, query):
    """Block by block and number by number, from hooks on the teacher's modules."""
    states, vit = [], method.teacher.vit
    for block in list(vit.blocks)[-(method.config.top_k_blocks or len(vit.blocks)) :]:
        module = block.mlp if method.config.target_output == "ffn" else block
        hook = module.register_forward_hook(lambda m, x, y: states.append(y.detach().clone()))
        vit.forward_features(images)
        hook.remove()
    result = torch.zeros(len(images), query.shape[1], vit.embed_dim, dtype=torch.float64)
    for b in range(len(images)):
        total = torch.zeros(16, vit.embed_dim, dtype=torch.float64)
        for state in states:
            h = state[b, 1:]
            if method.config.target_norm == "instance":  # each channel over the patches of the image
                total += torch.stack([(c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() for c in h.T]).T
            else:  # each patch over its channels
                total += torch.stack([(t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() for t in h])
        mean = total / len(states)
        for q, patch in enumerate(query[b]):
            t = mean[patch]
            result[b, q] = (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt()
    return result


@pytest.mark.parametrize("output", ["ffn", "block"])
@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize("k", [1, 2, None])
def test_target_equals_naive_code(tiny_vit, output, norm, k):
    method = make(tiny_vit, target_output=output, target_norm=norm, top_k_blocks=k)
    images, query = batch(), queries(method)
    target = take(method.target(images), query)
    assert not target.requires_grad
    torch.testing.assert_close(target, naive_target(method, images, query), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [2.0, 0.1])
def test_loss_equals_naive_code(tiny_vit, beta):
    method = make(tiny_vit, beta=beta)
    images, query = batch(), queries(method)
    out = method(images, masks={"query": query})
    target = naive_target(method, images, query)
    total = count = 0
    for b in range(4):
        tokens = method.student.encode(images[b : b + 1], query=query[b : b + 1]).tokens[0]
        for q, patch in enumerate(query[b]):
            for e in (method.regressor(tokens[patch]) - target[b, q]).tolist():
                total += e * e / (2 * beta) if abs(e) < beta else abs(e) - beta / 2
                count += 1
    assert out.loss.item() == pytest.approx(total / count, rel=1e-9)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()


def test_the_loss_ignores_what_is_predicted_at_patches_that_were_seen(tiny_vit):
    method = make(tiny_vit)
    images, query = batch(), queries(method)
    before = method(images, masks={"query": query}).loss
    encode, seen = method.student.encode, torch.ones(4, 16, dtype=torch.bool).scatter(1, query, False)

    def disturbed(*args, **kwargs):
        encoded = encode(*args, **kwargs)
        return encoded._replace(tokens=torch.where(seen.unsqueeze(-1), encoded.tokens + 100, encoded.tokens))

    method.student.encode = disturbed
    assert torch.equal(method(images, masks={"query": query}).loss, before)


def test_the_student_does_not_see_the_hidden_patches_and_the_teacher_sees_all(tiny_vit):
    method = make(tiny_vit)
    images, query = batch(), queries(method)
    hidden = torch.zeros(4, 16, dtype=torch.bool).scatter(1, query, True)
    cells = hidden.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(cells, torch.randn_like(images), images)
    one, two = method(images, masks={"query": query}), method(changed, masks={"query": query})
    assert torch.equal(one.extras["prediction"], two.extras["prediction"])
    assert not torch.equal(one.extras["target"], two.extras["target"])


def test_masks_hide_the_share_asked_for(tiny_vit):
    assert queries(make(tiny_vit, mask_ratio=0.6)).shape == (4, 10)
    assert queries(make(tiny_vit, mask_ratio=0.001)).shape == (4, 1)
    assert queries(make(tiny_vit, mask_ratio=0.999)).shape == (4, 15)


def test_four_passes_of_16_equal_one_pass_of_64(tiny_vit):
    """Every image has the same number of hidden patches, so the mean of means is the mean."""
    method = make(tiny_vit)
    images, query = batch(64), queries(method, 64)

    method.after_step(0.5)  # as a loop would have

    def gradients(size):
        method.zero_grad()
        for start in range(0, 64, size):
            part = slice(start, start + size)
            (method(images[part], masks={"query": query[part]}).loss * size / 64).backward()
        return [p.grad for p in method.parameters() if p.requires_grad]

    for a, b in zip(gradients(16), gradients(64)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_predictions_and_loss_stay_in_fp32_under_autocast(tiny_vit):
    method = make(tiny_vit).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch().float())
    assert out.loss.dtype == out.extras["prediction"].dtype == out.extras["target"].dtype == torch.float32


def test_the_teacher_makes_no_noise_takes_no_gradient_and_is_not_decayed(tiny_vit):
    method = make(tiny_vit, proj_drop_rate=0.5, drop_path_rate=0.5)
    images = batch()
    assert method.training and method.student.training and not method.teacher.training
    assert not any(m.training for m in method.teacher.modules())
    assert torch.equal(method.target(images), method.target(images))
    method(images).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    optimized = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert optimized == {id(p) for p in method.parameters() if p.requires_grad}
    assert not optimized & {id(p) for p in method.teacher.parameters()}


def test_every_parameter_that_is_optimised_has_a_gradient(tiny_vit):
    method = make(tiny_vit)
    method(batch()).loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_decayed_parameters_are_the_matrices(tiny_vit):
    """Not the position embedding, the class token, biases and norms; the mask token, as in the official code."""
    method = make(tiny_vit, depth=1)
    names = {id(p): n for n, p in method.named_parameters()}
    decayed = {names[id(p)] for group in method.param_groups(0.05) if group["weight_decay"] for p in group["params"]}
    block = "student.vit.blocks.0."
    assert decayed == {
        "student.mask_token",
        "student.vit.patch_embed.proj.weight",
        *(block + n for n in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")),
        "regressor.weight",
    }


def test_after_step_moves_the_teacher_once_by_the_tau_of_the_step(tiny_vit):
    method = make(tiny_vit)
    for progress, tau in ((0.1, 0.918), (0.25, 0.945), (0.5, 0.99), (1.0, 0.99)):
        old = copy.deepcopy(method.teacher)
        method.after_step(progress)
        assert method.scheduled(progress)["tau"] == pytest.approx(tau)
        for t, o, s in zip(method.teacher.parameters(), old.parameters(), method.student.parameters()):
            torch.testing.assert_close(t, tau * o + (1 - tau) * s)


def test_the_teacher_starts_as_the_student(tiny_vit):
    method = Data2Vec(tiny_vit())
    assert all(torch.equal(t, s) for t, s in zip(method.teacher.parameters(), method.student.parameters()))


@pytest.mark.parametrize("clear", ["last", "first", "to zero"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loop_that_forgets_after_step_is_warned_once(tiny_vit, clear, fused):
    method = make(tiny_vit).float()
    optimizer = torch.optim.AdamW(method.parameters(), fused=fused)

    def step(after):
        losses = []
        for _ in range(2):  # accumulation: no warning between the passes
            losses.append(method(batch().float()).loss)
            if clear != "first":
                losses[-1].backward()
        if clear == "first":
            optimizer.zero_grad()
            sum(losses).backward()
        optimizer.step()
        if clear != "first":
            optimizer.zero_grad(set_to_none=clear == "last")
        if after:
            method.after_step(0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(after=False)
    with pytest.warns(UserWarning, match=r"the teacher of Data2Vec has not moved: call after_step"):
        step(after=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(after=False)
    method = make(tiny_vit).float()
    optimizer = torch.optim.AdamW(method.parameters(), fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(after=True)


def test_in_eval_mode_it_gives_the_embedding_of_the_whole_image(tiny_vit):
    method, images = make(tiny_vit).eval(), batch()
    out = method(images)
    torch.testing.assert_close(out.embedding, method.student.vit.forward_features(images)[:, 1:].mean(1))
    assert out.loss.item() == 0


def test_it_learns_to_predict_better_than_a_constant(tiny_vit):
    """Smooth images, so that hidden patches can be told from their neighbours."""
    method = Data2Vec(tiny_vit(), **TAU).train()
    optimizer, generator = torch.optim.AdamW(method.parameters(), 3e-3), torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(64, 3, 2, 2, generator=generator), 16, mode="bilinear")
    for step in range(200):
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step((step + 1) / 200)
    prediction, target = out.extras["prediction"], out.extras["target"]
    r2 = 1 - (prediction - target).square().mean() / target.var(dim=(0, 1)).mean()
    assert r2 > 0.15 and out.logs["target_std"] > 0.5


def test_views_and_masks_travel_to_workers(tiny_vit):
    from PIL import Image

    method = make(tiny_vit)
    views, masks = pickle.loads(pickle.dumps((method.views(), method.masks())))
    [view] = views(Image.new("RGB", (30, 40)))
    assert view.dtype == torch.uint8 and view.shape == (3, 16, 16)
    assert masks(torch.Generator(), torch.Generator())["query"].shape == (10,)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k_blocks": 4}, "--k 4 is more than the 3 blocks of the encoder; use --k 3"),
        ({"mask_ratio": 0.0}, "--mask-erase-pct must be between 0 and 1"),
        ({"mask_ratio": 60}, "use 0.6 for 60 %"),
        ({"tau_end": 1.2}, "--tau-end must be between 0 and 1"),
        ({"target_norm": "batch"}, "target_norm must be instance or layer, got 'batch'"),
        ({"crop_min": 0}, "crop_min must be between 0 and 1, 0 excluded"),
    ],
)
def test_knobs_out_of_range_are_refused(tiny_vit, knobs, message):
    with pytest.raises(InputError, match=message):
        Data2Vec(tiny_vit(), **knobs)


def test_unknown_knobs_and_encoders_without_ffn_are_refused(tiny_vit):
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    with pytest.raises(TypeError, match="Data2Vec has no knob named mask_ration"):
        Data2Vec(tiny_vit(), mask_ration=0.5)
    vit = VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2, block_fn=ParallelScalingBlock)
    with pytest.raises(InputError, match="target_output=block"):
        Data2Vec(vit)
    Data2Vec(vit, target_output="block")(torch.randn(2, 3, 16, 16)).loss.backward()


def test_it_is_public_and_builds_from_a_name():
    method = d2v.Data2Vec(encoder="vit_tiny_patch16_224", image_size=32, top_k_blocks=6, mask_ratio=0.6)
    assert method.student.grid == (2, 2) and method(torch.randn(1, 3, 32, 32)).loss.requires_grad


@pytest.mark.parametrize("kind", [d2v.Data2Vec, d2v.Data2Vec2])
def test_an_encoder_built_by_name_starts_as_maes(kind):
    """Fixed positions and Xavier's weights, from which data2vec begins to learn sooner."""
    vit = kind("vit_tiny_patch16_224", image_size=64).student.vit
    assert not vit.pos_embed.requires_grad and vit.pos_embed[:, 1:].abs().mean() > 0.5
    weight = vit.blocks[0].mlp.fc1.weight
    bound = (6 / (192 + 768)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
