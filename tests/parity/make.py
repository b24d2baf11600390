"""Runs other packages on fixed inputs and writes what they compute into this folder, for tests/unit/test_parity.py.

    make parity

needs the packages of the extra `parity`; the test needs none of them, it only reads the tables. README.md tells what
each table is. Inputs are rounded before they are used and stored with the results, so that nobody has to draw
them again. Weights would fill the tables: they come from `formula`, which the test repeats.

Shapes: B images, V views, S patches, K kept, Q queried, M masks or target blocks, D width, C prototypes.
"""

import json
import math
import zlib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from lightly.data.ijepa_collate import IJEPAMaskCollator
from lightly.loss import MSNLoss, SwaVLoss, msn_loss, swav_loss
from lightly.models.modules.heads import MSNProjectionHead, SwaVProjectionHead
from lightly.models.modules.ijepa_timm import IJEPAPredictorTIMM
from lightly.models.utils import get_2d_sincos_pos_embed as lightly_sincos
from stable_pretraining.backbone.pos_embed import get_2d_sincos_pos_embed as spt_sincos
from stable_pretraining.losses import SwAVLoss
from stable_pretraining.losses.utils import sinkhorn_knopp
from torch.nn import functional as F
from transformers import (
    IJepaConfig,
    IJepaModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNModel,
)
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding as transformers_sincos

FOLDER = Path(__file__).resolve().parent

# One encoder for all tables: images of 8 px in 4 x 4 patches.
SIDE, PATCH, GRID, S, D, HEADS, DEPTH, DECODER_WIDTH = 8, 2, 4, 16, 16, 2, 2, 12
ENCODER = {
    "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * D,
    "image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6,
}  # fmt: skip


def given(seed, *shape):
    """Normal random numbers of four digits after the point."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(1e4).round() / 1e4
    )


def formula(name, *shape):
    """The weights of the parameter `name`: without chance, and of full rank. The test has the same lines."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return 0.5 * torch.sin(i * i * (0.3 + zlib.crc32(name.encode()) % 1000 / 1000)).view(shape)


def fill(parameter, name):
    parameter.data = formula(name, *parameter.shape)


def fill_module(module, name):
    """Every parameter of `module` as if it were called `name` here, with the same names below it."""
    for below, parameter in module.named_parameters():
        if parameter.requires_grad:
            fill(parameter, f"{name}.{below}")


