"""Features of a folder of images, written as they are computed: memory does not grow with their number."""

import contextlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data2vec_vision.checkpoint import atomic_write, load_encoder
from data2vec_vision.data import leave_signals_to_parent
from data2vec_vision.device import cores, find_device, fused_attention_pays, set_fused_attention
from data2vec_vision.errors import InputError, RunFailed, Stopped, one_line
from data2vec_vision.run import caught_signals, say, size
from data2vec_vision.sources import ImageFolder, open_source, read_image
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer

NPY_HEADER = 128  # bytes: room for any shape, so that the number of rows can be filled in at the end
STOPPED = "Stopped; nothing was written"
CHUNK = 65536  # paths written at a time


def extract(
    checkpoint: str,
    input_path: str,
    output: str,
    pool: str | None = None,
    layer: int | None = None,
    encoder: str = "student",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> None:
    """Write the features of all images below `input_path` to `output`, in the sorted order of their paths.

    .npz: `features` float32 [N, D], or [N, S, D] with the pool "patch", and `paths` [N], relative, with
    forward slashes. .npy: the features alone, the paths beside it in <name>.paths.txt, one a line
    (a line feed in a name is written as \\n). Images that cannot be read are left out and listed in
    <name>.bad_files.txt. Raises InputError, RunFailed when the disk does not take the features, and Stopped
    after a signal before the last image; then nothing is written.
    """
    target = check_output(output)
    where = find_device(device)
    model, content = load_encoder(checkpoint, "cpu", encoder)
    if pool != "patch":
        model.check_pool(pool or model.pool)
    if layer is not None and layer > model.depth:
        raise InputError(f"--layer {layer} is more than the {model.depth} blocks of the encoder")
    if layer is not None and (pool or model.pool) == "cls":
        raise InputError("--layer gives patch tokens; use it with --pool mean or --pool patch")
    source = open_source(input_path)
    width = [model.n_patches, model.embed_dim] if pool == "patch" else [model.embed_dim]
    free, needed = shutil.disk_usage(target.parent).free, 4 * len(source) * int(np.prod(width))
    if needed * (2 if target.suffix == ".npz" else 1) > free:
        raise InputError(f"the features take {size(needed)}, but {target.parent} has only {size(free)} free")
    compute = feature_function(model.to(where), where, pool, layer, precision)
    loader = image_loader(source, model.transform, batch_size, workers, pin=where.type == "cuda")
    bad: dict[int, str] = {}
    try:
        with contextlib.ExitStack() as stack, caught_signals() as signals:
            npy = stack.enter_context(
                atomic_write(target) if target.suffix == ".npy" else tempfile.TemporaryFile(dir=target.parent)
            )
            rows = write_features(npy, compute, loader, bad, len(source), width, signals)
            if rows == 0:
                reason = next(iter(bad.values()))
                raise InputError(f"none of the {len(source):,} images in {input_path} can be read; the first: {reason}")
            if signals:
                raise Stopped(signals[0], STOPPED)
            if target.suffix == ".npz":
                write_npz(target, npy, source, bad)
            else:
                with atomic_write(target.with_suffix(".paths.txt")) as file:
                    for name in kept_names(source, bad):
                        file.write((name.replace("\n", "\\n") + "\n").encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise RunFailed(f"cannot write {target}: {one_line(error)}; make room or choose another --output") from error
    report(target, rows, width, source, bad, content["method"])


def check_output(output: str) -> Path:
    """Raises InputError unless features can be written to `output`."""
    target = Path(output)
    if target.suffix not in (".npz", ".npy"):  # numpy's own loader minds upper and lower case too
        raise InputError(f"--output {output} must end in .npz or .npy")
    if target.is_dir():
        raise InputError(f"--output {output} is a folder; give a file")
    if not target.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"--output {output}: the folder {target.parent} cannot be written to")
    return target


class Images(Dataset):
    """Index -> (index, uint8 [3, H, W]), or (index, the reason) for an image that cannot be read."""

    def __init__(self, source: ImageFolder, transform: ImageTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        image = read_image(self.source, index)
        return index, image if isinstance(image, str) else self.transform.resized(image)


def collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor | None, dict[int, str]]:
    """The readable images, uint8 [B, 3, H, W], and the reasons for the others by index."""
    readable = [image for _, image in items if isinstance(image, Tensor)]
    return torch.stack(readable) if readable else None, {i: reason for i, reason in items if isinstance(reason, str)}


def image_loader(
    source: ImageFolder, transform: ImageTransform, batch_size: int, workers: int | None, pin: bool = False
) -> DataLoader:
    """The images in order, in batches as `collate` makes them."""
    return DataLoader(
        Images(source, transform),
        batch_size,
        num_workers=max(0, min(8, cores() - 1)) if workers is None else workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )


def feature_function(
    model: MaskedVisionTransformer, device: torch.device, pool: str | None, layer: int | None, precision: str = "fp32"
) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, 3, H, W] -> float32 features [B, D] or [B, S, D] on the CPU."""

    set_fused_attention(model, fused_attention_pays(device, precision))

    @torch.inference_mode()
    def compute(pixels: Tensor) -> Tensor:
        images = model.transform.normalized(pixels.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if pool != "patch" and layer is None:
                features = model.embed(images, pool)
            else:
                encoded = model.encode(images, hidden=() if layer is None else (layer - 1,))
                tokens = encoded.tokens if layer is None else encoded.hidden[0]
                features = tokens if pool == "patch" else tokens.mean(dim=1)
        return features.float().cpu()

    return compute


def write_features(
    npy: BinaryIO,
    compute: Callable[[Tensor], Tensor],
    loader: DataLoader,
    bad: dict[int, str],
    total: int,
    width: list[int],
    signals: list[int],
) -> int:
    """Write an .npy of the features of all readable images, note the others in `bad`; returns the rows.

    Raises Stopped once there are `signals`.
    """
    npy.write(npy_header("<f4", [0, *width]))
    rows = 0
    with tqdm(total=total, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for pixels, unreadable in loader:
            if signals:
                raise Stopped(signals[0], STOPPED)
            bad |= unreadable
            if pixels is not None:
                npy.write(compute(pixels).numpy().astype("<f4", copy=False).tobytes())
                rows += len(pixels)
            bar.update(len(unreadable) + (0 if pixels is None else len(pixels)))
    npy.seek(0)
    npy.write(npy_header("<f4", [rows, *width]))
    npy.flush()
    return rows


def npy_header(kind: str, shape: list[int]) -> bytes:
    """The header of an .npy file (format 1.0), always NPY_HEADER bytes."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    magic = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    return magic + text.ljust(NPY_HEADER - 11).encode() + b"\n"


