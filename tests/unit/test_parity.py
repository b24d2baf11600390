"""Our losses, targets, encoders and samplers against what other packages computed: the tables in tests/parity."""

import json
import math
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

from data2vec_vision.masking import multiblock_official, stack_masks
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.methods.data2vec2 import Data2Vec2
from data2vec_vision.methods.ijepa import IJEPA
from data2vec_vision.methods.mae import MAE
from data2vec_vision.methods.msn import MSN
from data2vec_vision.methods.swav import SwAV, swapped_prediction
from data2vec_vision.patches import sincos_position
from data2vec_vision.prototypes import sinkhorn
from data2vec_vision.vit import Encoded, fix_position

TABLES = Path(__file__).resolve().parent.parent / "parity"
OF_TABLES = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}  # the encoder in make.py


def table(name):
    return json.loads((TABLES / f"{name}.json").read_text())


def tensor(values):
    """Numbers as doubles, indices as int64."""
    read = torch.tensor(values)
    return read if read.dtype == torch.int64 else torch.tensor(values, dtype=torch.float64)


def close(ours, theirs, tolerance=1e-7):
    """Equal up to a share `tolerance`, by default what nine digits and positions in single precision leave."""
    expected = theirs if isinstance(theirs, torch.Tensor) else tensor(theirs)
    torch.testing.assert_close(ours.detach(), expected, rtol=tolerance, atol=tolerance)


