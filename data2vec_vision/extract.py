"""Features of a folder of images, written as they are computed: memory does not grow with their number."""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data2vec_vision.checkpoint import TRAINING, atomic_write, check_place, load_encoder, refuse_overwriting
from data2vec_vision.config import inputs_of
from data2vec_vision.data import start_worker
from data2vec_vision.device import (
    cores,
    fast_products,
    find_device,
    fused_attention_pays,
    make_ready,
    set_fused_attention,
)
from data2vec_vision.distributed import from_main, is_main, local_processes, processes, rank
from data2vec_vision.errors import InputError, RunFailed, Stopped, Unreadable, one_line
from data2vec_vision.failures import said_with
from data2vec_vision.loading import LoadingFailed, lasting, reading, sendable
from data2vec_vision.partial import Partial
from data2vec_vision.run import caught_signals, plural, say
from data2vec_vision.shares import in_order, joined, refuse_unlike, shared
from data2vec_vision.sources import ImageFolder, open_source, opened_picture
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import Encoded, MaskedVisionTransformer, pooled
from data2vec_vision.writers import FORMATS, Table, check_format, load_line, paths_file

GO_ON = "the same command with --resume goes on"
ENOUGH = 64  # rows of which none is finite: the encoder is broken, not an image


def extract(
    checkpoint: str,
    input_path: str | Sequence[str],
    output: str,
    pool: str | None = None,
    layer: int | None = None,
    encoder: str = "student",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    resume: bool = False,
) -> None:
    """Write the features of all images of `input_path`, one or several, to `output`, in the order of their names.

    The suffix of `output` is one of writers.FORMATS. Features are float32 [N, D], [N, S, D] with the pool "patch", or
    [N, rows, columns, D] with "grid"; paths are relative, with forward slashes. `layer` takes the output of a block
    before the final norm, 1 the first and -1 the last. Images that cannot be read are left out and listed in
    <name>.bad_files.txt.

    Raises InputError; RunFailed when the disk does not take the features or none of them is finite; Stopped after a
    signal. Then there is no output, but after a stop, a full disk or a kill the rows so far are kept beside it, and
    `resume` goes on with them: the output is that of a run without a stop, on the CPU bit for bit.
    """
    inputs, where = inputs_of(input_path), find_device(device)

    def checked() -> Path:
        target = check_output(output, pool)
        refuse_overwriting("--output", target, checkpoint, *inputs)
        return target

    with joined():
        target = from_main(checked)  # other machines write nothing
        extract_all(checkpoint, inputs, target, pool, layer, encoder, batch_size, workers, where, precision, resume)


def extract_all(
    checkpoint: str,
    inputs: Sequence[str],
    target: Path,
    pool: str | None,
    layer: int | None,
    encoder: str,
    batch_size: int,
    workers: int | None,
    where: torch.device,
    precision: str,
    resume: bool,
) -> None:
    """`extract`, this process's share of it; the main process writes."""
    model, content = load_encoder(checkpoint, "cpu", encoder)
    pool = pool or model.pool
    if pool not in ("patch", "grid"):
        model.check_pool(pool)
    layer = block_number(layer, model.depth)
    source = open_source(inputs)
    about = {
        "method": content["method"],
        "checkpoint": checkpoint,
        **({"encoder": encoder} if content["format"] == TRAINING else {}),
        "image_size": list(model.transform.image_size),
        "pool": pool,
        "layer": layer,
        "precision": precision,
    }
    settings = {
        "weights": fingerprint(model, content["encoder"]),
        "images": source.fingerprint(),
        "--batch-size": batch_size,
        "--device": where.type,
        **{f"--{name}": about[name] for name in ("pool", "layer", "precision")},
    }
    refuse_unlike(settings, "images and weights")
    partial = Partial(target, row_shape(model, pool), settings)
    from_main(lambda: partial.check_room(len(source), FORMATS[target.suffix].room))
    if layer is not None:
        model.vit.blocks = model.vit.blocks[:layer]  # no need to compute what comes after it
    try:
        started = partial.opened(resume) if is_main() else contextlib.nullcontext()
        with said_with(batch_size, reading_processes(workers), where), caught_signals() as signals, started:
            compute = feature_function(model.to(where), where, pool, layer, precision)
            stop = stop_function(signals, partial, len(source))
            pin, start = where.type == "cuda", from_main(lambda: partial.progress.images)
            loader = image_loader(source, model.transform, batch_size, workers, pin, start, True)
            compute_rows(partial, compute, loader, len(source), shared(signals, stop))
            if not is_main():
                return
            refuse_useless(partial, model, checkpoint, ", ".join(inputs))
            write_output(partial, source, about, stop)
    except RunFailed as error:
        if not (isinstance(error.__cause__, LoadingFailed) and partial.notes.exists()):
            raise
        raise RunFailed(f"{error}; then {GO_ON}") from error
    except OSError as error:
        kept = f"; then {GO_ON}" if partial.notes.exists() else ""
        raise RunFailed(
            f"cannot write {target}: {one_line(error)}; make room or choose another --output{kept}"
        ) from error
    report(partial, source, content["method"])