def write_npz(target: Path, features: BinaryIO, source: ImageFolder, bad: dict[int, str]) -> None:
    """Write `features` (a whole .npy) and the paths as an .npz, without holding either in memory."""
    features.seek(0)
    longest = max(len(name) for name in kept_names(source, bad))
    with atomic_write(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as entry:
            shutil.copyfileobj(features, entry)
        with archive.open("paths.npy", "w", force_zip64=True) as entry:
            entry.write(npy_header(f"<U{longest}", [len(source) - len(bad)]))
            chunk: list[str] = []
            for name in kept_names(source, bad):
                chunk.append(name)
                if len(chunk) == CHUNK:
                    entry.write(np.array(chunk, f"<U{longest}").tobytes())
                    chunk.clear()
            entry.write(np.array(chunk, f"<U{longest}").tobytes())


def kept_names(source: ImageFolder, bad: dict[int, str]) -> Iterator[str]:
    return (source.name(index) for index in range(len(source)) if index not in bad)


def report(target: Path, rows: int, width: list[int], source: ImageFolder, bad: dict[int, str], method: str) -> None:
    """Say what was written and how to load it; list what could not be read."""
    if bad:
        listing = target.with_suffix(".bad_files.txt")
        with atomic_write(listing) as file:
            for index, reason in bad.items():
                file.write(f"{source.name(index)}\t{reason}\n".encode("utf-8", "surrogateescape"))
        say(f"{len(bad):,} images could not be read and are left out; {listing} lists them.")
    shape = " x ".join(f"{n:,}" for n in (rows, *width))
    if target.suffix == ".npz":
        say(f'Wrote {target}: features {shape} ({method}), paths {rows:,}. Load: numpy.load("{target}")["features"]')
    else:
        say(f"Wrote {target}: features {shape} ({method}); {target.with_suffix('.paths.txt')}: their paths.")
