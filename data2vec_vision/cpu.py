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
LARGEST_KEPT = 1 << 30  # bytes; larger tensors are few
LEAST_ROWS, LEAST_MULTIPLICATIONS = 128, 1 << 24  # below, a convolution's preparations take longer than they save


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for the next tensor.

    A training step takes and frees the same large tensors over and over. By default glibc gives each back to the system
    and asks for it again, and the system fills every new page with zeros first. Other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
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
        if func is F.linear and worthwhile(*args[:2]):
            return linear_as_convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_as_convolution` can take this map, and is faster."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dim() > 1
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and x.numel() * len(weight) >= LEAST_MULTIPLICATIONS
    )


def linear_as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, ..., D], weight [W, D], bias [W] -> [B, ..., W]: F.linear, on the tokens as the rows of a picture."""
    pixels = x.reshape(len(x), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [B, D, T, 1], in memory [B, T, D]
    mapped = F.conv2d(pixels, weight[:, :, None, None], bias)
    return mapped.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
