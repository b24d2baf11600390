"""Pretrain Vision Transformers by self-supervision on a folder of your own unlabelled images.

The names below are imported on first use, so that the command line answers before torch is loaded.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("transforms",)
_NAMES = {
    "Data2Vec": "methods.data2vec",
    "Data2Vec2": "methods.data2vec2",
    "MSN": "methods.msn",
    "SwAV": "methods.swav",
    "MAE": "methods.mae",
    "IJEPA": "methods.ijepa",
    "Method": "methods.base",
    "Output": "methods.base",
    "knob": "knobs",
    "MaskedVisionTransformer": "vit",
    "MaskedVisionTransformerDecoder": "decoder",
    "Features": "vit",
    "load": "checkpoint",
    "load_method": "methods",
    "open_image": "images",
    "save_encoder": "checkpoint",
    "InputError": "errors",
    "RunFailed": "errors",
}
__all__ = sorted([*_MODULES, *_NAMES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
