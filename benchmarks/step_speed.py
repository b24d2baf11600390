"""Images/s of a training step beside stable-pretraining's class of the same method, and beside the machine's own limit.

    pip install -e '.[parity]'
    python benchmarks/step_speed.py --method mae --rounds 5

One step is: forward of all networks, backward, clip, AdamW, EMA of the teacher, on views that are already in
memory. Ours is timed as `train` runs it. stable-pretraining's classes leave optimizer and EMA to their user: they get
torch's AdamW as its documentation shows and their own teacher update, once a step. Both have the same encoder (a timm name),
batch, views and, where both have them, sizes of head, decoder and predictor. What their classes compute otherwise is
said in SETTINGS; therefore FLOP/s are compared too, of FLOPs that torch counts.

Every variant has a process of its own, as it would have at its user's, and computing threads as torch sets them up. The rounds of all variants alternate, and so does a
process that only multiplies matrices: its rate in that round is the machine's limit. Each ratio is taken within a round.

Instead of stable-pretraining's class `--beside METHOD` takes another method of ours: data2vec2 beside data2vec, say. `--also compiled
default-memory` adds our step compiled, and without the memory that `train` makes a process keep. `--small` takes a small ViT on small
images, 192 x 6 on 32 px in patches of 4, and ours alone.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from flops import CONVOLUTION
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data2vec_vision import methods
from data2vec_vision.device import (
    device_name,
    fast_products,
    find_device,
    fused_attention_pays,
    make_ready,
    multiplies_bf16,
    set_fused_attention,
)
from data2vec_vision.methods.base import Method
from data2vec_vision.train import clip_and_step
from data2vec_vision.vit import build_vit

Step = Callable[[], None]

TAU = {"tau_initial": 0.999, "tau_end": 0.999}
# Our knobs, their class and arguments, and the views: large and small crops.
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]], tuple[int, int]]] = {
    "data2vec": ({"mask_ratio": 0.6, **TAU}, ("Data2Vec", {"mask_ratio": 0.6}), (1, 0)),
    "data2vec2": ({"n_masks": 8, **TAU}, ("", {}), (1, 0)),
    "mae": (
        {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
        ("MAE", {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}),
        (1, 0),
    ),
    # Theirs predicts the four blocks in one sequence, from all patches outside them (61 to 87 of 196 in three draws).
    "ijepa": (
        {"predictor_dim": 384, "predictor_depth": 6, "context_ratio": 0.38, **TAU},
        ("IJEPA", {"predictor_embed_dim": 384, "predictor_depth": 6}),
        (1, 0),
    ),
    # Theirs has one anchor, its hidden patches replaced by a token instead of left out, and no batch norm.
    "msn": ({"n_focal": 0, **TAU}, ("MSN", {"mask_ratio": 0.15}), (2, 0)),
    # Theirs computes assignments of the small crops too.
    "swav": ({"n_prototypes": 3000, "queue_length": 0}, ("SwAV", {"n_prototypes": 3000}), (2, 6)),
}
NAMES_OF = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
PRODUCTS = 40  # of the limit, in one step
DTYPES = {name: dtype for dtype, name in NAMES_OF.items()}


@dataclass(frozen=True)
class Variant:
    """What one process times; `library` is "ours", "theirs" or "limit", which multiplies matrices."""

    library: str
    method: str
    precision: str
    how: str = ""  # "compiled", or "default-memory": what is freed goes back to the system

    def __str__(self) -> str:
        name = f"{self.library} {self.method} {self.precision}".replace("  ", " ")
        return f"{name} {self.how}".strip()


class Timed:
    """A variant in its process: seconds of some steps on demand."""

    def __init__(self, variant: Variant, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, variant, args), daemon=True)
        self._process.start()
        theirs.close()  # so that a child that fails ends this with an error
        self.gflop: float = self._pipe.recv()  # of a step

    def seconds(self, steps: int) -> float:
        """A step's, the mean of so many; none end the process."""
        self._pipe.send(steps)
        return self._pipe.recv() if steps else 0.0


def serve(pipe: Connection, variant: Variant, args: argparse.Namespace) -> None:
    """The life of a variant's process: make the step, take one, then time as asked."""
    device = find_device(args.device)
    torch.manual_seed(0)
    step, gflop = build(variant, args, device)
    step()
    pipe.send(gflop)
    while count := pipe.recv():
        pipe.send(seconds(step, count, device) / count)


def build(variant: Variant, args: argparse.Namespace, device: torch.device) -> tuple[Step, float]:
    """The variant's step and its GFLOP."""
    dtype = DTYPES[variant.precision]
    if variant.library == "limit":
        make_ready(device)
        return products(device, dtype)
    views = images(variant.method, args, device)
    if variant.library == "theirs":
        step = theirs(variant.method, args.model, views, dtype)
        return step, counted(step)
    kind = methods.find(variant.method)
    encoder = build_vit(**SMALL, **kind.encoder_arguments()) if args.small else args.model
    method: Method = kind(encoder, **SETTINGS[variant.method][0])
    if variant.how != "default-memory":
        make_ready(device)
    set_fused_attention(method, fused_attention_pays(device, variant.precision))
    gflop = counted(method_step(method, views, dtype))
    return method_step(method, views, dtype, variant.how == "compiled"), gflop


def counted(step: Step) -> float:
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as counter:
        step()
    return counter.get_total_flops() / 1e9


