"""Images/s of a training step, beside stable-pretraining's class of the same method, on the same ViT.

    pip install -e '.[parity]'
    python benchmarks/step_speed.py --method mae --rounds 5

One step is: forward of all networks, backward, clip, AdamW, EMA of the teacher, on views that are already in
memory. Ours is timed as `train` runs it. stable-pretraining's classes leave optimizer and EMA to their user: they get
torch's AdamW as its documentation shows and their own teacher update, once a step. Both have the same encoder (a timm name),
batch, views and, where both have them, sizes of head, decoder and predictor; the rounds of all variants alternate, and each
ratio is taken within a round. What their classes compute otherwise is said in SETTINGS.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from data2vec_vision import methods
from data2vec_vision.device import device_name, find_device, fused_attention_pays, multiplies_bf16, set_fused_attention
from data2vec_vision.methods.base import Method
from data2vec_vision.train import clip_and_step

Step = Callable[[], None]

TAU = {"tau_initial": 0.999, "tau_end": 0.999}
# Our knobs, their class and arguments, and the views: large and small crops.
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]], tuple[int, int]]] = {
    "data2vec": ({"mask_ratio": 0.6, **TAU}, ("Data2Vec", {"mask_ratio": 0.6}), (1, 0)),
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


def images(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """The views of a batch, as random numbers."""
    large, small = SETTINGS[args.method][2]
    return [torch.randn(args.batch_size, 3, side, side, device=device) for side in [224] * large + [96] * small]


def ours(args: argparse.Namespace, views: list[Tensor], dtype: torch.dtype) -> Step:
    """A step as `train` takes it, with the attention that `train` would take."""
    method: Method = methods.find(args.method)(args.model, **SETTINGS[args.method][0])
    set_fused_attention(method, fused_attention_pays(views[0].device, "bf16" if dtype == torch.bfloat16 else "fp32"))
    return method_step(method, views, dtype)


def method_step(method: Method, views: list[Tensor], dtype: torch.dtype) -> Step:
    """A step of a method, on views that are ready."""
    device = views[0].device
    method.to(device).train()
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    masks = method.sample_masks(len(views[0]), device)  # in a run the workers draw them

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = method(views, masks=masks).loss
        loss.backward()
        method.before_step(0.5)
        clip_and_step(optimizer, scaler, method, 3.0)
        method.after_step(0.5)

    return step


def theirs(args: argparse.Namespace, views: list[Tensor], dtype: torch.dtype) -> Step:
    """A step of stable-pretraining's class; the coefficient is set because its update does nothing at the initial 0."""
    import stable_pretraining.methods as peers

    name, arguments = SETTINGS[args.method][1]
    device = views[0].device
    method = getattr(peers, name)(args.model, **arguments).to(device).train()
    teachers = [m for m in method.modules() if hasattr(m, "update_teacher")]
    for teacher in teachers:
        teacher.ema_coefficient.fill_(0.999)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)
    large, _ = SETTINGS[args.method][2]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="data2vec", choices=list(SETTINGS))
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in a round")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = find_device(args.device)
    import stable_pretraining

    torch.manual_seed(0)
    views = images(args, device)
    default = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    name = str(default).removeprefix("torch.")
    variants = {
        "ours fp32": ours(args, views, torch.float32),
        "theirs fp32": theirs(args, views, torch.float32),
        f"ours {name}": ours(args, views, default),
        f"theirs {name}": theirs(args, views, default),
    }
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, python {platform.python_version()}, torch {torch.__version__}, "
          f"timm {timm.__version__}, stable-pretraining {stable_pretraining.__version__}")  # fmt: skip
    print(
        f"{args.method}, {args.model}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps each after a warm-up of one step"
    )
    for step in variants.values():
        step()
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant, step in variants.items():
            times[variant].append(seconds(step, args.steps, device))
    for variant, values in times.items():
        rates = [args.batch_size * args.steps / t for t in values]
        print(f"{variant:<16} {spread(rates, 2)} images/s")
    for a, b in (("ours fp32", "theirs fp32"), (f"ours {name}", "theirs fp32"), (f"ours {name}", f"theirs {name}")):
        ratios = [y / x for x, y in zip(times[a], times[b])]
        print(f"{a} / {b}: {spread(ratios, 2)} times the images/s")


if __name__ == "__main__":
    main()
