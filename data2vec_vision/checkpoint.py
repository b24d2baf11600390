"""Files: students that anyone can load, training checkpoints that continue a run, writes that cannot tear.

A file that would run code, or take more memory than it has bytes, is refused (see untrusted.py), and
every write goes to a temporary file that is flushed to the disk and then renamed, so that a killed run
leaves either the old file or the new one.
"""

import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from data2vec_vision.contents import STUDENT, TRAINING, VERSION, check_content, format_of
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.untrusted import check_description, read, read_safetensors
from data2vec_vision.vit import MaskedVisionTransformer, architecture, build_vit


@dataclass(frozen=True)
class Start:
    """What comes with the first weights of an encoder, where their file knows it."""

    normalization: dict[str, Any] = field(default_factory=dict)  # mean and std expected of images
    mask_token: Tensor | None = None  # [1, 1, D]
    channels: int | None = None  # that the weights are for, before they were made to fit


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file opened for writing that takes the name `path` only when it is complete and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_place(option: str, target: Path, folder: bool = False, remedy: str = "") -> None:
    """Raises InputError, naming the option and the `remedy`, unless a file, or a `folder`, can be made at `target`."""
    if not folder and target.is_dir():
        raise InputError(f"{option} {target} is a folder; give a file")
    if not target.parent.is_dir():
        raise InputError(f"{option} {target}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{option} {target}: the folder {target.parent} cannot be written to{remedy}")


def refuse_overwriting(option: str, target: Path, *inputs: str | os.PathLike[str] | None) -> None:
    """Raises InputError when an output would replace what the command reads."""
    for given in inputs:
        if given and os.path.exists(given) and target.exists() and os.path.samefile(target, given):
            raise InputError(f"{option} {target} is a file that this command reads; give another name")


def sync_folder(folder: Path) -> None:
    """Puts a rename on the disk too, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a file of weights. Raises OSError when the disk does not take it."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # by which torch hides what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def encoder_content(encoder: MaskedVisionTransformer) -> dict[str, Any]:
    """Everything that is needed to use `encoder` again. `state_dict` has timm's own names."""
    return {
        "pool": encoder.pool,
        "encoder": architecture(encoder.vit),
        "state_dict": encoder.vit.state_dict(),
        "mask_token": None if encoder.mask_token is None else encoder.mask_token.detach(),
        "transform": encoder.transform.to_dict(),
    }


def save_encoder(encoder: MaskedVisionTransformer, path: str | os.PathLike[str], method: str, **about: Any) -> None:
    """Write a student file, which this library and timm can load.

    `about` are plain values to keep with it: epoch, step, config. Raises InputError for an encoder that
    no timm name and arguments describe.
    """
    save(path, {"format": STUDENT, "version": VERSION, "method": method, **encoder_content(encoder), **about})


def load_encoder(
    path: str | os.PathLike[str], map_location: Any = "cpu", which: str = "student"
) -> tuple[MaskedVisionTransformer, dict[str, Any]]:
    """The encoder of a student, teacher or training file, in eval mode, and the file's other content.

    `which` chooses the student or the teacher of a training file. Raises InputError for any other file.
    """
    content = read(path)
    if format_of(content) is None:
        raise InputError(f"{path} is no file of this tool; give a student_*.pt, teacher_*.pt or checkpoint_*.pt")
    check_content(path, content)
    if content["format"] == TRAINING:
        if which not in content["encoders"]:
            raise InputError(f"{path} holds no {which}: the method {content['method']} has none")
        content = content | content["encoders"][which]
    elif which != "student":
        raise InputError(f"{path} holds one encoder; --encoder {which} is for a checkpoint_*.pt, leave it out")
    try:
        described = content["encoder"]
        check_description(described, content["state_dict"])
        encoder = MaskedVisionTransformer(
            build_vit(described["model"], **described["arguments"]), mask_token=content["mask_token"] is not None
        ).to(map_location)
        encoder.vit.load_state_dict(content["state_dict"])
        if encoder.mask_token is not None:
            encoder.mask_token.data.copy_(content["mask_token"])
        encoder.transform = ImageTransform.from_dict(content["transform"])
        check_transform(encoder)
        encoder.pool = content["pool"]
        encoder.check_pool(encoder.pool)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the weights in {path} do not fit its own description: {one_line(error)}") from error
    except Exception as error:  # of what anybody may have written into it
        raise InputError(f"{path} is damaged: {one_line(error)}") from error
    return encoder.eval(), content


