"""What is in the files of this tool, and whether a file has it: names, types, and numbers that can be."""

import os
from typing import Any

from torch import Tensor

from data2vec_vision.errors import InputError, brief
from data2vec_vision.untrusted import check_sums

STUDENT, TRAINING = "data2vec_vision.student", "data2vec_vision.training"
VERSION = 1
LARGEST = 2**53  # steps or images: more are a mistake, and no float64 tells them apart
_ENCODER = ("encoder", "state_dict", "mask_token", "transform", "pool")
CONTENT: dict[str, tuple[str, ...]] = {  # what a file of each format cannot do without
    STUDENT: ("version", "method", *_ENCODER),
    TRAINING: ("version", "method", "config", "step", "segments", "method_state", "encoders", "optimizer", "scaler",
               "skipped", "window", "n_images", "fingerprint", "environment"),
}  # fmt: skip
TYPES: dict[str, type | tuple[type, ...]] = {  # of what is in these files
    "version": int, "method": str, "encoder": dict, "state_dict": dict, "transform": dict, "pool": str, "config": dict,
    "mask_token": (Tensor, type(None)), "step": int, "segments": (tuple, list), "method_state": dict, "encoders": dict,
    "optimizer": dict, "scaler": dict, "skipped": int, "window": dict, "n_images": int, "fingerprint": str,
    "environment": dict,
}  # fmt: skip


def check_content(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Raises InputError for a file of ours that is newer than this version, or lacks what its format has."""
    check_types(path, {"version": content.get("version", 0)})
    if content.get("version", 0) > VERSION:
        raise InputError(f"{path} was written by a newer version of this tool (format {content['version']}); update it")
    if lacking := [name for name in CONTENT[content["format"]] if name not in content]:
        raise InputError(f"{path} is damaged: it lacks {', '.join(lacking)}")
    check_types(path, content)
    if content["format"] == TRAINING:
        if "student" not in content["encoders"]:
            raise InputError(f"{path} is damaged: it lacks the student")
        for name, encoder in content["encoders"].items():
            if not isinstance(encoder, dict) or (lacking := [part for part in _ENCODER if part not in encoder]):
                raise InputError(f"{path} is damaged: the {str(name)[:50]} lacks {', '.join(lacking)}")
            check_types(path, encoder)
        check_progress(path, content)
    check_sums(path)


def check_types(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Raises InputError unless the parts of a file of ours are of the types that they are written with."""
    for name, kind in TYPES.items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            shown = brief(content[name])
            raise InputError(f"{path} is damaged: its {name} is a {type(content[name]).__name__}, {shown}")


def check_progress(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Raises InputError unless a training checkpoint says how far its run was in numbers that can be."""
    segments, window = content["segments"], content["window"]
    pairs = [pair for pair in segments if isinstance(pair, tuple | list) and len(pair) == 2]
    whole = all(type(number) is int and 0 <= number < LARGEST for pair in pairs for number in pair)
    if not segments or len(pairs) < len(segments) or not whole or any(total < 1 for _, total in pairs):
        raise InputError(f"{path} is damaged: its segments are {brief(segments)}")
    for name in ("step", "n_images", "skipped"):
        if not 0 <= content[name] < LARGEST:
            raise InputError(f"{path} is damaged: its {name} is {brief(content[name])}")
    numbers = [window.get("in_a_row"), window.get("used"), window.get("health_steps", 0)]
    sums = [window.get("sums"), window.get("health", {})]
    tensors = [tensor for part in sums if isinstance(part, dict) for tensor in part.values()]
    if not (
        all(isinstance(number, int | float) for number in numbers)
        and all(isinstance(part, dict) for part in sums)
        and all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors)
    ):
        raise InputError(f"{path} is damaged: its window is {brief(window)}")


def format_of(content: dict[str, Any]) -> str | None:
    """Which of our formats a file has; None for somebody else's."""
    found = content.get("format")
    return found if isinstance(found, str) and found in CONTENT else None
