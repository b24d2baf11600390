"""What makes a CPU fast: memory that stays, and matrix products by the library that knows this processor.

Both were measured (benchmarks/RESULTS.md); neither changes a result by more than rounding.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGEST_KEPT, LARGEST_KEPT_BEFORE = 1 << 30, 32 << 20  # bytes; larger tensors are few
LEAST_ROWS, LEAST_MULTIPLICATIONS = 128, 1 << 24  # below, a convolution's preparations take longer than they save


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for the next tensor.

    A training step takes and frees the same large tensors over and over. By default glibc gives each back to the system
    and asks for it again, and the system fills every new page with zeros first. Other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Older versions take no more than 32 MB; setting the other alone would make matters worse.
        if libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) or libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BEFORE):
            libc.mallopt(M_TRIM_THRESHOLD, -1)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch's fp32 matrix products leave half of the processor idle: MKL has no AVX-512 for AMD's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return is_amd() and torch.cpu._is_avx512_supported()


def is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is one of AMD's; False where the system does not tell."""
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


class LinearAsConvolution(TorchFunctionMode):
    """Within it, fp32 linear maps on the CPU are convolutions of side 1, which oneDNN computes instead of MKL.

    The same sums in another order, forward and backward. Small maps stay as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and worthwhile(*args, **(kwargs or {})):
            return linear_as_convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def worthwhile(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear_as_convolution` can take this map, and is faster."""
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and input.dim() > 1
        and weight.dim() == 2
        and input.numel() >= LEAST_ROWS * input.shape[-1]
        and input.numel() * len(weight) >= LEAST_MULTIPLICATIONS
        # With one thread torch takes a slow convolution of its own for a small batch.
        and (torch.get_num_threads() > 1 or (input.dim() > 2 and len(input) >= 16))
    )


def linear_as_convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [B, ..., D] or [T, D], weight [W, D], bias [W] -> [B, ..., W]: F.linear; tokens are rows of a picture."""
    pictures = len(input) if input.dim() > 2 else 1
    pixels = input.reshape(pictures, -1, 1, input.shape[-1]).permute(0, 3, 1, 2)  # [B, D, T, 1], in memory [B, T, D]
    mapped = F.conv2d(pixels, weight[:, :, None, None], bias)
    return mapped.permute(0, 2, 3, 1).reshape(*input.shape[:-1], len(weight))