def formula(name, *shape):
    """The weights of the parameter `name`, as in make.py."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return 0.5 * torch.sin(i * i * (0.3 + zlib.crc32(name.encode()) % 1000 / 1000)).view(shape)


def with_formula(method):
    """The method in double precision with every weight from `formula`; fixed positions stay as they are."""
    method.double().train()
    fixed = not method.student.vit.pos_embed.requires_grad
    for name, parameter in method.named_parameters():
        if not (fixed and name.endswith("vit.pos_embed")):
            parameter.data = formula(name, *parameter.shape)
    return method


def check_gradients(method, loss, expected):
    """Every "gradient of NAME" in the table is that of our parameter of this name."""
    names = [key.removeprefix("gradient of ") for key in expected if key.startswith("gradient of ")]
    assert len(names) >= 2
    for name, gradient in zip(names, torch.autograd.grad(loss, [method.get_parameter(n) for n in names])):
        close(gradient, expected[f"gradient of {name}"])


# Sinkhorn, SwAV, MSN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", table("sinkhorn")["cases"], ids=["more samples", "more prototypes", "one iteration"])
def test_sinkhorn_is_that_of_lightly_and_of_stable_pretraining(case):
    cosines, iterations = tensor(case["cosines"]), case["iterations"]
    ours = sinkhorn(cosines / 0.05, iterations)
    close(ours, case["lightly SwAV, epsilon 0.05"])
    close(ours, case["stable-pretraining SwAV, epsilon 0.05"], 1e-5)  # theirs are in single precision
    close(ours, case["stable-pretraining MSN, temperature 0.05"], 1e-5)
    sharpened = sinkhorn((cosines / (0.1 * 0.25)).log_softmax(dim=1), iterations)
    close(sharpened, case["lightly MSN, temperature 0.1, sharpening 0.25"])


def numbered(first, count, side):
    """Images [count, 3, side, side] that are only numbers, from `first` on."""
    return torch.arange(first, first + count, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def stand_in(features, first=0):
    """An encode() that gives image `first` + i of `numbered` row i of features [n, D] as its tokens and class token."""

    def encode(images, keep=None):
        number = images[:, 0, 0, 0].long() - first
        assert number.min() >= 0 and number.max() < len(features)
        rows = features[number].unsqueeze(1)
        return Encoded(rows, rows, [])

    return encode


@pytest.mark.parametrize("case", ["2 views", "5 views", "5 views and a queue"])
def test_swav_is_that_of_lightly_from_the_features_on(tiny_vit, case):
    """Head, prototypes, codes, loss and their gradients; small crops are predicted from, never assigned."""
    given, expected = table("swav"), table("swav")["lightly"][case]
    vit = tiny_vit(**(OF_TABLES | {"embed_dim": 8}))
    method = with_formula(SwAV(vit, n_prototypes=6, head_dim=5, projection_dim=3, queue_length=3, epsilon=0.05))
    if "queue" in case:
        method.queue = tensor(given["queue"])
        method.set_extra_state(torch.tensor(3))
    features = tensor(given["features"])[: int(case[0])].requires_grad_()
    method.student.encode = stand_in(features.flatten(0, 1))
    views = [numbered(4 * v, 4, side=8 if v < 2 else 4) for v in range(len(features))]
    loss = method.training_step(views, {}).loss
    close(loss, expected["loss"])
    of_features, of_prototypes = torch.autograd.grad(loss, [features, method.prototypes.weight])
    close(of_features, expected["gradient of features"])
    close(of_prototypes, expected["gradient of prototypes"])


def test_the_swapped_prediction_is_that_of_stable_pretraining():
    """Theirs balances both views in one go, which is not SwAV; with codes made so the losses agree."""
    given = table("swav")
    z = F.normalize(tensor(given["projections"]), dim=2)
    scores = z @ F.normalize(formula("prototypes.weight", 6, 3), dim=1).T
    codes = sinkhorn(scores.flatten(0, 1) / 0.05).view_as(scores)
    close(swapped_prediction((scores / 0.1).log_softmax(dim=2), codes), given["stable_pretraining"], 1e-5)


@pytest.mark.parametrize("case", table("msn")["cases"], ids=lambda case: str(list(case["knobs"].values())))
def test_msn_is_that_of_lightly_from_the_features_on(tiny_vit, case):
    """Heads, prototypes, sharpened and balanced targets, cross entropy, mean entropy; and their gradients."""
    given = table("msn")
    vit = tiny_vit(**(OF_TABLES | {"embed_dim": 8}))
    method = with_formula(MSN(vit, n_prototypes=6, head_dim=5, projection_dim=3, **case["knobs"]))
    features, target_features = tensor(given["features"]).requires_grad_(), tensor(given["target_features"])
    method.student.encode, method.teacher.encode = stand_in(features.flatten(0, 1)), stand_in(target_features, 16)
    views = [numbered(0, 4, 8), numbered(16, 4, 8), *(numbered(first, 4, 4) for first in (4, 8, 12))]
    loss = method.training_step(views, {"keep": torch.zeros(4, 1, dtype=torch.int64)}).loss
    close(loss, case["loss"])
    of_features, of_prototypes = torch.autograd.grad(loss, [features, method.prototypes.weight])
    close(of_features, case["gradient of features"])
    close(of_prototypes, case["gradient of prototypes"])


# Positions, MAE, I-JEPA ------------------------------------------------------------------------------------------


def test_positions_are_those_of_lightly_transformers_and_stable_pretraining():
    given = table("sincos")
    close(sincos_position((4, 4), 16).double(), given["lightly"]["4 x 4, 16"], 2e-7)
    close(sincos_position((3, 3), 8).double(), given["lightly"]["3 x 3, 8"], 2e-7)
    columns_first = sincos_position(tuple(given["grid"]), 12).double()
    rows_first = columns_first.roll(6, dims=1)  # the others' functions begin with the row, MAE's with the column
    close(rows_first, given["transformers_row_first"], 2e-7)
    close(rows_first, given["stable_pretraining_row_first"], 2e-7)


@pytest.mark.parametrize("case", ["normalized", "plain"])
def test_mae_is_that_of_transformers(tiny_vit, case):
    """Encoder, decoder, positions, mask token, target and loss; reconstructed images; gradients."""
    given, expected = table("mae"), table("mae")["cases"][case]
    vit = tiny_vit(**OF_TABLES)
    fix_position(vit)
    knobs = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 3}
    method = with_formula(MAE(vit, norm_pix=case == "normalized", **knobs))
    images, query = tensor(given["images"]), tensor(given["query"])
    keep = torch.stack([torch.tensor([s for s in range(16) if s not in hidden]) for hidden in query.tolist()])
    masks = {"keep": keep, "query": query}
    out = method(images, masks=masks)
    close(out.loss, expected["loss"])
    check_gradients(method, out.loss, expected)
    theirs = tensor(expected["image"])
    if case == "plain":
        close(method.reconstruct(images, masks)[0], theirs)
    else:  # theirs stays normalised
        patches = F.unfold(theirs, 2, stride=2).transpose(1, 2)
        close(out.extras["prediction"], patches.gather(1, query.unsqueeze(-1).expand(-1, -1, 12)))


def test_ijepa_is_that_of_transformers_and_lightly(tiny_vit):
    """Encoder with and without hidden patches, the predictor's rows, the target's second norm, loss, gradients."""
    given = table("ijepa")
    vit = tiny_vit(**OF_TABLES, class_token=False, global_pool="avg")
    fix_position(vit)
    method = with_formula(
        IJEPA(
            vit, targets="blocks", target_output="last", center=False, n_targets=3, predictor_dim=12, predictor_depth=1
        )
    )
    images, keep, query = (tensor(given[name]) for name in ("images", "keep", "query"))
    close(method.teacher.encode(images).tokens, given["features"])
    out = method(images, masks={"keep": keep, "query": query})
    close(out.extras["prediction"], given["prediction"])
    close(out.loss, given["loss"])
    check_gradients(method, out.loss, given)


@pytest.fixture(scope="module")
def sampled():
    """Masks of the official sampler: 600 images, each a step of its own, and 40 steps of a batch."""
    given, own, shared = table("multiblock"), Generator().manual_seed(0), Generator().manual_seed(1)
    grid = (given["side"], given["side"])

    def draw(images):
        step = shared.get_state()  # the same numbers for all images of a step
        for _ in range(images):
            shared.set_state(step)
            context, targets = multiblock_official(grid, 4, own, shared)
            yield {"keep": context, "query": targets}

    singles = [masks for _ in range(600) for masks in draw(1)]
    return given, singles, [stack_masks(list(draw(given["batch"]))) for _ in range(40)]


def alike(values, theirs):
    """Whether the mean of `values` is the one in the table, up to five standard errors of both."""
    values = torch.tensor(values, dtype=torch.float64)
    error = theirs["deviation"] * math.sqrt(1 / len(values) + 1 / theirs["count"])
    return abs(values.mean().item() - theirs["mean"]) < 5 * error


def test_official_blocks_of_ijepa_have_the_sizes_of_lightlys(sampled):
    given, singles, _ = sampled
    side = given["side"]
    found = Counter()
    for masks in singles:
        first, last = masks["query"][0, 0], masks["query"][0, -1]
        found[f"{last // side - first // side + 1} x {last % side - first % side + 1}"] += 1
    assert set(found) == set(given["sizes"])
    for size, theirs in given["sizes"].items():
        error = math.sqrt(theirs * (1 - theirs) * (1 / len(singles) + 1 / given["singles"]))
        assert abs(found[size] / len(singles) - theirs) < 5 * error, size
    assert alike([masks["query"].shape[1] for masks in singles], given["target_patches"])
    assert alike([len(masks["query"].unique()) for masks in singles], given["union_of_targets"])
    assert alike([len(masks["keep"]) for masks in singles], given["context_patches"])


def test_official_batches_of_ijepa_lose_the_patches_that_lightlys_lose(sampled):
    """Contexts are cut to the shortest from the bottom, and the last row and column are never seen or aimed at."""
    given, _, batches = sampled
    side, images = given["side"], given["batch"] * len(batches)
    assert alike([masks["keep"].shape[1] for masks in batches], given["context_patches_of_a_batch"])
    for name, what in (("keep", "context"), ("query", "targets")):
        counts = sum(torch.bincount(masks[name].flatten(), minlength=side**2) for masks in batches).view(side, side)
        for axis, by in ((1, "row"), (0, "column")):
            ours, theirs = counts.sum(axis) / images, tensor(given[f"{what}_by_{by}"])
            assert (ours[-1], theirs[-1]) == (0, 0)
            assert (ours - theirs).abs().max() < 0.1 * theirs.max()


# data2vec, data2vec 2.0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", table("data2vec")["cases"], ids=lambda case: str(list(case["knobs"].values())))
def test_data2vec_is_the_formula_on_the_encoder_of_transformers(tiny_vit, case):
    given = table("data2vec")
    method = with_formula(Data2Vec(tiny_vit(**OF_TABLES), **case["knobs"]))
    out = method(tensor(given["images"]), masks={"query": tensor(given["query"])})
    close(out.extras["target"], case["target"])
    close(out.extras["prediction"], given["prediction"])
    close(out.loss, case["loss"])
    check_gradients(method, out.loss, case)


def test_data2vec2_is_the_formula_on_the_encoder_of_transformers(tiny_vit):
    """Several masks an image, the convolutions, the scale of the loss and the share of the class token in it."""
    given = table("data2vec2")
    vit = tiny_vit(**OF_TABLES)
    fix_position(vit)
    knobs = {"n_masks": 2, "decoder_dim": 32, "decoder_depth": 2, "class_token_weight": given["class_token_weight"]}
    method = with_formula(Data2Vec2(vit, **knobs))
    images, keep, query = (tensor(given[name]) for name in ("images", "keep", "query"))
    close(method.target(images), given["target"])
    out = method(images, masks={"keep": keep, "query": query, "noise": 0.01 * formula("noise", 1, 16, 16)})
    close(out.extras["prediction"], given["prediction"])
    close(out.loss, given["loss"])
    check_gradients(method, out.loss, given)
