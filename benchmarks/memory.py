"""Bytes of a training step, and which batch fits: counted from tensors that have a size and no memory. Not run on a GPU.

    python benchmarks/memory.py --fit                       # the largest batch for 8, 16, 24 and 80 GB
    python benchmarks/memory.py --split                     # weights, gradients, optimizer, teacher, and what an image adds
    python benchmarks/memory.py --items data2vec2           # the largest tensors at the peak
    python benchmarks/memory.py --resident                  # beside the resident memory of a process that really trains
    python benchmarks/memory.py --growth                    # 1,000 steps of each method: do they keep anything?

A step is what `train` does in one: forward of all networks under bf16 autocast, backward, the figures of the verdict, clip, fused
AdamW, EMA, the second step of a run, so that the optimizer has its state. Every method has its defaults and the views of flops.py (MSN 2
large and 10 small crops, SwAV 2 and 6), SwAV a full queue, I-JEPA the largest blocks of 20 draws. LiveBytes counts each storage
from the operation that makes it to its last owner; what a kernel allocates for itself is not seen. As on a GPU means: torch's
fused attention, and layer norms in fp32, as CUDA's autocast has them and the CPU's does not. The batch that fits leaves a tenth of the memory
to the allocator's gaps, kernels' workspace and the driver.
"""

import argparse
import contextlib
import gc
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data2vec_vision import methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import peak_memory, set_fused_attention, set_grad_checkpointing, versions
from data2vec_vision.live_bytes import LiveBytes
from data2vec_vision.methods.base import Method
from data2vec_vision.monitor import health_sums
from data2vec_vision.plan import prepare
from data2vec_vision.samples import write_samples
from data2vec_vision.train import clip_and_step, optimizer_and_scaler, training_steps
from data2vec_vision.transforms import local_crop_size

NAMES = ("data2vec", "data2vec2", "ijepa", "mae", "msn", "swav")
MODELS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
CROPS = {"msn": (2, 10), "swav": (2, 6)}  # large and small ones; the others take one view
MEMORIES = (8, 16, 24, 80)  # GB of 2^30 bytes
RESERVE = 0.1
FAKE = FakeTensorMode()
BATCHES = (
    1024,
    1536,
    2048,
)  # two for the line, the third to see that it is one; small batches peak with their gradients


LAYER_NORM = nn.functional.layer_norm


def layer_norm_of_cuda(x: Tensor, *args: Any, **named: Any) -> Tensor:
    """Under autocast it gives and keeps fp32."""
    return LAYER_NORM(x.float() if x.dtype == torch.bfloat16 else x, *args, **named)