def short(value):
    """Nested lists of numbers with nine digits."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, dict):
        return {key: short(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [short(below) for below in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def write(name, packages, **values):
    """A table, one line a value."""
    values = {"made_by": {package: version(package) for package in ("torch", *packages)}} | values
    lines = [f"{json.dumps(key)}: {json.dumps(short(value), separators=(',', ':'))}" for key, value in values.items()]
    path = FOLDER / f"{name}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.name:<16} {path.stat().st_size / 1000:5.1f} kB")


def loss_and_gradients(loss, **tensors):
    """{"loss": .., "gradient of NAME": ..} for tensors that take one."""
    gradients = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    return {"loss": loss.item()} | {f"gradient of {name}": g for name, g in zip(tensors, gradients)}


# Sinkhorn --------------------------------------------------------------------------------------------------------


def make_sinkhorn():
    cases = []
    for samples, prototypes, iterations in ((7, 5, 3), (3, 8, 3), (7, 5, 1)):
        cosines = given(samples, samples, prototypes).tanh().mul(1e4).round() / 1e4
        probabilities = msn_loss.sharpen((cosines / 0.1).softmax(dim=1), temperature=0.25)
        case = {"cosines": cosines, "iterations": iterations}
        case["lightly SwAV, epsilon 0.05"] = swav_loss.sinkhorn(cosines, iterations, epsilon=0.05)
        case["lightly MSN, temperature 0.1, sharpening 0.25"] = msn_loss.sinkhorn(probabilities, iterations)
        case["stable-pretraining SwAV, epsilon 0.05"] = SwAVLoss(sinkhorn_iterations=iterations).sinkhorn(cosines)
        case["stable-pretraining MSN, temperature 0.05"] = sinkhorn_knopp(cosines, 0.05, samples, iterations)
        cases.append(case)
    write("sinkhorn", ("lightly", "stable-pretraining"), cases=cases)


# SwAV ------------------------------------------------------------------------------------------------------------


def lightly_head(head, name):
    """A projection head of lightly in double precision; its layers are numbered as ours are."""
    fill_module(head.layers.double(), name)
    return head.train()


def make_swav():
    V, B, C, width, hidden, out, queue = 5, 4, 6, 8, 5, 3, 3
    features = given(1, V, B, width)
    prototypes = F.normalize(formula("prototypes.weight", C, out), dim=1).requires_grad_()
    queued = F.normalize(given(2, 2, queue, out), dim=2)
    cases = {}
    for name, views in (("2 views", 2), ("5 views", V), ("5 views and a queue", V)):
        head = lightly_head(SwaVProjectionHead(width, hidden, out), "head")
        inputs = features[:views].clone().requires_grad_()
        z = F.normalize(head(inputs.flatten(0, 1)), dim=1)  # all crops at once, as in the original code
        scores = list((z @ prototypes.T).view(views, B, C))
        queue_scores = [q @ prototypes.T for q in queued] if "queue" in name else None
        loss = SwaVLoss()(scores[:2], scores[2:], queue_scores)
        cases[name] = loss_and_gradients(loss.squeeze(), features=inputs, prototypes=prototypes)
    layer = torch.nn.Linear(out, C, bias=False).double()
    fill(layer.weight, "prototypes.weight")
    pair = given(3, 2, B, out)
    write(
        "swav", ("lightly", "stable-pretraining"), features=features, queue=queued, lightly=cases, projections=pair,
        stable_pretraining=SwAVLoss()(pair[0], pair[1], layer).item(),
    )  # fmt: skip


# MSN -------------------------------------------------------------------------------------------------------------


def make_msn():
    V, B, C, width, hidden, out = 4, 4, 6, 8, 5, 3
    features, target_features = given(4, V, B, width), given(5, B, width)
    prototypes = formula("prototypes.weight", C, out).requires_grad_()
    settings = [
        {"temperature": 0.1, "sharpening": 0.25, "sinkhorn": True, "mean_entropy_weight": 1.0},
        {"temperature": 0.1, "sharpening": 0.25, "sinkhorn": False, "mean_entropy_weight": 1.0},
        {"temperature": 0.1, "sharpening": 0.25, "sinkhorn": True, "mean_entropy_weight": 0.0},
        {"temperature": 0.3, "sharpening": 0.5, "sinkhorn": False, "mean_entropy_weight": 3.0},
    ]
    cases = []
    for knobs in settings:
        head, teacher_head = MSNProjectionHead(width, hidden, out), MSNProjectionHead(width, hidden, out)
        lightly_head(head, "head"), lightly_head(teacher_head, "teacher_head")
        inputs = features.clone().requires_grad_()
        # The head runs once a resolution: the masked anchor, then all small crops, as in the original code.
        anchors = torch.cat([head(inputs[0]), head(inputs[1:].flatten(0, 1))])
        loss = MSNLoss(knobs["temperature"], 3 if knobs["sinkhorn"] else 0, knobs["mean_entropy_weight"])(
            anchors, teacher_head(target_features).detach(), prototypes, knobs["sharpening"]
        )
        cases.append({"knobs": knobs} | loss_and_gradients(loss, features=inputs, prototypes=prototypes))
    write("msn", ("lightly",), features=features, target_features=target_features, cases=cases)


# Positions -------------------------------------------------------------------------------------------------------


def make_sincos():
    square = {f"{n} x {n}, {dim}": lightly_sincos(dim, n, cls_token=False).tolist() for n, dim in ((4, 16), (3, 8))}
    rows, columns, dim = 2, 5, 12
    write(
        "sincos", ("lightly", "transformers", "stable-pretraining"), lightly=square, grid=[rows, columns],
        transformers_row_first=transformers_sincos(rows, columns, dim),
        stable_pretraining_row_first=spt_sincos(dim, (rows, columns)),
    )  # fmt: skip


def fixed_position(dim, n_prefix):
    """[1, N + S, dim] of transformers, halves turned as its ViTMAE turns them for MAE's checkpoints."""
    position = transformers_sincos(GRID, GRID, dim).roll(dim // 2, dims=1)
    return torch.cat([torch.zeros(n_prefix, dim), position]).unsqueeze(0).double()


# Weights of transformers' encoders by the names of timm's ---------------------------------------------------------

PARTS = {
    "layernorm_before": "norm1", "attention.o_proj": "attn.proj", "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def fill_blocks(layers, name):
    for index, layer in enumerate(layers):
        for theirs, ours in PARTS.items():
            fill_module(layer.get_submodule(theirs), f"{name}.{index}.{ours}")
        width = layer.attention.q_proj.in_features
        weight = formula(f"{name}.{index}.attn.qkv.weight", 3 * width, width)
        bias = formula(f"{name}.{index}.attn.qkv.bias", 3 * width)
        projections = layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj
        for projection, w, b in zip(projections, weight.chunk(3), bias.chunk(3)):
            projection.weight.data, projection.bias.data = w, b


def fill_encoder(model, name, position=None):
    """An encoder of transformers with the weights of the timm model that is called `name` here."""
    model.double().eval()
    embeddings = model.embeddings
    fill_module(embeddings.patch_embeddings.projection, f"{name}.patch_embed.proj")
    if position is None:
        fill(embeddings.position_embeddings, f"{name}.pos_embed")
    else:
        embeddings.position_embeddings.data = position
    if hasattr(embeddings, "cls_token"):
        fill(embeddings.cls_token, f"{name}.cls_token")
    fill_blocks(model.layers, f"{name}.blocks")
    fill_module(model.layernorm, f"{name}.norm")
    return model


# MAE -------------------------------------------------------------------------------------------------------------


def make_mae():
    images = given(6, 2, 3, SIDE, SIDE)
    noise = torch.stack([given(n, S).argsort().argsort() / S for n in (7, 8)])
    cases = {}
    for normalized in (True, False):
        config = ViTMAEConfig(
            **ENCODER, mask_ratio=0.75, norm_pix_loss=normalized, decoder_hidden_size=DECODER_WIDTH,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=4 * DECODER_WIDTH,
        )  # fmt: skip
        model = ViTMAEForPreTraining(config).double()
        fill_encoder(model.vit, "student.vit", fixed_position(D, 1))
        decoder = model.decoder
        decoder.decoder_pos_embed.data = fixed_position(DECODER_WIDTH, 1)
        fill(decoder.mask_token, "decoder.mask_token")
        fill_module(decoder.decoder_embed, "embed")
        fill_blocks(decoder.decoder_layers, "decoder.blocks")
        fill_module(decoder.decoder_norm, "decoder.norm")
        # Their head gives a patch as (row, column, channel), ours as (channel, row, column).
        order = torch.arange(3 * PATCH**2).view(3, PATCH, PATCH).permute(1, 2, 0).flatten()
        decoder.decoder_pred.weight.data = formula("head.weight", 3 * PATCH**2, DECODER_WIDTH)[order]
        decoder.decoder_pred.bias.data = formula("head.bias", 3 * PATCH**2)[order]
        out = model(images, noise=noise)
        parameters = {
            "student.vit.cls_token": model.vit.embeddings.cls_token,
            "student.vit.patch_embed.proj.weight": model.vit.embeddings.patch_embeddings.projection.weight,
            "decoder.mask_token": decoder.mask_token,
        }
        case = loss_and_gradients(out.loss, **parameters)
        hidden = out.mask.unsqueeze(-1)
        case["image"] = model.unpatchify(out.logits * hidden + model.patchify(images) * (1 - hidden))
        cases["normalized" if normalized else "plain"] = case
    hidden = out.mask.nonzero()[:, 1].view(2, -1)
    write("mae", ("transformers",), images=images, query=hidden, cases=cases)


# I-JEPA ----------------------------------------------------------------------------------------------------------


def forward_kept(model, images, keep):
    """An IJepaModel over the patches of `keep` [B, K] only, which transformers has no option for."""
    x = model.embeddings(images)
    x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, D))
    for layer in model.layers:
        x = layer(x, None)
    return model.layernorm(x)