def save_training(folder: Path, content: dict[str, Any]) -> None:
    """Write checkpoint_last.pt."""
    save(folder / "checkpoint_last.pt", {"format": TRAINING, "version": VERSION, **content})


def keep_training(folder: Path, epoch: int) -> None:
    """Give checkpoint_last.pt the name checkpoint_{epoch}.pt as well.

    The second name is a link, which costs neither time nor space; the next checkpoint_last.pt is a new
    file and leaves it alone.
    """
    last, kept, temporary = (
        folder / name for name in ("checkpoint_last.pt", kept_name(epoch), f".{kept_name(epoch)}.tmp")
    )
    try:
        temporary.unlink(missing_ok=True)
        os.link(last, temporary)
        os.replace(temporary, kept)
        sync_folder(folder)
    except OSError:  # a file system without links
        with atomic_write(kept) as file, open(last, "rb") as written:
            shutil.copyfileobj(written, file)


def kept_name(epoch: int) -> str:
    """Of the last file that is written of an epoch."""
    return f"checkpoint_{epoch}.pt"


def prune(folder: Path, keep: int) -> None:
    """Remove each checkpoint_{epoch}.pt but the `keep` that were written last; encoders and checkpoint_last.pt stay."""
    found = [path for path in folder.glob("checkpoint_*.pt") if path.stem.removeprefix("checkpoint_").isdecimal()]
    # A run that was resumed from an early epoch writes earlier ones than lie there.
    found.sort(key=lambda path: (path.stat().st_mtime_ns, int(path.stem.removeprefix("checkpoint_"))))
    for path in found[:-keep]:
        path.unlink()


