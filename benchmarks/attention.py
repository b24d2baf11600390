"""Seconds of a data2vec step with torch's fused attention and with plain matrix products, on the same model and images.

    python benchmarks/attention.py --rounds 5

Why `fused_attention_pays` answers as it does. The two variants alternate, and each ratio is taken within a round.
"""

import argparse
import platform
import statistics

import torch
from step_speed import method_step, seconds

from data2vec_vision.device import device_name, find_device, set_fused_attention
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.vit import build_vit

SHAPES = {  # of the encoder, and images a step
    "ViT 192 x 6, patch 4, 32 px": ({"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}, 128),
    "ViT-S/16, 224 px": ({"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}, 16),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = find_device(args.device)
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, python {platform.python_version()}, torch {torch.__version__}"
    )
    for name, (shape, batch) in SHAPES.items():
        torch.manual_seed(0)
        images = torch.randn(batch, 3, shape["img_size"], shape["img_size"], device=device)
        method = Data2Vec(build_vit(**shape), mask_ratio=0.6, tau_initial=0.999, tau_end=0.999)
        for dtype in (torch.bfloat16, torch.float32):
            step = method_step(method, [images], dtype)
            times: dict[bool, list[float]] = {True: [], False: []}
            for round in range(args.rounds + 1):  # the first warms up
                for fused, values in times.items():
                    set_fused_attention(method, fused)
                    took = seconds(step, 1, device)
                    if round:
                        values.append(took)
            ratios = [a / b for a, b in zip(times[True], times[False])]
            print(
                f"{name}, batch {batch}, {str(dtype)[6:]}: fused {statistics.median(times[True]):.2f} s, plain "
                f"{statistics.median(times[False]):.2f} s, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