def layer_norm(x):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (x - mean).square().sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5).sqrt()


def smooth_l1(prediction, target, beta):
    e = (prediction - target).abs()
    return torch.where(e < beta, e * e / (2 * beta), e - beta / 2).sum() / e.numel()


def make_ijepa():
    images = given(9, 2, 3, SIDE, SIDE)
    keep = torch.tensor([[0, 3, 6, 9, 15], [1, 2, 7, 12, 14]])
    blocks = [[1, 2, 5, 6], [8, 9, 12, 13], [5, 6, 9, 10]], [[0, 1, 4, 5], [9, 10, 13, 14], [10, 11, 14, 15]]
    query = torch.tensor(blocks)  # [B, M, Q], some of it kept too
    student = fill_encoder(IJepaModel(IJepaConfig(**ENCODER)), "student.vit", fixed_position(D, 0))
    teacher = fill_encoder(IJepaModel(IJepaConfig(**ENCODER)), "teacher.vit", fixed_position(D, 0))
    predictor = IJEPAPredictorTIMM(S, 1, D, DECODER_WIDTH, HEADS).double()
    fill_module(predictor.predictor_embed, "embed")
    fill_module(predictor.decoder, "predictor")
    fill_module(predictor.predictor_proj, "head")
    with torch.no_grad():
        features = teacher(images).last_hidden_state
    target = layer_norm(features).gather(1, query.flatten(1).unsqueeze(-1).expand(-1, -1, D)).view(2, 3, 4, D)
    context = forward_kept(student, images, keep)
    predicted = predictor(context, keep, list(query.unbind(1)))  # block by block: [M * B, Q, D]
    prediction = predicted.view(3, 2, 4, D).transpose(0, 1)
    parameters = {
        "student.vit.patch_embed.proj.bias": student.embeddings.patch_embeddings.projection.bias,
        "predictor.mask_token": predictor.decoder.mask_token,
        "head.bias": predictor.predictor_proj.bias,
    }
    write(
        "ijepa", ("transformers", "lightly"), images=images, keep=keep, query=query, features=features,
        prediction=prediction, **loss_and_gradients(smooth_l1(prediction, target, 1.0), **parameters),
    )  # fmt: skip


