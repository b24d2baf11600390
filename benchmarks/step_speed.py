"""Images/s of a data2vec training step, beside stable-pretraining's Data2Vec on the same ViT.

    pip install -e '.[parity]'
    python benchmarks/step_speed.py --rounds 5

One step is: forward of student and teacher, backward, clip, AdamW, EMA of the teacher, on images that are already in
memory. Ours is timed as `train` runs it. stable-pretraining's class leaves optimizer and EMA to its user: it gets torch's
AdamW as its documentation shows and its own teacher update, once a step. Both have the same encoder (a timm name), batch
and share of masked patches; the rounds of all variants alternate, and each ratio is taken within a round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch

from data2vec_vision.device import device_name, find_device, fused_attention_pays, multiplies_bf16
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.train import clip_and_step

Step = Callable[[], None]


def data2vec_step(method: Data2Vec, images: torch.Tensor, dtype: torch.dtype) -> Step:
    """A step as `train` takes it."""
    method.to(images.device).train()
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=False)
    masks = method.sample_masks(len(images), images.device)  # in a run the workers draw them

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = method([images], masks).loss
        loss.backward()
        clip_and_step(optimizer, scaler, method, 3.0)
        method.after_step(0.5)

    return step


def ours(args: argparse.Namespace, images: torch.Tensor, dtype: torch.dtype) -> Step:
    """Our step with the default target, and with the attention that `train` would take."""
    method = Data2Vec(args.model, mask_ratio=0.6, tau_initial=0.999, tau_end=0.999)
    for encoder in method.encoders.values():
        encoder.set_fused_attention(fused_attention_pays(images.device, "bf16" if dtype == torch.bfloat16 else "fp32"))
    return data2vec_step(method, images, dtype)


def theirs(args: argparse.Namespace, images: torch.Tensor, dtype: torch.dtype) -> Step:
    """A step of stable-pretraining's class; the coefficient is set because its update does nothing at the initial 0."""
    from stable_pretraining.methods.data2vec import Data2Vec as Peer

    method = Peer(args.model, mask_ratio=0.6).to(images.device).train()
    method.encoder.ema_coefficient.fill_(0.999)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.05)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = method(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.encoder.update_teacher()

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
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in a round")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = find_device(args.device)
    import stable_pretraining

    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 224, 224, device=device)
    default = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    name = str(default).removeprefix("torch.")
    variants = {
        "ours fp32": ours(args, images, torch.float32),
        "theirs fp32": theirs(args, images, torch.float32),
        f"ours {name}": ours(args, images, default),
        f"theirs {name}": theirs(args, images, default),
    }
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, python {platform.python_version()}, torch {torch.__version__}, "
          f"timm {timm.__version__}, stable-pretraining {stable_pretraining.__version__}")  # fmt: skip
    print(
        f"{args.model}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps each after a warm-up of one step"
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
