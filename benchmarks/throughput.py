"""What a training step of each method reaches on this machine, and what takes the time.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --models vit_small_patch16_224 vit_base_patch16_224 --batch-size 256 --compile \\
        --images photos/ --peak-tflops 989

The second line is for a GPU. Every method, with its defaults, has a process of its own and takes whole steps (forward of all
networks, backward, clip, optimizer, EMA) on views that are in memory; with --images also on a folder, through the loader of
`train`. Printed are images/s, the FLOP/s that torch counts and their share of what the machine reaches in matrix products, measured
before and after (and, with --peak-tflops, of the datasheet's figure: model FLOP utilisation), the most memory, on a GPU
the share of the time in which no kernel runs (the profiler
slows the host, so it is an upper bound), and from torch's profiler what the operations take; in fp32 on AMD's processors linear maps are convolutions.
"""

import argparse
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import timm
import torch
from step_speed import DTYPES, Step, counted, method_step, products, seconds, spread
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data2vec_vision import methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import (
    device_name,
    find_device,
    fused_attention_pays,
    make_ready,
    multiplies_bf16,
    peak_memory,
    set_fused_attention,
)
from data2vec_vision.plan import prepare
from data2vec_vision.train import optimizer_and_scaler, training_steps
from data2vec_vision.transforms import local_crop_size