# data2vec --------------------------------------------------------------------------------------------------------


def states(model, images, output):
    """What every block of an encoder makes of images, prefix tokens dropped: a list of [B, S, D]."""
    found = []
    modules = [layer.mlp if output == "ffn" else layer for layer in model.layers]
    hooks = [module.register_forward_hook(lambda m, x, y: found.append(y)) for module in modules]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [x[:, -S:] for x in found]


def instance_norm(x):
    """Each channel over the patches of its image."""
    return layer_norm(x.transpose(1, 2)).transpose(1, 2)


def at(x, index):
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def make_data2vec():
    images = given(10, 2, 3, SIDE, SIDE)
    query = torch.tensor([[1, 2, 5, 6, 11, 15], [0, 4, 8, 9, 10, 13]])
    student = ViTMSNModel(ViTMSNConfig(**ENCODER), use_mask_token=True)
    fill_encoder(student, "student.vit")
    fill(student.embeddings.mask_token, "student.mask_token")
    teacher = fill_encoder(ViTMSNModel(ViTMSNConfig(**ENCODER)), "teacher.vit")
    hidden = torch.zeros(2, S, dtype=torch.bool).scatter(1, query, True)
    tokens = student(images, bool_masked_pos=hidden).last_hidden_state[:, 1:]
    prediction = at(F.linear(tokens, formula("regressor.weight", D, D), formula("regressor.bias", D)), query)
    parameters = {
        "student.mask_token": student.embeddings.mask_token,
        "student.vit.patch_embed.proj.bias": student.embeddings.patch_embeddings.projection.bias,
    }
    cases = []
    for output, norm, k, beta in (("ffn", "instance", 2, 2.0), ("block", "layer", 2, 2.0), ("block", "layer", 1, 0.5)):
        normalize = instance_norm if norm == "instance" else layer_norm
        blocks = [normalize(x) for x in states(teacher, images, output)[-k:]]
        target = at(layer_norm(sum(blocks) / k), query)
        knobs = {"target_output": output, "target_norm": norm, "top_k_blocks": k, "beta": beta}
        results = loss_and_gradients(smooth_l1(prediction, target, beta), **parameters)
        cases.append({"knobs": knobs, "target": target} | results)
    write("data2vec", ("transformers",), images=images, query=query, prediction=prediction, cases=cases)