def check_output(output: str, pool: str | None = None) -> Path:
    """Raises InputError unless features can be written to `output`."""
    target = Path(output)
    check_format(target, pool)
    check_place("--output", target)
    return target


def block_number(layer: int | None, depth: int) -> int | None:
    """The number of a block from 1 on, of one that may be counted from the end, -1 the last. Raises InputError."""
    if layer is None or 1 <= layer <= depth:
        return layer
    if -depth <= layer <= -1:
        return layer + depth + 1
    raise InputError(
        f"--layer {layer} is more than the {depth} blocks of the encoder; give 1 to {depth}, or -1 for the last"
        if layer
        else f"--layer counts from 1; give 1 to {depth}, or -1 for the last"
    )


def fingerprint(model: MaskedVisionTransformer, description: dict[str, Any]) -> str:
    """A hash of all that the features of an image depend on in the encoder."""
    digest = hashlib.blake2b(f"{description} {model.transform}".encode(), digest_size=16)
    for name, tensor in model.vit.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def row_shape(model: MaskedVisionTransformer, pool: str) -> list[int]:
    """The shape of an image's features: [D], [S, D] or [rows, columns, D]."""
    return [*{"patch": [model.n_patches], "grid": model.grid}.get(pool, []), model.embed_dim]


class Images(Dataset):
    """Index -> (index, uint8 [3, H, W]), or (index, the reason) for an image that cannot be read.

    Images of other than three channels are float32 [C, H, W].
    """

    def __init__(self, source: ImageFolder, transform: ImageTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            with reading(index), opened_picture(self.source, index, self.transform.channels) as picture:
                return index, self.transform.resized(picture)
        except Unreadable as error:
            return index, str(error)


def collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor | None, dict[int, str]]:
    """The readable images, [B, C, H, W], and the reasons for the others by index."""
    readable = [image for _, image in items if isinstance(image, Tensor)]
    pixels = sendable(torch.stack(readable)) if readable else None
    return pixels, {i: reason for i, reason in items if isinstance(reason, str)}


class ImageBatches:
    """Images in order, in batches as `collate` makes them, though processes that read them be lost."""

    def __init__(self, dataset: Images, batches: Sequence[range], workers: int, pin: bool):
        self.dataset, self.batches, self.workers, self.pin = dataset, batches, workers, pin

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor | None, dict[int, str]]]:
        return lasting(self._from_batch, self.dataset.source.name, say)

    def _from_batch(self, done: int) -> DataLoader:
        left: Any = self.batches[done:]
        return DataLoader(
            self.dataset,
            batch_sampler=left,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.pin,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )


def image_loader(
    source: ImageFolder,
    transform: ImageTransform,
    batch_size: int,
    workers: int | None,
    pin: bool = False,
    start: int = 0,
    share: bool = False,
) -> ImageBatches:
    """The batches of all images from number `start` on, read by so many processes, None: as many as pay.

    With `share` every n-th batch, n the number of processes, for shares.in_order.
    """
    count = len(source)
    batches = [range(first, min(first + batch_size, count)) for first in range(start, count, batch_size)]
    mine = batches[rank() :: processes()] if share else batches
    return ImageBatches(Images(source, transform), mine, reading_processes(workers), pin)