NAMES = ("data2vec", "data2vec2", "ijepa", "mae", "msn", "swav")
CROPS = {"msn": (2, 10), "swav": (2, 6)}  # large and small; the others take one view
# What an operation is, by the beginning of its name.
KINDS = {
    "linear maps": ("aten::addmm", "aten::mm", "aten::mkldnn_linear"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::_softmax", "aten::_efficient_attention",
                  "aten::_flash_attention"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::cudnn_convolution"),
    "norms": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::_native_batch_norm", "aten::std", "aten::var"),
    "GELU": ("aten::gelu",),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::gather", "aten::scatter", "aten::index"),
    "optimizer and EMA": ("aten::_fused_adamw", "aten::lerp_", "aten::linalg_vector_norm", "aten::_foreach"),
    "compiled": ("## Call Compiled", "triton_"),
}  # fmt: skip


def measure(name: str, model: str, args: argparse.Namespace) -> str:
    """One row of the table."""
    device = find_device(args.device)
    make_ready(device)
    torch.manual_seed(0)
    method = methods.find(name)(model)
    set_fused_attention(method, fused_attention_pays(device, args.precision))
    large, small = CROPS.get(name, (1, 0))
    height, width = local_crop_size(method.student.image_size, method.student.patch_size)
    views = [torch.randn(args.batch_size, 3, *method.student.image_size, device=device) for _ in range(large)]
    views += [torch.randn(args.batch_size, 3, height, width, device=device) for _ in range(small)]
    dtype = DTYPES[args.precision]
    step = method_step(method, views, dtype)
    gflop = counted(step)
    if args.compile:
        step = method_step(method, views, dtype, compiled=True)
    limit, gflop_of_products = products(device, dtype)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    memory = peak_memory(device) / 1e9
    limit()
    times, limits = [], []
    for _ in range(args.rounds):
        limits.append(gflop_of_products / seconds(limit, 1, device))
        times.append(seconds(step, args.steps, device) / args.steps)
    limits.append(gflop_of_products / seconds(limit, 1, device))
    rates = [gflop / t for t in times]
    top = statistics.median(limits)
    cells = [name, model, spread([args.batch_size / t for t in times], 1), f"{gflop / args.batch_size:.1f}",
             f"{statistics.median(rates):,.0f} of {top:,.0f}", spread([r / top for r in rates], 2)]  # fmt: skip
    if args.peak_tflops:
        cells.append(f"{statistics.median(rates) / args.peak_tflops / 10:.1f} %")
    cells.append(f"{memory:.1f} GB")
    shares, idle = profiled(step, device)
    if device.type != "cpu":
        cells.append(f"{100 * idle:.0f} %")
    cells.append(", ".join(f"{kind} {100 * share:.0f}" for kind, share in shares.items()))
    if not args.compile:
        decoder = getattr(method, "decoder", getattr(method, "predictor", None))
        cells.append(f"{100 * share_of(decoder, step, device):.0f} %" if decoder is not None else "")
    if args.images:
        cells.append(with_input(name, model, args))
    return "| " + " | ".join(cells) + " |"


def profiled(step: Step, device: torch.device) -> tuple[dict[str, float], float]:
    """Shares of a step's time by the kind of operation, the largest first, and the share in which the device is idle."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        seconds(step, 1, device)
        wall = 1e6 * (time.perf_counter() - start)  # microseconds, as the profiler's
    times: dict[str, float] = defaultdict(float)
    busy = 0.0
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, whose time the operation that launched it has too
            busy += 0.0 if event.is_user_annotation else event.self_device_time_total
            continue
        own = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "the rest")
        times[kind] += own
    total = sum(times.values())
    shares = {k: v / total for k, v in sorted(times.items(), key=lambda item: -item[1])}
    return shares, max(0.0, 1 - busy / wall)


def share_of(module: nn.Module, step: Step, device: torch.device) -> float:
    """The share of a step that a part of the method takes, forward and backward."""
    marks: list[float] = []

    def mark(module: nn.Module, *_: object) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        marks.append(time.perf_counter())

    handles = [module.register_forward_pre_hook(mark), module.register_forward_hook(mark),
               module.register_full_backward_pre_hook(mark), module.register_full_backward_hook(mark)]  # fmt: skip
    took = seconds(step, 1, device)
    for handle in handles:
        handle.remove()
    return sum(b - a for a, b in zip(marks[::2], marks[1::2])) / took


def with_input(name: str, model: str, args: argparse.Namespace) -> str:
    """images/s through the loader of `train`, and the share of the time that the steps wait for it."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(args.images, method=name, model=model, batch_size=args.batch_size, precision=args.precision,
                             device=args.device, compile=args.compile, epochs=10**4, checkpoint_out_dir=folder)  # fmt: skip
        job = prepare(config)
        job.method.skip_beginning()
        waited, count, start = 0.0, 0, 0.0
        for step in training_steps(job, *optimizer_and_scaler(job)):
            if step.number > 3:
                waited, count = waited + step.waited, count + 1
            if step.number == 3 or count == args.rounds * args.steps:
                if job.device.type != "cpu":
                    torch.accelerator.synchronize()
                if count:
                    break
                start = time.perf_counter()
        took = time.perf_counter() - start
    return f"{count * args.batch_size / took:.1f} images/s, {100 * waited / took:.0f} % of it waiting for images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--precision", choices=list(DTYPES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", help="a folder, for a measurement with real input")
    parser.add_argument("--peak-tflops", type=float, help="the datasheet's figure for the precision")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = find_device(args.device)
    args.precision = args.precision or ("bf16" if multiplies_bf16(device) else "fp32")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, python {platform.python_version()}, torch "
          f"{torch.__version__}, timm {timm.__version__}; {args.precision}, batch {args.batch_size}, "
          f"{'compiled' if args.compile else 'not compiled'}, {args.rounds} rounds of {args.steps} steps")  # fmt: skip
    cells = ["method", "model", "images/s", "GFLOP an image", "GFLOP/s of the limit's", "share of the limit"]
    cells += ["MFU"] * bool(args.peak_tflops) + ["memory"] + ["idle"] * (device.type != "cpu") + ["time in, %"]
    cells += ["decoder"] * (not args.compile) + ["with input"] * bool(args.images)
    print("| " + " | ".join(cells) + " |\n|" + "---|" * len(cells))
    for model in args.models:
        for name in args.methods:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # fresh, for its peak of memory
                print(pool.submit(measure, name, model, args).result(), flush=True)


if __name__ == "__main__":
    main()
