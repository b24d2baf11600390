"""What every method must do, whatever it computes: train all it has, keep its teacher still, repeat, slice, overfit."""

import contextlib
import copy
import pickle

import pytest
import torch
from PIL import Image
from torch import nn

import data2vec_vision as d2v
from data2vec_vision import cpu, methods
from data2vec_vision.methods.base import stack_masks
from data2vec_vision.patches import patchify
from data2vec_vision.seeding import generator
from data2vec_vision.vit import build_vit

NAMES = ["data2vec", "data2vec2", "ijepa", "mae", "msn", "swav"]
WITH_TEACHER = ["data2vec", "data2vec2", "ijepa", "msn"]
COUPLED = ["msn", "swav"]  # the images of a pass depend on each other
SMALL = {
    "msn": {"n_prototypes": 12, "head_dim": 24, "projection_dim": 16},
    "swav": {"n_prototypes": 12, "head_dim": 24, "projection_dim": 16, "queue_length": 8, "queue_start": 0.0},
}
TAU = {"tau_initial": 0.9, "tau_end": 0.99, "tau_increase_pct": 0.5}
ENCODERS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "registers alone": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "norm first and LayerScale": {"pre_norm": True, "init_values": 1e-5},
}


def make(name, dtype=torch.float64, encoder=(), **knobs):
    torch.manual_seed(0)
    vit = build_vit(**({"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2} | dict(encoder)))
    tau = TAU if name in WITH_TEACHER else {}
    return methods.find(name)(vit, **(SMALL.get(name, {}) | tau | knobs)).to(dtype).train()


def photos(count, side=16):
    """Smooth images, so that a patch can be told from its neighbours."""
    coarse = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    pixels = nn.functional.interpolate(coarse, side, mode="bicubic").clamp(-2, 2) * 60 + 128
    return [Image.fromarray(p.permute(1, 2, 0).byte().numpy()) for p in pixels]


def batch(method, count=4, seed=3):
    """Views and masks of a batch, drawn as the workers of a run draw them."""
    make_views, draw = method.views(), method.masks()
    views, samples = [], []
    for n, image in enumerate(photos(count)):
        torch.manual_seed(n)
        views.append([method.student.transform.normalized(v) for v in make_views(image)])
        samples.append(draw(generator(seed, n), generator(seed, "step")))
    dtype = next(method.parameters()).dtype
    return [torch.stack(v).to(dtype) for v in zip(*views)], stack_masks(samples) | method.shared_by_step(
        generator(seed, "step")
    )


def train_steps(method, count, first=0, total=20, optimizer=None, lr=1e-3):
    """A user's own loop; returns the losses."""
    optimizer = optimizer or torch.optim.AdamW(method.param_groups(0.05), lr)
    losses = []
    for step in range(first, first + count):
        views, masks = batch(method, seed=step)
        loss = method(views, masks=masks).loss
        optimizer.zero_grad()
        loss.backward()
        method.before_step((step + 1) / total)
        optimizer.step()
        method.after_step((step + 1) / total)
        losses.append(loss.item())
    return losses


def test_there_are_six_and_all_are_public():
    assert methods.names() == NAMES
    for name in NAMES:
        assert getattr(d2v, methods.find(name).__name__) is methods.find(name)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_is_optimised_has_a_gradient(name, encoder):
    method = make(name, encoder=ENCODERS[encoder].items())
    views, masks = batch(method)
    # The class token takes part in data2vec, MAE and I-JEPA through attention alone, so it needs two blocks.
    out = method(views, masks=masks)
    out.loss.backward()
    still = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert still == []
    grouped = [id(p) for group in method.param_groups(0.05) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    assert out.embedding.shape == (4, 32) and not out.embedding.requires_grad and out.loss.dtype == torch.float64
    assert all(not value.requires_grad and value.shape == () for value in out.logs.values())
    assert out.extras and len(out.logs) >= 2


@pytest.mark.filterwarnings("ignore:the teacher of")
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_eight_images_by_heart(name):
    """From the same views and masks each time, the loss must fall far below what is possible without the image."""
    knobs = {"color_jitter": 0.0, "blur": 0.0, "sharpening": 0.1} if name == "msn" else {}
    method = make(name, torch.float32, **knobs)
    views, masks = batch(method, count=8)
    optimizer = torch.optim.AdamW(method.param_groups(0.0), 3e-3)
    losses = []
    for _ in range(150):
        out = method(views, masks=masks)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if name in COUPLED:
            method.after_step(1.0)
        losses.append(out.loss.item())  # else the teacher rests: a fixed target can be learned
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_is_still_in_a_step_and_follows_after_it(name):
    method = make(name)
    teachers = {n: p for n, p in method.named_parameters() if n.startswith("teacher")}
    assert teachers and not any(p.requires_grad for p in teachers.values())
    students = {
        n: method.get_parameter(n.replace("teacher_head", "head").replace("teacher", "student")) for n in teachers
    }
    assert all(torch.equal(p, students[n]) for n, p in teachers.items())
    before = copy.deepcopy(teachers)
    views, masks = batch(method)
    method(views, masks=masks).loss.backward()
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1).step()
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in teachers.items())
    assert method.scheduled(0.25) == {"tau": pytest.approx(0.945)}
    method.after_step(0.25)
    for n, p in teachers.items():
        torch.testing.assert_close(p, 0.945 * before[n] + 0.055 * students[n])
    assert not any(m.training for m in method.teacher.modules())


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(COUPLED)))
def test_passes_of_two_equal_one_pass_of_eight(name):
    method = make(name)
    views, masks = batch(method, count=8)
    method.after_step(0.5)

    def gradients(size):
        method.zero_grad()
        for start in range(0, 8, size):
            part = slice(start, start + size)
            sliced = {k: m if k == "noise" else m[part] for k, m in masks.items()}
            (method([v[part] for v in views], masks=sliced).loss * size / 8).backward()
        return [p.grad.clone() for p in method.parameters() if p.requires_grad]

    for a, b in zip(gradients(2), gradients(8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_what_a_pass_sees_matters_to_methods_that_couple_images_and_they_say_so(name):
    method = make(name)
    views, masks = batch(method, count=8)
    whole = method(views, masks=masks).loss
    halves = [
        method([v[part] for v in views], masks={k: m[part] for k, m in masks.items()}).loss
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert abs(sum(halves) / 2 - whole) > 1e-6
    assert "Sinkhorn" in method.batch_statistics and "batch norm" in method.batch_statistics
    assert method.smallest_batch == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_exactly(name):
    whole = make(name)
    optimizer = torch.optim.AdamW(whole.param_groups(0.05), 1e-3)
    train_steps(whole, 3, optimizer=optimizer)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    losses = train_steps(whole, 3, first=3, optimizer=optimizer)
    again = make(name)
    optimizer = torch.optim.AdamW(again.param_groups(0.05), 1e-3)
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert train_steps(again, 3, first=3, optimizer=optimizer) == losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_bf16_gives_finite_losses_in_fp32(name):
    method = make(name, torch.float32)
    views, masks = batch(method)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = method(views, masks=masks)
        out.loss.backward()
        assert out.loss.dtype == torch.float32 and out.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
        method.after_step(0.5)
    floats = [v for k, v in out.extras.items() if v.is_floating_point()]
    assert floats and all(v.dtype == torch.float32 for v in floats)


@pytest.mark.parametrize("name", NAMES)
def test_views_and_masks_are_functions_of_their_seeds_and_travel_to_workers(name):
    method = make(name)
    make_views, draw = pickle.loads(pickle.dumps((method.views(), method.masks())))
    image = photos(1, side=30)[0]

    def sample(seed):
        torch.manual_seed(seed)
        masks = draw(generator(seed, 0), generator(seed, "step"))
        return make_views(image), masks

    (one, masks), (two, same), (other, changed) = sample(0), sample(0), sample(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert masks.keys() == same.keys() and all(torch.equal(masks[k], same[k]) for k in masks)
    assert any(not torch.equal(a, b) for a, b in zip(one, other))
    assert all(v.dtype == torch.uint8 and v.shape[0] == 3 and v.shape[1] % 4 == 0 for v in one)
    assert all(m.dtype == torch.int64 and m.min() >= 0 and m.max() < 16 for m in masks.values())
    assert not masks or any(not torch.equal(masks[k], changed[k]) for k in masks)
    assert all(torch.equal(a, b) for a, b in zip(method.shared_by_step(generator(5)).values(),
                                                 method.shared_by_step(generator(5)).values()))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_in_eval_mode_and_for_images_it_gives_the_embedding_of_the_whole_image(name):
    method = make(name)
    views, _ = batch(method)
    expected = method.student.embed(views[0])
    for out in (method(images=views[0]), method.eval()(views), method(views[0])):
        torch.testing.assert_close(out.embedding, expected)
        assert out.loss.item() == 0 and out.logs == {}
    assert method.student.pool == ("cls" if name in COUPLED else "mean")


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_cannot_be_meant_are_refused(name):
    method = make(name)
    views, _ = batch(method)
    with pytest.raises(TypeError, match=f"{type(method).__name__} takes no views named side"):
        method(views, side=views[0])
    with pytest.raises(ValueError, match="takes at least 2 views" if name in COUPLED else "takes one view"):
        method(views[0]) if name in COUPLED else method(views[0], views[0])
    with pytest.raises(ValueError, match="takes"):
        method()
    with pytest.raises(TypeError, match="no knob named depth"):
        type(method)(method.student.vit, depth=3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"swav"}))
@pytest.mark.parametrize("side", [12, 32])
def test_images_of_another_size_than_the_masks_are_refused(name, side):
    """Else a larger image would be masked in its first rows, at the places of others, and nobody would know."""
    method = make(name)
    images = torch.randn(4, 3, side, side, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=f"images of 16 x 16 pixels that the encoder was built for, got {side} x {side}"
    ):
        method(*[images] * method.fewest_views)


@pytest.mark.parametrize("name", NAMES)
def test_it_describes_itself_and_its_knobs(name):
    text = methods.explain(name)
    fields = methods.knobs(methods.find(name).Config)
    assert len(make(name).describe()) > 40
    for knob, field in fields.items():
        assert field.metadata["meaning"] in text
        assert (field.metadata["option"].replace("_", "-") or f"--set {knob}=") in text
    assert text.count("default ") >= len(fields) and text.count("the paper's") >= len(fields) - 2


@pytest.mark.parametrize("name", NAMES)
def test_a_name_builds_the_encoder_that_the_method_wants(name):
    method = methods.find(name)("vit_tiny_patch16_224", image_size=64)
    vit = method.student.vit
    assert (vit.cls_token is None) == (name == "ijepa")
    fixed = name in ("mae", "ijepa", "data2vec", "data2vec2")
    assert vit.pos_embed.requires_grad != fixed
    if fixed:  # a code for the place, zero for the class token
        prefix = vit.num_prefix_tokens
        assert not vit.pos_embed[0, :prefix].any() and vit.pos_embed[0, prefix:].norm(dim=1).std() < 1e-4
    given = build_vit("vit_tiny_patch16_224", img_size=64)
    weights = copy.deepcopy(given.state_dict())
    method = methods.find(name)(given)
    assert all(torch.equal(weights[k], v) for k, v in method.student.vit.state_dict().items())
    assert method.student.vit.pos_embed.requires_grad


def test_masks_that_differ_in_length_are_cut_to_the_shortest():
    masks = stack_masks(
        [{"keep": torch.arange(5), "query": torch.ones(2, 3)}, {"keep": torch.arange(2, 5), "query": torch.ones(2, 3)}]
    )
    assert masks["keep"].tolist() == [[0, 1, 2], [2, 3, 4]] and masks["query"].shape == (2, 2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_linear_maps_as_convolutions_train_the_same(name, monkeypatch):
    monkeypatch.setattr(cpu, "LEAST_ROWS", 1)
    monkeypatch.setattr(cpu, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 2)
    results = []
    for context in (contextlib.nullcontext(), cpu.LinearAsConvolution()):
        method = make(name, torch.float32)
        views, masks = batch(method)
        with context:
            loss = method(views, masks=masks).loss
        loss.backward()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
    (loss, gradient), (loss_as_convolution, gradient_as_convolution) = results
    assert loss_as_convolution == pytest.approx(loss, rel=1e-5)
    assert nn.functional.cosine_similarity(gradient, gradient_as_convolution, dim=0) > 0.9999


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_is_compiled_once(name):
    """A number that changes from step to step, such as the images in a queue, would compile every step anew."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    long_queue = {"queue_length": 64} if name == "swav" else {}  # not full in the eight steps
    method, counter = make(name, torch.float32, **long_queue), CompileCounter()
    forward = torch.compile(method, backend=counter)
    counts = []
    for step in range(8):
        views, masks = batch(method, seed=step if name != "ijepa" else 0)  # I-JEPA's blocks differ in size
        forward(views, masks=masks).loss.backward()
        method.zero_grad()
        method.after_step((step + 1) / 8)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[3], counts


@pytest.mark.parametrize("name", ["data2vec", "data2vec2"])
def test_passes_of_a_step_are_not_compiled_one_by_one(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    method, counter = make(name, torch.float32), CompileCounter()
    forward = torch.compile(method, backend=counter)
    views, masks = batch(method)
    for step in range(3):
        for _ in range(4):
            forward(views, masks=masks).loss.backward()
        method.after_step((step + 1) / 8)
    assert counter.frame_count <= 2


def test_reconstructions_are_of_images_that_the_masks_fit():
    method = make("mae", torch.float32)
    with pytest.raises(ValueError, match="images of 16 x 16 pixels"):
        method.reconstruct(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["data2vec", "data2vec2", "ijepa", "mae"])
def test_sequences_of_patches_are_images_too(name):
    method = make(name)
    views, masks = batch(method)
    expected = method(views, masks=masks).loss
    torch.testing.assert_close(method(patchify(views[0], 4), masks=masks).loss, expected)


def place_share(target):
    """The share of the variance of targets [B, S, D] that their place alone explains."""
    within = (target - target.mean(dim=0)).square().mean()
    return 1 - (within / (target - target.mean(dim=(0, 1))).square().mean()).item()


@pytest.mark.parametrize("name", ["data2vec", "data2vec2"])
def test_a_centred_target_tells_less_of_the_place(name):
    """Of an untrained encoder with fixed positions the place is most of the target; the running mean takes it out."""
    shares = {}
    for center in (False, True):
        method = make(name, center=center)
        methods.find(name).initialize(method.student.vit)
        method.teacher.load_state_dict(method.student.state_dict())
        views, masks = batch(method, count=16)
        for step in range(3):
            method(views, masks=masks)
            method.after_step(step / 10)
        target = method.target(views[0])
        torch.testing.assert_close(
            target.square().mean(dim=2), torch.ones(16, 16), rtol=1e-2, atol=0, check_dtype=False
        )
        shares[center] = place_share(target)
        assert ("position_mean.mean" in method.state_dict()) == center
    assert shares[False] > 0.15 and shares[True] < 0.05