def read_training(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """The content of a training checkpoint, on the CPU, see `read`. Raises InputError for any other file."""
    content = read(path, mmap=mmap)
    if format_of(content) == STUDENT:
        raise InputError(f"{path} holds an encoder only and cannot continue a run; give a checkpoint_*.pt")
    if format_of(content) != TRAINING:
        raise InputError(f"{path} is no checkpoint of this tool; give a checkpoint_*.pt that `train` wrote")
    check_content(path, content)
    return content


def load(path: str | os.PathLike[str], map_location: Any = "cpu", which: str = "student") -> MaskedVisionTransformer:
    """The encoder in a student, teacher or training file, in eval mode; see `load_encoder`."""
    encoder = load_encoder(path, map_location, which)[0]
    warn_of_broken(encoder.state_dict(), path)
    return encoder


def warn_of_broken(weights: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Warns of weights that are not finite: whatever is computed with them is not finite either."""
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        warnings.warn(f"{path}: {broken[0]} has values that are not finite; take an earlier file", stacklevel=3)


def check_transform(encoder: MaskedVisionTransformer) -> None:
    """Raises ValueError unless the images that the transform makes are those that the encoder takes."""
    transform = encoder.transform
    if transform.image_size != encoder.image_size or len(transform.mean) != len(transform.std):
        raise ValueError(f"its images are {transform.image_size} and the encoder takes {encoder.image_size}")
    numbers = (*transform.mean, *transform.std)
    if transform.channels != encoder.vit.patch_embed.proj.in_channels or not all(map(math.isfinite, numbers)):
        raise ValueError(f"mean and deviation {transform.mean}, {transform.std} are not those of its channels")
    if not all(transform.std):
        raise ValueError("a deviation is 0")


def load_weights(vit: VisionTransformer, path: str | os.PathLike[str]) -> Start:
    """Start `vit` from a file of ours, or from a file of timm weights (.pt, .pth, .bin, .safetensors).

    Of a training checkpoint it is the student. Position embeddings and patch kernels of another size are
    resampled, and kernels of three channels, or for one channel, adapted, as timm does; a classifier head is left out.
    Returns what else the file has for a start.
    Raises InputError, naming the first misfit, when the weights are of another architecture.
    """
    content = read_safetensors(path) if str(path).endswith(".safetensors") else read(path)
    if (ours_is := format_of(content)) is not None:
        check_content(path, content)
    if ours_is == TRAINING:
        content = content["encoders"]["student"]
    found = content.get("state_dict", content.get("model", content))
    if not isinstance(found, dict):
        raise InputError(f"--init {path} holds no weights of a ViT but a {type(found).__name__}")
    weights = {name: tensor for name, tensor in found.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if vit.cls_token is None:
        weights = without_class_token(weights)
    try:
        channels = adapt_channels(weights, vit, path)
        weights = checkpoint_filter_fn(weights, vit)
    except InputError:
        raise
    except Exception as error:  # of names and shapes that nobody foresaw
        raise InputError(f"--init {path} holds no weights of a ViT: {one_line(error)}") from error
    # The last norm is `fc_norm` in timm's models that pool before it, and `norm` in student files.
    for ours, other in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if ours + "weight" in vit.state_dict() and ours + "weight" not in weights:
            weights = {ours + k.removeprefix(other) if k.startswith(other) else k: t for k, t in weights.items()}
    for name, tensor in vit.state_dict().items():
        if name not in weights:
            raise InputError(f"--init {path} lacks {name}: it is not for this encoder")
        if weights[name].shape != tensor.shape:
            sizes = f"{list(weights[name].shape)} there, {list(tensor.shape)} here"
            raise InputError(f"--init {path} is for an encoder of another size: {name} is {sizes}")
        if not torch.isfinite(weights[name]).all():
            raise InputError(f"--init {path}: {name} has values that are not finite; give an earlier file")
    vit.load_state_dict({name: weights[name] for name in vit.state_dict()})
    if ours_is is None:
        return Start(channels=channels)
    transform = content["transform"]
    normalization = {n: tuple(map(float, transform[n])) for n in ("mean", "std") if n in transform}
    return Start(normalization, content["mask_token"], channels)


def adapt_channels(weights: dict[str, Any], vit: VisionTransformer, path: str | os.PathLike[str]) -> int | None:
    """Give the patch kernel in `weights` the channels of `vit`. Returns those that it had, where it is found.

    Raises InputError for a kernel of other than three channels where more than one is wanted.
    """
    name, wanted = "patch_embed.proj.weight", vit.patch_embed.proj.in_channels
    kernel = weights.get(name)
    if not isinstance(kernel, Tensor) or kernel.dim() != 4 or kernel.shape[1] == wanted:
        return None
    theirs = kernel.shape[1]
    if theirs != 3 and wanted != 1:
        raise InputError(f"--init {path} is for {theirs} channels, not {wanted}; give --channels {theirs}")
    weights[name] = adapt_input_conv(wanted, kernel) if theirs == 3 else kernel.sum(dim=1, keepdim=True)
    return theirs


def without_class_token(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights for an encoder without class token: the token goes, and its row of the position embedding."""
    if weights.pop("cls_token", None) is None:
        return weights
    position = weights.get("pos_embed")
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    # There is a row for the token when what is left without it and the registers is a square of patches.
    if isinstance(position, Tensor) and math.isqrt(S := position.shape[1] - 1 - registers) ** 2 == S:
        weights["pos_embed"] = position[:, 1:]
    return weights
