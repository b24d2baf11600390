"""The teacher: an exponential moving average of the student, kept in fp32."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def frozen_copy(module: M) -> M:
    """A copy in eval mode whose parameters take no gradient and are at least fp32."""
    teacher = copy.deepcopy(module).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):  # 0.9999 rounds to 1 in either
            parameter.data = parameter.data.float()
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, tau: float) -> None:
    """teacher <- tau * teacher + (1 - tau) * student for parameters; buffers are copied.

    Buffers are state, not weights: averaging an integer one (a position index, a counter) destroys it.
    tau is a Python float in [0, 1]. Raises ValueError when the two do not have the same parameters.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], got {tau}")
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("teacher and student do not have the same parameters")
    torch._foreach_lerp_(ours, [new.to(old.dtype) for old, new in zip(ours, theirs)], 1 - tau)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)
