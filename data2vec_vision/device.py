"""What the machine has: its devices, what they are good at, its cores."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import PIL
import timm
import torch
import torchvision
from torch import nn

from data2vec_vision import distributed
from data2vec_vision.cpu import LinearAsConvolution, keep_freed_memory, mkl_is_slow
from data2vec_vision.errors import InputError


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best one present. Raises InputError for one that is not there."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = accelerator.type if accelerator else "cpu"
    if not device_exists(name):
        raise InputError(f"there is no device {name!r} here; there is {', '.join(devices())}")
    device = torch.device(name)
    if device.index is not None and distributed.processes() > 1:
        raise InputError(f"--device {name} is one device, but each process has its own; use --device {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", own_gpu() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def own_gpu() -> int:
    """The number of this process's GPU among those it sees: a launcher may show to each process its own only.

    Raises InputError where there are fewer than processes.
    """
    count, number = torch.cuda.device_count(), distributed.local_rank()
    if count > 1 and number >= count:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={seen})" if seen else ""
        raise InputError(
            f"{distributed.local_processes()} processes were started on {platform.node()}, which has {count} GPUs"
            f"{why}; use --nproc-per-node {count}"
        )
    return number if count > 1 else 0


def gpu_identity(device: torch.device) -> str:
    """What tells a GPU from the others of its machine, however they are numbered; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def devices() -> list[str]:
    """The names of the devices present."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator().type
    return ["cpu", kind, *(f"{kind}:{n}" for n in range(torch.accelerator.device_count()))]


def device_exists(name: str) -> bool:
    return name in devices()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware, faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "xpu"


def fused_attention_pays(device: torch.device, precision: str) -> bool:
    """Whether torch's fused attention is the faster one: not in bf16 on a CPU (benchmarks/RESULTS.md)."""
    return not (device.type == "cpu" and precision == "bf16")


def make_ready(device: torch.device) -> None:
    """What to do once before much is computed on the device."""
    if device.type == "cpu":
        keep_freed_memory()


def fast_products(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Within it linear maps are computed by the fastest library there is, forward and later backward."""
    slow = device.type == "cpu" and precision == "fp32" and mkl_is_slow()
    return LinearAsConvolution() if slow else nullcontext()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, torch takes kernels whose sums have one order, and raises RuntimeError where there is none.

    By https://docs.pytorch.org/docs/stable/notes/randomness.html; to be entered before the device has computed.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its handle
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler, which it needs for a CPU."""
    default = "clang++" if platform.system() == "Darwin" else "g++"
    return platform.system() != "Windows" and shutil.which(os.environ.get("CXX", default)) is not None


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The device with what it is, for people: "cpu (2 cores)", "cuda:0 (NVIDIA A100)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({cores()} cores, {platform.machine()})"
    return str(device)


def versions() -> dict[str, str]:
    """The libraries and the number of threads that the bits of a result depend on, by name."""
    libraries = (torch, torchvision, timm, PIL, numpy)
    return {m.__name__: str(m.__version__) for m in libraries} | {"threads": str(torch.get_num_threads())}


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, on the device or, for the CPU, in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory(device: torch.device) -> int:
    """The bytes of memory that the device has; of a device that does not tell, 8 GB are assumed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 10**9


def free_memory(root: Path = Path("/")) -> int:
    """The bytes of main memory that programs may still take; half of all where the system does not tell."""
    free = []
    if (meminfo := root / "proc/meminfo").exists():
        values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in values:
            free.append(1024 * int(values["MemAvailable"].split()[0]))
    group = root / "sys/fs/cgroup"  # a container's own bound
    if (group / "memory.max").exists() and (bound := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text()) - reclaimable(group / "memory.stat", "inactive_file")
        free.append(max(0, int(bound) - used))
    group /= "memory"  # the same, version 1
    if (group / "memory.limit_in_bytes").exists():
        limit, used = (int((group / f"memory.{name}_in_bytes").read_text()) for name in ("limit", "usage"))
        free.append(max(0, limit - used + reclaimable(group / "memory.stat", "total_inactive_file")))
    return min(free, default=device_memory(torch.device("cpu")) // 2)


def reclaimable(stat: Path, name: str) -> int:
    """Bytes of files that lie in memory only as long as nobody needs it, by a group's statistics; 0 without these."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Whether attention in `model` is torch's fused kernel, or two matrix products and a softmax: the same function."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def set_grad_checkpointing(model: nn.Module, recompute: bool) -> None:
    """Whether the blocks in `model` that train compute what is inside them again in the backward pass, or keep it."""
    module: Any
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):  # timm's encoders and our decoders; a teacher is not in training mode
            module.grad_checkpointing = recompute
