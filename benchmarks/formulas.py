"""FLOP of a training step and bytes between processes, by formula, from a method's sizes.

tests/unit/test_costs.py holds them against torch's FlopCounterMode and against what two processes really send. Letters: B images
of a pass, n processes, N prefix tokens, S patches, K kept, Q predicted, M masks or target blocks, D width, W width of a decoder, C
prototypes, E width of projections.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from data2vec_vision.methods.base import Method
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.methods.data2vec2 import Data2Vec2
from data2vec_vision.methods.ijepa import IJEPA
from data2vec_vision.methods.latent import MeanOfBlocks
from data2vec_vision.methods.mae import MAE
from data2vec_vision.methods.msn import MSN
from data2vec_vision.methods.swav import SwAV
from data2vec_vision.monitor import WINDOW
from data2vec_vision.train import NOTED
from data2vec_vision.transforms import local_crop_size

SINKHORN_ITERATIONS = 3
FP32, FP64 = 4, 8  # bytes
FLAGS = 4  # of a step, sent together: a bad file, a signal, a checkpoint that is due, one that is asked for


class Sent(NamedTuple):
    """Collectives, and the bytes that a process hands to them."""

    calls: float
    bytes: float

    def __mul__(self, count: float) -> "Sent":  # type: ignore[override]
        return Sent(count * self.calls, count * self.bytes)


@dataclass
class Flops:
    """Of one image in one step: multiplications and additions of the matrix products and convolutions."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def add(self, forward: int, gradients: int) -> None:
        """An operation and how many gradients the backward pass computes of it, each as dear as the forward pass."""
        self.forward += forward
        self.backward += gradients * forward


def blocks(tokens: int, width: int, depth: int) -> int:
    """Linear maps and attention of timm's blocks with an MLP of four times the width."""
    return depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


def flops(method: Method, query: int | None = None) -> Flops:
    """FLOP an image of a pass, views of the size that `train` gives them.

    query: patches of a target block of I-JEPA's, else those of its mean scale, 0.175 of all. SwAV's queue, which is
    scored once a pass and process, is left out.
    """
    sums = Flops()
    if isinstance(method, SwAV):
        crops(sums, method, [None] * 2, method.n_local)
    elif isinstance(method, MSN):
        crops(sums, method, [method.n_keep], method.n_focal)
        encode(sums, method, None, trained=False)
        sums.add(head(method.head) + prototypes(method), 0)
    else:
        masked(sums, method, query)
    return sums


def masked(sums: Flops, method: Method, query: int | None) -> None:
    """The four methods that predict patches."""
    S, N = method.student.n_patches, method.student.vit.num_prefix_tokens
    if isinstance(method, MeanOfBlocks):
        encode(sums, method, None, trained=False)
    if isinstance(method, Data2Vec):
        encode(sums, method, None)
        sums.add(head(method.regressor) * method.n_masked, 2)
    elif isinstance(method, Data2Vec2):
        M, K = method.config.n_masks, method.n_keep
        encode(sums, method, K, times=M)
        for layer in method.decoder.layers:
            sums.add(M * S * 2 * layer.weight.numel(), 2)
        sums.add(head(method.regressor) * M * (S - K), 2)
    elif isinstance(method, IJEPA):
        K, W, depth = method.n_context, method.predictor.dim, len(method.predictor.blocks)
        M = method.config.n_targets if method.in_blocks else 1
        Q = query or (round(0.175 * S) if method.in_blocks else S - K)
        encode(sums, method, K)
        sums.add(head(method.embed) * K, 2)
        sums.add(M * blocks(K + Q, W, depth), 2)
        sums.add(head(method.head) * M * Q, 2)
    elif isinstance(method, MAE):
        K = method.n_keep
        encode(sums, method, K)
        sums.add(head(method.embed) * (N + K), 2)
        sums.add(blocks(N + S, method.decoder.dim, len(method.decoder.blocks)), 2)
        sums.add(head(method.head) * (S - K), 2)
    else:
        raise TypeError(f"no formula for {type(method).__name__}")


def encode(
    sums: Flops, method: Method, keep: int | None, times: int = 1, patches: int | None = None, trained: bool = True
) -> None:
    """A pass of the encoder over a view of `patches` (else S), all of them embedded, `keep` encoded so many `times`."""
    vit, D = method.student.vit, method.student.embed_dim
    patches = patches or method.student.n_patches
    tokens = vit.num_prefix_tokens + (patches if keep is None else keep)
    sums.add(2 * patches * vit.patch_embed.proj.weight.numel(), 1 if trained else 0)  # no gradient for pixels
    sums.add(times * blocks(tokens, D, len(vit.blocks)), 2 if trained else 0)