def make_data2vec2():
    images, M, Q, W = given(11, 2, 3, SIDE, SIDE), 2, 12, 32
    B = len(images)
    noise = torch.stack([given(20 + n, S).argsort().argsort() / S for n in range(B * M)])
    student = ViTMAEModel(ViTMAEConfig(**ENCODER, mask_ratio=Q / S))
    fill_encoder(student, "student.vit", fixed_position(D, 1))
    out = student(images.repeat_interleave(M, dim=0), noise=noise)
    kept = noise.argsort(dim=1)[:, : S - Q]  # in the order in which the student returns them
    query = out.mask.nonzero()[:, 1].view(B * M, Q)
    x = (0.01 * formula("noise", 1, S, D)).expand(B * M, -1, -1)
    x = x.scatter(1, kept.unsqueeze(-1).expand(-1, -1, D), out.last_hidden_state[:, 1:])
    x = x.transpose(1, 2).reshape(B * M, D, GRID, GRID)
    for layer, width in enumerate((D, W)):
        name = f"decoder.layers.{layer}"
        y = F.conv2d(x, formula(f"{name}.weight", W, width // 16, 3, 3), formula(f"{name}.bias", W), 1, 1, groups=16)
        y = F.gelu(layer_norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = y if width != W else x + y
    x = x.flatten(2).transpose(1, 2)
    prediction = at(F.linear(x, formula("regressor.weight", D, W), formula("regressor.bias", D)), query)
    teacher = ViTMSNModel(ViTMSNConfig(**ENCODER))
    fill_encoder(teacher, "teacher.vit", fixed_position(D, 1))
    target = layer_norm(sum(instance_norm(x) for x in states(teacher, images, "ffn")) / DEPTH)
    targets = target.repeat_interleave(M, dim=0)
    # The published code sums over all that is local, then divides by the number of hidden patches.
    patches = (prediction - at(targets, query)).square().sum() / D**0.5
    class_tokens = (out.last_hidden_state[:, 0] - targets.mean(dim=1)).square().sum() / D**0.5
    n_hidden = query.numel()
    loss = (patches + 0.01 * n_hidden * class_tokens) / n_hidden
    parameters = {
        "student.vit.cls_token": student.embeddings.cls_token,
        "student.vit.patch_embed.proj.bias": student.embeddings.patch_embeddings.projection.bias,
    }
    write(
        "data2vec2", ("transformers",), images=images, keep=kept.view(B, M, -1), query=query.view(B, M, Q),
        class_token_weight=0.01 * B * M, target=target, prediction=prediction.view(B, M, Q, D),
        **loss_and_gradients(loss, **parameters),
    )  # fmt: skip


# Blocks of I-JEPA ------------------------------------------------------------------------------------------------


def moments(values):
    values = torch.tensor(values, dtype=torch.float64)
    return {"mean": values.mean().item(), "deviation": values.std().item(), "count": len(values)}


def make_multiblock(side=14, singles=4000, batches=300, batch=16):
    torch.manual_seed(0)
    collate = IJEPAMaskCollator(
        side * 16, 16, enc_mask_scale=(0.85, 1.0), pred_mask_scale=(0.15, 0.2), aspect_ratio=(0.75, 1.5), npred=4,
        min_keep=10,
    )  # fmt: skip
    sizes, patches, unions, contexts = Counter(), [], [], []
    for _ in range(singles):
        _, [context], targets = collate([0])
        first = targets[0][0]
        sizes[f"{first[-1] // side - first[0] // side + 1} x {first[-1] % side - first[0] % side + 1}"] += 1
        patches.append(len(first))
        unions.append(len(torch.cat(targets, dim=1).unique()))
        contexts.append(context.shape[1])
    cut, seen, aimed = [], torch.zeros(side, side), torch.zeros(side, side)
    for _ in range(batches):
        _, [context], targets = collate([0] * batch)
        cut.append(context.shape[1])
        seen += torch.bincount(context.flatten(), minlength=side * side).view(side, side)
        aimed += torch.bincount(torch.cat(targets).flatten(), minlength=side * side).view(side, side)
    n = batches * batch
    write(
        "multiblock", ("lightly",), side=side, batch=batch, images=n,
        sizes={name: count / singles for name, count in sorted(sizes.items())}, singles=singles,
        target_patches=moments(patches), union_of_targets=moments(unions), context_patches=moments(contexts),
        context_patches_of_a_batch=moments(cut), context_by_row=seen.sum(1) / n, context_by_column=seen.sum(0) / n,
        targets_by_row=aimed.sum(1) / n, targets_by_column=aimed.sum(0) / n,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for make in (
        make_sinkhorn, make_swav, make_msn, make_sincos, make_mae, make_ijepa, make_data2vec, make_data2vec2,
        make_multiblock,
    ):  # fmt: skip
        make()
