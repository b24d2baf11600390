"""GFLOP of a training step per image, counted by torch: forward of all networks and backward.

    python benchmarks/flops.py

ViT-S/16 at 224 px, each method with its defaults and with the sizes for which a figure can be computed by hand: a block stack
of n tokens of width d takes depth * (24 n d^2 + 4 n^2 d), backward twice that, the teacher's forward once. Multiplications and
additions count apart; norms, softmax, optimizer and EMA are left out, as in the figures by hand.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from data2vec_vision import methods
from data2vec_vision.transforms import local_crop_size

# Knobs, large and small crops, and the figure computed by hand, where there is one.
SETTINGS = [
    ("data2vec", {}, (1, 0), 36.8),
    ("data2vec2", {}, (1, 0), 57.0),
    ("data2vec2", {"n_masks": 16}, (1, 0), 104.5),
    ("ijepa", {}, (1, 0), None),
    ("ijepa", {"context_ratio": 0.418}, (1, 0), 28.5),
    ("ijepa", {"context_ratio": 0.245, "predictor_dim": 384}, (1, 0), 37.4),
    ("mae", {}, (1, 0), 11.2),
    ("mae", {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}, (1, 0), 38.9),
    ("msn", {}, (2, 10), 81.3),
    ("msn", {"n_focal": 0}, (2, 0), None),
    ("swav", {}, (2, 6), 84.4),
    ("swav", {"n_local": 0}, (2, 0), 55.2),
]
BATCH = 2


def convolution_backward(gradient: list[int], x: list[int], weight: list[int], *rest: object, **named: object) -> int:
    """Twice the forward; torch's own formula forgets the groups of a convolution in the gradient of its weight."""
    forward = 2 * math.prod(gradient) * math.prod(weight[1:])
    return 2 * forward


CONVOLUTION = {torch.ops.aten.convolution_backward: convolution_backward}


def main() -> None:
    print(f"torch {torch.__version__}, ViT-S/16 at 224 px, GFLOP an image and step")
    torch.manual_seed(0)
    for name, knobs, (large, small), by_hand in SETTINGS:
        method = methods.find(name)("vit_small_patch16_224", **knobs).train()
        height, width = local_crop_size((224, 224), 16)
        views = [torch.randn(BATCH, 3, 224, 224) for _ in range(large)]
        views += [torch.randn(BATCH, 3, height, width) for _ in range(small)]
        with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as counter:
            method(views).loss.backward()
        counted = counter.get_total_flops() / BATCH / 1e9
        text = ", ".join(f"{k}={v}" for k, v in knobs.items()) or "defaults"
        print(f"{name:<10} {text:<52} {counted:6.1f}" + (f"   by hand {by_hand}" if by_hand else ""), flush=True)


if __name__ == "__main__":
    main()
