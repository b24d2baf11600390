"""What the figures that a verdict is read off cost: their sums beside the pass that they are of.

    python benchmarks/monitors.py --rounds 7

A forward and backward pass of each method with ViT-S/16 at 224 px in bf16, then the sums of monitor.health_sums, and, once
in WINDOW images, what monitor.health makes of them. Prints the median over rounds with the smallest and the largest.
"""

import argparse
import platform
import time

import torch
from step_speed import spread

from data2vec_vision import methods
from data2vec_vision.device import set_fused_attention, versions
from data2vec_vision.monitor import WINDOW, health, health_sums, on_host

NAMES = ("data2vec", "data2vec2", "ijepa", "mae", "msn", "swav")


def measure(name: str, batch_size: int, rounds: int) -> str:
    torch.manual_seed(0)
    method = methods.find(name)("vit_small_patch16_224").train()
    set_fused_attention(method, False)
    views = [torch.randn(batch_size, 3, 224, 224) for _ in range(method.fewest_views)]
    passes, sums, readings = [], [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            output = method(views)
        output.loss.backward()
        method.zero_grad(set_to_none=True)
        done = time.perf_counter()
        added = health_sums(output.embedding, output.extras, method.student.n_patches)
        summed = time.perf_counter()
        health(on_host(added))
        read = time.perf_counter()
        if number:  # the first allocates
            passes.append(done - start)
            sums.append(100 * (summed - done) / passes[-1])
            readings.append(100 * (read - summed) / (passes[-1] * WINDOW / batch_size))
    return f"| {name} | {spread(passes, 2)} | {spread(sums, 2)} | {spread(readings, 3)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    print(platform.platform(), versions(), f"batches of {args.batch_size}, {args.rounds} rounds")
    print("| method | a pass, s | its sums, % of it | a reading, % of its images' passes |")
    print("|---|---|---|---|")
    for name in NAMES:
        print(measure(name, args.batch_size, args.rounds), flush=True)


if __name__ == "__main__":
    main()