class Items(LiveBytes):
    """Also notes which operation made each storage, and what is alive when `now` reaches `at`."""

    def __init__(self, *tensors: Tensor, at: int):
        self.made: dict[int, tuple[str, int]] = {}
        self.at, self.found = at, Counter[str]()
        self.operation = "given"
        super().__init__(*tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operation = str(func).removeprefix("aten.").partition(".")[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            what = f"{self.operation} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            self.made[storage._cdata] = what, storage.nbytes()
        super()._add(tensor)
        if self.now == self.at and not self.found:
            for key in self._known:
                self.found[self.made[key][0]] += self.made[key][1]


class Run:
    """A method that takes steps on batches of any size, on tensors without memory unless `real`."""

    def __init__(self, name: str, model: str, *, real: bool = False, as_on_gpu: bool = True, recompute: bool = False):
        torch.manual_seed(0)
        self.method: Method = methods.find(name)(MODELS[model]).train()
        set_fused_attention(self.method, as_on_gpu)
        set_grad_checkpointing(self.method, recompute)
        self.method._after_step_called = True  # it would compare weights
        if name == "swav":
            self.method._set_queued(self.method.config.queue_length)
        self.name, self.real, self.as_on_gpu = name, real, as_on_gpu
        self.masks = largest_masks(self.method, 16 if real else 2)
        if not real:
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            self.method._apply(FAKE.from_tensor)
        self.optimizer = torch.optim.AdamW(self.method.param_groups(0.05), lr=1e-4, fused=True)
        self.peaks: dict[int, int] = {}
        self.measure(16 if real else 2)  # the first step makes the optimizer's state

    def measure(self, size: int, live: LiveBytes | None = None) -> int:
        """The most bytes alive during a step on `size` images; `live` may be a counter of another kind."""
        live = live or LiveBytes(*self.kept())
        nn.functional.layer_norm = layer_norm_of_cuda if self.as_on_gpu else LAYER_NORM
        with contextlib.nullcontext() if self.real else FAKE, live:
            self.step(*self.batch(size))
        return live.peak

    def peak(self, size: int) -> int:
        if size not in self.peaks:
            self.peaks[size] = self.measure(size)
        return self.peaks[size]

    def kept(self) -> list[Tensor]:
        """The tensors that live from step to step."""
        state = [value for moments in self.optimizer.state.values() for value in moments.values()]
        return [*self.method.parameters(), *self.method.buffers(), *state]

    def batch(self, size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        large, small = CROPS.get(self.name, (1, 0))
        shapes = [(224, 224)] * large + [local_crop_size((224, 224), 16)] * small
        views = [torch.randint(256, (size, 3, *shape), dtype=torch.uint8) for shape in shapes]
        if self.real:
            return views, self.masks
        masks = self.masks.items()
        lengths = {name: mask.shape[0] if name == "noise" else size for name, mask in masks}
        return views, {name: torch.empty(lengths[name], *mask.shape[1:], dtype=mask.dtype) for name, mask in masks}

    def step(self, views: list[Tensor], masks: dict[str, Tensor]) -> None:
        method = self.method
        images = [method.student.transform.normalized(view) for view in views]
        with torch.autocast("cpu", torch.bfloat16):
            output = method(images, masks=masks)
        del images
        output.loss.backward()
        health_sums(output.embedding, output.extras, method.student.n_patches)
        del output
        method.before_step(0.5)
        clip_and_step(self.optimizer, torch.amp.GradScaler("cpu", enabled=False), method, 3.0)
        method.after_step(0.5)

    def line(self) -> tuple[float, float]:
        """Bytes whatever the batch and bytes an image: peak(B) is the first plus B times the second, in large batches."""
        first, second, third = (self.peak(size) for size in BATCHES)
        an_image = (second - first) / (BATCHES[1] - BATCHES[0])
        fixed = first - BATCHES[0] * an_image
        assert abs(fixed + BATCHES[2] * an_image - third) < 1e-3 * third, "the peak is not linear in the batch"
        return fixed, an_image

    def largest(self, memory: float) -> int:
        """The largest batch whose step stays within `memory` bytes, measured at that batch; 0 where none does."""
        first, second, least = 512, 1024, self.method.smallest_batch
        an_image = (self.peak(second) - self.peak(first)) / (second - first)  # less in small batches, never more
        size = first
        while room := math.floor((memory - self.peak(size)) / an_image):
            if size + room < least:
                return least if size > least and self.peak(least) <= memory else 0
            size += room
        return size


def largest_masks(method: Method, size: int) -> dict[str, Tensor]:
    """Of 20 draws the one with the most indices; the sizes of I-JEPA's blocks are drawn anew in each step."""
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        draws.append(method.sample_masks(size, torch.device("cpu")))
    return max(draws, key=lambda masks: sum(mask.numel() for mask in masks.values()))


def fit() -> None:
    """The largest batches, with the activations kept / computed again."""
    print("| model | method | " + " | ".join(f"{memory} GB" for memory in MEMORIES) + " |")
    print("|---" * (2 + len(MEMORIES)) + "|")
    for model in MODELS:
        for name in NAMES:
            runs = [Run(name, model, recompute=recompute) for recompute in (False, True)]
            cells = []
            for memory in MEMORIES:
                sizes = [run.largest((1 - RESERVE) * memory * 2**30) for run in runs]
                cells.append(" / ".join(f"{size:,}" if size else "none" for size in sizes))
            print(f"| {model} | {name} | " + " | ".join(cells) + " |", flush=True)


def split(model: str) -> None:
    print("MB of 10^6 bytes. Gradients are not there yet at the peak of a large batch, so `else` leaves them out.")
    columns = (
        "weights, gradients, AdamW, teacher, else (bf16 copies of weights ...), an image, an image when computed again"
    )
    print("| model | method | " + " | ".join(columns.split(", ")) + " |")
    print("|---" * 9 + "|")
    for name in NAMES:
        run, again = (Run(name, model, recompute=recompute) for recompute in (False, True))
        fixed, an_image = run.line()
        trained = [p for p in run.method.parameters() if p.requires_grad]
        weights, teacher = bytes_of(trained), bytes_of(p for p in run.method.parameters() if not p.requires_grad)
        moments = bytes_of(v for state in run.optimizer.state.values() for v in state.values())
        rest = fixed - weights - moments - teacher
        values = (weights, weights, moments, teacher, rest, an_image, again.line()[1])
        print(f"| {model} | {name} | " + " | ".join(f"{value / 1e6:,.1f}" for value in values) + " |", flush=True)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def items(name: str, model: str, recompute: bool) -> None:
    """What is alive at the peak of a step of 64 images, by the operation that made it and its shape."""
    run = Run(name, model, recompute=recompute)
    peak = run.measure(64)
    counter = Items(*run.kept(), at=peak)
    run.measure(64, counter)
    print(f"{name}, {model}, 64 images: {peak / 1e6:,.0f} MB, of which, in MB")
    for what, size in counter.found.most_common(24):
        print(f"{size / 1e6:9,.1f}  {what}")


def in_a_process_of_its_own(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def resident() -> None:
    """Two real steps of 16 images in bf16 with plain attention, as `train` takes them on a CPU, beside the count."""
    print(
        "| method | counted, tensors without memory, MB | counted, real tensors, MB | resident memory of the process, less what it had before, MB |"
    )
    print("|---|---|---|---|")
    for name in NAMES:
        counted = Run(name, "ViT-S/16", as_on_gpu=False).peak(16)
        real, before, after = in_a_process_of_its_own("--resident-of", name)
        print(f"| {name} | {counted / 1e6:,.0f} | {real / 1e6:,.0f} | {(after - before) / 1e6:,.0f} |", flush=True)


def resident_of(name: str) -> tuple[int, int, int]:
    before = peak_memory(torch.device("cpu"))
    run = Run(name, "ViT-S/16", real=True, as_on_gpu=False)
    return run.peak(16), before, peak_memory(torch.device("cpu"))


def growth() -> None:
    """1,000 steps of a ViT of 64 x 2 on images of 32 px through `training_steps`."""
    print("| method | tensors alive after step 100 and 1,000, bytes | resident memory then, MB |")
    print("|---|---|---|")
    for name in NAMES:
        (first, last), (then, now) = in_a_process_of_its_own("--growth-of", name)
        print(f"| {name} | {first:,} and {last:,} | {then / 1e6:.1f} and {now / 1e6:.1f} |", flush=True)


def growth_of(name: str) -> tuple[list[int], list[int]]:
    tensors, pages = [], []
    with tempfile.TemporaryDirectory() as folder:
        # 400 images, so that by step 100 the order of two epochs is kept, as in every later step.
        write_samples(f"{folder}/images", lambda name: int(Path(name).stem) % 5 == 0)
        sizes = {"image_size": 32, "patch_size": 4, "hidden_dim": 64, "n_heads": 2, "n_encoders": 2, "batch_size": 8}
        out = {"checkpoint_out_dir": f"{folder}/run", "workers": 0, "device": "cpu", "epochs": 20}
        job = prepare(TrainConfig(f"{folder}/images", method=name, **sizes, **out))  # 1,000 steps
        job.method.skip_beginning()
        with LiveBytes(*job.method.parameters(), *job.method.buffers()) as live:  # SwAV's queue is not touched at first
            for step in training_steps(job, *optimizer_and_scaler(job)):
                if step.number in (100, 1000):
                    gc.collect()
                    tensors.append(live.now)
                    pages.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    return tensors, pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--items", choices=NAMES)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--model", default="ViT-S/16", choices=list(MODELS), help="of --split and --items")
    parser.add_argument("--grad-checkpointing", action="store_true", help="of --items")
    for name in ("--resident-of", "--growth-of"):  # what a process of its own does
        parser.add_argument(name, choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident_of or args.growth_of:
        print(json.dumps(resident_of(args.resident_of) if args.resident_of else growth_of(args.growth_of)))
        return
    print(platform.platform(), versions())
    if args.fit:
        fit()
    if args.split:
        split(args.model)
    if args.items:
        items(args.items, args.model, args.grad_checkpointing)
    if args.resident:
        resident()
    if args.growth:
        growth()


if __name__ == "__main__":
    main()