def crops(sums: Flops, method: MSN | SwAV, large: list[int | None], small: int) -> None:
    """The student's large views with so many patches kept, its small crops, and the head over all of them."""
    height, width = local_crop_size(method.student.image_size, method.student.patch_size)
    patches = height * width // method.student.patch_size**2
    for keep in large:
        encode(sums, method, keep)
    for _ in range(small):
        encode(sums, method, None, patches=patches)
    sums.add((len(large) + small) * (head(method.head) + prototypes(method)), 2)


def head(module: nn.Module) -> int:
    """Forward FLOP of linear maps for one row."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def prototypes(method: MSN | SwAV) -> int:
    return 2 * method.prototypes.weight.numel()


def gradient_bytes(method: nn.Module) -> int:
    """What DDP averages once a step, whatever the accumulation: the fp32 gradients of all that is trained."""
    return sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)


def passes(method: Method) -> dict[str, Sent]:
    """The collectives of one forward and backward pass, by what they are for: MSN's and SwAV's statistics."""
    if not isinstance(method, (MSN, SwAV)):
        return {}
    C = method.config.n_prototypes
    norms = [m.num_features for m in method.head.modules() if isinstance(m, nn.BatchNorm1d)]
    mean_and_variance = Sent(2 * len(norms), FP32 * 2 * sum(norms))
    sinkhorn = Sent(SINKHORN_ITERATIONS * 2, FP32 * SINKHORN_ITERATIONS * 2 * C)  # the largest and the sum
    if isinstance(method, SwAV):
        calls, teacher, gap, codes = 1, 0, 0, 2
    else:
        calls, teacher, gap, codes = 1 + (method.n_focal > 0), 1, 1, int(method.config.sinkhorn)
    gradients = mean_and_variance * calls
    return {
        "batch norm": mean_and_variance * (calls + teacher),
        "Sinkhorn": sinkhorn * codes,
        "mean entropy": Sent(1, FP32 * C),
        "prototypes in use": Sent(1, FP32 * C),
        "gradients of statistics": Sent(gradients.calls + gap, gradients.bytes + FP32 * C * gap),
    }


def steps(method: Method, batch: int, grad_accum: int, processes: int) -> dict[str, Sent]:
    """The collectives of a step beside those of its passes; batch: images of a pass in all processes.

    Gradients count as one, however many buckets they are in. SwAV's queue is gathered, not summed: its bytes are what
    everyone then has. It begins after `queue_start`.
    """
    sums = {
        "gradients": Sent(1, gradient_bytes(method)),
        "flags": Sent(1, FLAGS * 4),  # int32
    }
    if isinstance(method, MeanOfBlocks) and method.position_mean is not None and not method.on_pixels:
        sums["centre of targets"] = Sent(1, method.position_mean.mean.numel() * FP32)
    if isinstance(method, SwAV) and method.config.queue_length:
        length, E = method.config.queue_length, method.config.projection_dim
        waiting = min(grad_accum, math.ceil(length / (batch / processes)))  # passes, as each process counts them
        sums["queue"] = Sent(waiting, FP32 * batch * 2 * E * waiting)
    return sums


def log(n_logged: int) -> Sent:
    """Of a line of metrics.jsonl: a mean for each figure that the method logs, three counts, skipped steps and why.

    And, by itself, how long the slowest process has waited for images.
    """
    return Sent(2, FP32 * (n_logged + 3 + 2 * NOTED) + FP64)


def verdict(method: Method) -> Sent:
    """Of a reading of the verdict's figures, sums over images and, for what is predicted, by place; every WINDOW images."""
    D, S, width = method.student.embed_dim, method.student.n_patches, predicted_width(method)
    of_places = Sent(4, FP32 * S * (3 + width)) if width else Sent(0, 0)
    return Sent(3 + of_places.calls, FP64 * (1 + D + D * D) + of_places.bytes)


def predicted_width(method: Method) -> int:
    """Channels of what the method predicts at each patch, 0 where it predicts assignments."""
    if isinstance(method, MAE):
        return method.head.out_features
    return 0 if isinstance(method, (MSN, SwAV)) else method.student.embed_dim


def a_step(
    method: Method, batch: int, grad_accum: int, processes: int, log_every: int, n_logged: int
) -> dict[str, Sent]:
    """A step's collectives, by what they are for; means over a run for what is not sent in every step."""
    sums = steps(method, batch, grad_accum, processes)
    sums |= {name: sent * grad_accum for name, sent in passes(method).items()}
    sums["log"] = log(n_logged) * (1 / log_every)
    return sums | {"verdict": verdict(method) * min(1 / log_every, batch * grad_accum / WINDOW)}


def sent_by_ring(payload: float, processes: int, gathered: bool = False) -> float:
    """Bytes that each process sends for an all-reduce of `payload`, or an all-gather that gives `payload` to everyone."""
    return (1 if gathered else 2) * (processes - 1) / processes * payload