def products(device: torch.device, dtype: torch.dtype, rows: int = 3152, width: int = 384) -> tuple[Step, float]:
    """Matrix products of the shape of ViT-S's feed-forward network at batch 16, by whatever makes them fastest."""
    if device.type == "cuda":
        rows, width = 16384, 4096
    x = torch.randn(16, rows // 16, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)

    @torch.no_grad()
    def step() -> None:
        with fast_products(device, NAMES_OF[dtype]):
            for _ in range(PRODUCTS):
                F.linear(x, weight)

    return step, PRODUCTS * 2 * (rows // 16 * 16) * width * 4 * width / 1e9


def images(method: str, args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """The views of a batch, as random numbers."""
    large, small = SETTINGS[method][2]
    sides = [32] * large + [16] * small if args.small else [224] * large + [96] * small
    return [torch.randn(args.batch_size, 3, side, side, device=device) for side in sides]


def method_step(method: Method, views: list[Tensor], dtype: torch.dtype, compiled: bool = False) -> Step:
    """A step of a method as `train` takes it, on views that are ready."""
    device = views[0].device
    method.to(device).train()
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    masks = method.sample_masks(len(views[0]), device)  # in a run the workers draw them
    forward = torch.compile(method) if compiled else method
    faster = nullcontext() if compiled else fast_products(device, NAMES_OF[dtype])

    def step() -> None:
        with faster, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = forward(views, masks=masks).loss
        loss.backward()
        method.before_step(0.5)
        clip_and_step(optimizer, scaler, method, 3.0)
        method.after_step(0.5)

    return step


def theirs(name: str, model: str, views: list[Tensor], dtype: torch.dtype) -> Step:
    """A step of stable-pretraining's class; the coefficient is set because its update does nothing at the initial 0."""
    import stable_pretraining.methods as peers

    peer, arguments = SETTINGS[name][1]
    device = views[0].device
    method = getattr(peers, peer)(model, **arguments).to(device).train()
    teachers = [m for m in method.modules() if hasattr(m, "update_teacher")]
    for teacher in teachers:
        teacher.ema_coefficient.fill_(0.999)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    large, _ = SETTINGS[name][2]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if len(views) > large:
                loss = method(global_views=views[:large], local_views=views[large:]).loss
            else:
                loss = method(*views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for teacher in teachers:
            teacher.update_teacher()

    return step


def seconds(step: Step, count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compared(args: argparse.Namespace, default: str) -> tuple[list[Variant], list[tuple[int, int]]]:
    """The variants, and which pairs of them a ratio is printed of."""
    other = ("ours", args.beside) if args.beside else ("theirs", args.method)
    precisions = dict.fromkeys((default, "fp32"))
    if args.small:
        variants, pairs = [Variant("ours", args.method, default)], []
    else:
        variants = [Variant(*who, p) for p in precisions for who in (("ours", args.method), other)]
        pairs = [(0, 1)] if len(variants) == 2 else [(0, 1), (2, 3), (0, 3)]
    for how in args.also:
        pairs.append((len(variants), 0))
        variants.append(Variant("ours", args.method, default, how))
    return variants, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="data2vec", choices=list(SETTINGS))
    parser.add_argument("--beside", choices=list(SETTINGS), help="a method of ours instead of stable-pretraining's")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in a round")
    parser.add_argument("--also", nargs="+", default=[], choices=["compiled", "default-memory"], help="ours, otherwise")
    parser.add_argument("--small", action="store_true", help="a small ViT on small images, ours alone")
    parser.add_argument("--device")
    args = parser.parse_args()
    if args.method == "data2vec2" and not (args.beside or args.small):
        parser.error("stable-pretraining has no data2vec2; give --beside METHOD")
    device = find_device(args.device)
    default = "bf16" if multiplies_bf16(device) else "fp32"
    variants, pairs = compared(args, default)
    limits = {v.precision: Variant("limit", "", v.precision) for v in variants}
    peer = (
        f", stable-pretraining {__import__('stable_pretraining').__version__}"
        if not (args.beside or args.small)
        else ""
    )
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, python {platform.python_version()}, "
          f"torch {torch.__version__}, timm {timm.__version__}{peer}")  # fmt: skip
    print(
        f"{args.method}, {'ViT 192 x 6, 32 px' if args.small else args.model}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps each"
    )
    running = {variant: Timed(variant, args) for variant in (*variants, *limits.values())}
    times: dict[Variant, list[float]] = {variant: [] for variant in running}
    for _ in range(args.rounds):
        for variant, timed in running.items():
            times[variant].append(timed.seconds(args.steps))
    for timed in running.values():
        timed.seconds(0)
    rates = {v: [running[v].gflop / t for t in ts] for v, ts in times.items()}  # GFLOP/s
    for limit in limits.values():
        print(f"{limit!s:<28} {spread(rates[limit], 0)} GFLOP/s in matrix products")
    for v in variants:
        share = [a / b for a, b in zip(rates[v], rates[limits[v.precision]])]
        print(f"{v!s:<28} {spread([args.batch_size / t for t in times[v]], 2)} images/s, {running[v].gflop / args.batch_size:.1f} "
              f"GFLOP an image, {spread(rates[v], 0)} GFLOP/s, {spread(share, 2)} of the limit")  # fmt: skip
    for a, b in pairs:
        x, y = variants[a], variants[b]
        images_ratio = [t / s for s, t in zip(times[x], times[y])]
        flops_ratio = [s / t for s, t in zip(rates[x], rates[y])]
        print(f"{x} / {y}: {spread(images_ratio, 2)} times the images/s, {spread(flops_ratio, 2)} times the FLOP/s")


if __name__ == "__main__":
    main()