def reading_processes(workers: int | None) -> int:
    """How many processes read images, where `workers` are asked for."""
    return max(0, min(8, cores() // local_processes() - 1)) if workers is None else workers


def feature_function(
    model: MaskedVisionTransformer, device: torch.device, pool: str | None, layer: int | None, precision: str = "fp32"
) -> Callable[[Tensor], Tensor]:
    """Images [B, C, H, W] of `collate` -> float32 features on the CPU: [B, D], [B, S, D] or [B, rows, columns, D].

    `pool` is mean, cls, patch, grid, or None for the model's own; `layer` in [1, L], or None: after the final norm.
    """
    make_ready(device)
    set_fused_attention(model, fused_attention_pays(device, precision))
    n_prefix = model.vit.num_prefix_tokens

    @torch.inference_mode()
    def compute(pixels: Tensor) -> Tensor:
        images = model.transform.normalized(pixels.to(device, non_blocking=True))
        with fast_products(device, precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if layer is None:
                encoded = model.encode(images)
            else:
                state = model.encode(images, hidden=(layer - 1,), output="all").hidden[0]
                encoded = Encoded(state[:, n_prefix:], state[:, :n_prefix], [])
            if pool == "patch":
                features = encoded.tokens
            elif pool == "grid":
                features = encoded.tokens.unflatten(1, model.grid)
            else:
                features = pooled(encoded, pool or model.pool)
        return features.float().cpu()

    return compute


def stop_function(signals: list[int], partial: Partial, total: int) -> Callable[[], None]:
    """A function that raises Stopped once there are signals."""

    def stop() -> None:
        if signals and not partial.progress.rows:
            raise Stopped(signals[0], "Stopped; nothing was written")
        if signals:
            done = f"{partial.progress.images:,} of {plural(total, 'image', 'images')}"
            raise Stopped(signals[0], f"Stopped after {done}; {GO_ON}")

    return stop


def compute_rows(
    partial: Partial,
    compute: Callable[[Tensor], Tensor],
    loader: ImageBatches,
    total: int,
    tick: Callable[[], None],
) -> None:
    """Add the features of all readable images to the main process's `partial`, and the others with their reasons."""
    none = torch.empty(0, *partial.shape).numpy()
    done, shown = partial.progress.images, is_main() and sys.stderr.isatty()
    batches = ((none if pixels is None else compute(pixels).numpy(), unreadable) for pixels, unreadable in loader)
    with tqdm(total=total, initial=done, unit="image", dynamic_ncols=True, disable=not shown) as bar:
        for rows, unreadable in in_order(batches, len(loader), tick):
            partial.add(rows, unreadable)
            bar.update(partial.progress.images - bar.n)
            if partial.progress.not_finite == partial.progress.rows >= ENOUGH:
                return


def refuse_useless(partial: Partial, model: MaskedVisionTransformer, checkpoint: str, input_path: str) -> None:
    """Raises InputError when no image could be read, and RunFailed when no row is finite."""
    progress = partial.progress
    if not progress.rows:
        reason = next(iter(progress.bad.values()))
        raise InputError(f"none of the {progress.images:,} images in {input_path} can be read; the first: {reason}")
    if progress.not_finite == progress.rows:
        partial.drop()
        broken = [name for name, weight in model.vit.named_parameters() if not weight.isfinite().all()]
        cause = f"its weights are not finite, {broken[0]} for one" if broken else "its weights are so large"
        raise RunFailed(
            f"the encoder in {checkpoint} makes no feature that is finite: {cause}; take an earlier checkpoint"
        )


def write_output(partial: Partial, source: ImageFolder, about: dict[str, Any], stop: Callable[[], None]) -> None:
    """Make the output of the rows, which are all there."""
    target, bad = partial.target, partial.progress.bad

    def names() -> Iterator[str]:
        return (source.name(index) for index in range(len(source)) if index not in bad)

    stop()
    partial.finish()
    form = FORMATS[target.suffix]
    # The paths take their name when the features have theirs: a stop before that leaves both as they were.
    with contextlib.nullcontext() if form.holds_paths else paths_file(target, names()):
        if form.write is not None:
            with atomic_write(target) as file:
                form.write(file, Table(partial.path, partial.shape, partial.progress.rows, names, about, stop))
        partial.complete(rename=form.write is None)


def report(partial: Partial, source: ImageFolder, method: str) -> None:
    """Say what was written, what to mind, and last how to load it; list what could not be read."""
    target, progress = partial.target, partial.progress
    listing = target.with_suffix(".bad_files.txt")
    if not progress.bad:
        listing.unlink(missing_ok=True)  # of an earlier extraction
    else:
        with atomic_write(listing) as file:
            for index, reason in progress.bad.items():
                file.write(f"{source.name(index)}\t{reason}\n".encode("utf-8", "surrogateescape"))
        left_out = plural(len(progress.bad), "image could not be read and is", "images could not be read and are")
        say(f"{left_out} left out; {listing} lists them.")
    if progress.first_not_finite is not None:
        first = source.name(progress.first_not_finite)
        say(
            f"{plural(progress.not_finite, 'row holds', 'rows hold')} numbers that are not finite, "
            f"the first that of {first}; leave them out of what you compute."
        )
    shape = " x ".join(f"{n:,}" for n in (progress.rows, *partial.shape))
    holds_paths = FORMATS[target.suffix].holds_paths
    paths = f"paths {progress.rows:,}" if holds_paths else f"paths in {target.with_suffix('.paths.txt')}"
    say(f"Wrote {target}: features {shape} ({method}), {paths}.")
    say(f"Load: {load_line(target, partial.shape)}")
