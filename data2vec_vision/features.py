"""Features of chosen images by several encoders in one pass over the files, kept on the disk and not in memory."""

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data2vec_vision import methods
from data2vec_vision.config import from_json
from data2vec_vision.distributed import is_main
from data2vec_vision.errors import InputError, RunFailed, one_line
from data2vec_vision.extract import ImageBatches
from data2vec_vision.probes import chunks
from data2vec_vision.run import size
from data2vec_vision.seeding import seeded
from data2vec_vision.shares import in_order
from data2vec_vision.untrusted import check_shapes
from data2vec_vision.vit import MaskedVisionTransformer, build_vit

PIXEL_SIDE = 32  # pixels, the most that an image's side has as raw pixels


class FeatureFile:
    """float32 rows in a temporary file without a name, which is gone however the program ends."""

    def __init__(self) -> None:
        self._file, self._shape = tempfile.TemporaryFile(), [0, 0]

    def add(self, rows: Tensor) -> None:
        """Append [n, D]. Raises RunFailed when the disk does not take them."""
        try:
            self._file.write(rows.numpy().astype(np.float32, copy=False).tobytes())
        except OSError as error:
            where = f"the folder for temporary files, {tempfile.gettempdir()}"
            raise RunFailed(f"cannot write features to {where}: {one_line(error)}; make room or set TMPDIR") from error
        self._shape = [self._shape[0] + len(rows), rows.shape[1]]

    def tensor(self) -> Tensor:
        """All rows [N, D], mapped from the file: the system reads them when they are looked at."""
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, np.float32, "r+", shape=tuple(self._shape)))


def check_room(count: int, model: MaskedVisionTransformer, floors: bool) -> None:
    """Raises InputError unless the features of so many images fit into the folder for temporary files."""
    pixels = pixel_shape(model.transform.image_size, model.transform.channels)
    width = model.embed_dim + (model.embed_dim + math.prod(pixels)) * floors
    place, needed = tempfile.gettempdir(), 4 * count * width
    if needed > (free := shutil.disk_usage(place).free):
        raise InputError(
            f"the features take {size(needed)}, but {place} has only {size(free)} free; "
            f"set TMPDIR to another folder{' or give --no-floors' if floors else ''}"
        )


def one_pass(
    loader: ImageBatches, compute: Mapping[str, Callable[[Tensor], Tensor]], tick: Callable[[], None]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Features of the readable images by each function of `compute`, [B, C, H, W] -> [B, D], and the bad files.

    Returns [N, D] by name and, by index, why an image cannot be read; both are empty in other processes than the main
    one, which gets what they compute of their batches. `tick` is called after every batch.
    """
    files, total = {name: FeatureFile() for name in compute}, len(loader.dataset)
    bad: dict[int, str] = {}
    shown = is_main() and sys.stderr.isatty()
    batches = (
        ({} if pixels is None else {name: function(pixels) for name, function in compute.items()}, unreadable)
        for pixels, unreadable in loader
    )
    with tqdm(total=total, unit="image", dynamic_ncols=True, disable=not shown, leave=False) as bar:
        for computed, unreadable in in_order(batches, len(loader), tick):
            bad |= unreadable
            for name, rows in computed.items():
                files[name].add(rows)
            bar.update(len(unreadable) + max(map(len, computed.values()), default=0))
    if not is_main():
        return {}, {}
    if len(bad) == total:
        raise InputError(f"none of the {total:,} images can be read; the first: {next(iter(bad.values()))}")
    return {name: file.tensor() for name, file in files.items()}, bad


def refuse_broken(model: MaskedVisionTransformer, checkpoint: str) -> None:
    """Raises InputError for weights that are not finite."""
    if broken := [name for name, weights in model.vit.state_dict().items() if not weights.isfinite().all()]:
        raise InputError(f"{checkpoint} is broken: {broken[0]} is not finite; take an earlier checkpoint of the run")


def refuse_not_finite(train: Tensor, test: Tensor, checkpoint: str) -> None:
    """Raises InputError where the features [N, D] of some images are not finite."""
    broken = sum(int((~f[part].isfinite().all(dim=1)).sum()) for f in (train, test) for part in chunks(f))
    if broken:
        raise InputError(
            f"the features of {broken:,} of {len(train) + len(test):,} images are not finite: {checkpoint} is broken; "
            "take an earlier checkpoint of the run"
        )


def pixel_shape(image_size: tuple[int, int], channels: int = 3) -> tuple[int, int, int]:
    """(C, H, W) of the raw pixels of images of that size: theirs, but at most PIXEL_SIDE a side."""
    height, width = (min(PIXEL_SIDE, side) for side in image_size)
    return channels, height, width


def raw_pixels(pixels: Tensor) -> Tensor:
    """Images [B, C, H, W] -> float32 [B, C*h*w], shrunk to `pixel_shape` where they are larger."""
    _, *shape = pixel_shape((pixels.shape[2], pixels.shape[3]))
    values = pixels.float()
    if shape != list(pixels.shape[2:]):
        values = F.interpolate(values, shape, mode="bilinear", antialias=True)
    return values.flatten(1)


def untrained_twin(
    trained: MaskedVisionTransformer, content: Mapping[str, Any], seed: int
) -> tuple[MaskedVisionTransformer, str]:
    """The encoder before its first step, or one like it, and in words which of the two.

    `content` is that of its file. A run draws its first weights under its seed; where the file knows the
    run and it began from drawn weights, these are drawn again, by the same versions the very same ones. A method in
    a file of somebody's own is not run for this: whoever judges weights need not trust their maker.
    """
    config, described = from_json(content.get("config") or {}, "the config of its file"), content["encoder"]
    model, arguments = described["model"], described["arguments"]
    initialize, say_which = None, f"weights drawn with seed {config.get('seed', seed)}"
    if content["method"] in methods.names():
        method = methods.find(content["method"])
        initialize = method.initialize
        if config.get("model"):  # with timm's own parts behind the blocks, which draw numbers too
            model, arguments = (
                config["model"],
                {
                    **{name: arguments[name] for name in ("img_size", "in_chans") if name in arguments},
                    **method.encoder_arguments(config.get("pretrained", False)),
                },
            )
            check_same_size(model, arguments, trained)
    else:
        say_which += f", by timm's initialisation, for the method {content['method']} is no part of this package"
    with seeded(config.get("seed", seed), "weights"):
        vit = build_vit(model, **arguments)
        if initialize is not None:
            initialize(vit)
    twin = MaskedVisionTransformer(vit).eval()
    twin.transform, twin.pool = trained.transform, trained.pool
    if config.get("init") or config.get("pretrained"):
        say_which += "; the run itself began from other weights"
    elif config and initialize is not None:
        say_which += ", those that the run began from"
    return twin, say_which


def check_same_size(model: str, arguments: Mapping[str, Any], trained: MaskedVisionTransformer) -> None:
    """Raises InputError where a model, built without memory, has other weights than the encoder that it began as."""
    try:
        with torch.device("meta"):
            twin = MaskedVisionTransformer(build_vit(model, **arguments)).vit
        check_shapes(twin, trained.vit.state_dict())
    except ValueError as error:
        raise InputError(
            f"the file says that its encoder began as {model}, whose weights are others: {error}"
        ) from error
