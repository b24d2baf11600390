"""Files of weights from anywhere: read without running their code, and never larger in memory than on the disk.

`torch.load(weights_only=True)` refuses code and storages that are not as long as the file says. What it lets through
and this does not: parts that are compressed, tensors that claim more numbers than their storage holds (by strides of
0), tensors without numbers, and what is no plain tensor. Sizes of an encoder are compared with its weights before
memory is asked for.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data2vec_vision.errors import InputError, brief, one_line
from data2vec_vision.vit import MaskedVisionTransformer, build_vit

ZIP = b"PK\x03\x04"  # how a file of torch.save begins; those of torch before 1.6 are no zip
# What `architecture` writes. timm takes more, which would read other files or go to the network.
ARGUMENTS = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "class_token", "reg_tokens", "no_embed_class",
             "global_pool", "num_heads", "qkv_bias", "init_values"}  # fmt: skip


def read(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """The content of a file that torch.save wrote, on the CPU. Raises InputError for any other, running none of it.

    With `mmap` tensors are read when they are looked at.
    """
    check_is_file(path, "give one of the .pt files in it")
    try:
        refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for tensor in tensors_in(content):
            refuse_strange(tensor, path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a file of weights, or would run code when loaded; it was not loaded"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise InputError(f"{path} cannot be read, it is damaged or no checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no checkpoint but a {type(content).__name__}")
    return content


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensors in a file of safetensors, whose header is checked against its size. Raises InputError for another."""
    check_is_file(path, "give a file in it")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def check_is_file(path: str | os.PathLike[str], remedy: str) -> None:
    """Raises InputError unless `path` is a file; a pipe would be waited for, and a device read, without end."""
    if not os.path.exists(path):
        raise InputError(f"there is no file {path}")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; {remedy}")
    if not os.path.isfile(path):
        raise InputError(f"{path} is a device or a pipe, not a file")


def refuse_compressed(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a file that would take more memory than it has bytes; torch.save compresses nothing."""
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    if size > os.path.getsize(path):
        raise InputError(
            f"{path} is {os.path.getsize(path):,} bytes and would become {size:,} in memory; "
            "no file of weights is compressed within, it was not loaded"
        )


def check_sums(path: str | os.PathLike[str]) -> None:
    """Raises InputError for a file of ours in which a byte is not as it was written; torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged archives make the library raise nearly anything
        raise InputError(f"{path} is damaged: {one_line(error)}; copy it again, or take an earlier file") from error
    if damaged:
        raise InputError(
            f"{path} is damaged: the checksum of {damaged} differs; copy it again, or take an earlier file"
        )


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in dictionaries, lists and tuples, each part once however often and deep it is used."""
    waiting, seen = [content], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list | tuple | set):
            waiting += part


def refuse_strange(tensor: Tensor, path: str | os.PathLike[str]) -> None:
    """Raises InputError for a tensor that is not plain numbers in memory, or has more of them than the file."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        raise InputError(f"{path} holds what is no plain tensor ({type(tensor).__name__}, {tensor.layout})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{path} is damaged: a tensor of the shape {list(tensor.shape)} has only "
            f"{tensor.untyped_storage().nbytes():,} bytes"
        )


def check_description(described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a description of an encoder whose sizes are not those of its weights.

    It is built without memory for that, once its number of blocks is known to be no more than that of the weights.
    """
    arguments = described["arguments"]
    if unknown := sorted(str(name) for name in set(arguments) - ARGUMENTS):
        raise ValueError(f"no encoder is described by {', '.join(unknown)}")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()):
        raise ValueError("its weights are no tensors with names")
    if int(arguments.get("depth", 0)) > len(weights):
        raise ValueError(f"it says that it has {brief(arguments['depth'])} blocks, of {len(weights)} weights")
    with torch.device("meta"):
        twin = MaskedVisionTransformer(build_vit(described["model"], **arguments)).vit
    check_shapes(twin, weights)


def check_shapes(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first misfit, unless the weights are those of the module by names and shapes."""
    expected = module.state_dict()
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{missing[0]} is missing")
    if others := [name for name in weights if name not in expected]:
        raise ValueError(f"{others[0]} does not belong to it")
    for name, tensor in expected.items():
        if not isinstance(weights[name], Tensor):
            raise ValueError(f"{name} is {brief(weights[name])}, no tensor")
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}, and should be {list(tensor.shape)}")
