"""The methods: each a file in this folder, whose name is its `--method` name."""

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch
from timm.models.vision_transformer import VisionTransformer

from data2vec_vision.checkpoint import read_training
from data2vec_vision.config import TrainConfig, flag, from_json
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.knobs import choices, knobs, knobs_from
from data2vec_vision.methods.base import Method
from data2vec_vision.recipes import command_options, packed
from data2vec_vision.untrusted import check_description, check_shapes
from data2vec_vision.vit import build_vit

_files: set[str] = set()  # the modules that are files of the user's


def names() -> list[str]:
    """The methods that come with the package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "latent"))


def find(name: str) -> type[Method]:
    """The Method of `--method`: by name, or the one defined in a Python file of the user's.

    Raises InputError for an unknown name and for a file without exactly one Method.
    """
    if name in names():
        return _only_method(importlib.import_module(f"{__name__}.{name}"), name)
    if name.endswith(".py"):
        return _only_method(_import_file(Path(name)), name)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
    raise InputError(f"there is no method {name!r}; {hint}")


def load_method(path: str | os.PathLike[str], map_location: Any = "cpu") -> Method:
    """The whole method in a training checkpoint, with its teacher, heads and decoder, in eval mode.

    For a look inside, such as MAE's reconstructions; a run is continued with `train --resume-checkpoint`.
    Raises InputError for any other file.
    """
    content = read_training(path)
    config = TrainConfig(**from_json(content["config"], str(path)))
    described = content["encoders"]["student"]["encoder"]
    method_class = find(config.method)
    knobs = knobs_from(method_class.Config, config, config.method)

    def build() -> VisionTransformer:
        return build_vit(described["model"], **described["arguments"])

    try:
        check_description(described, content["encoders"]["student"]["state_dict"])
        if (twin := without_memory(method_class, build, knobs)) is not None:
            check_shapes(twin, content["method_state"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from error
    method = method_class(build(), **knobs)
    method.load_content(content, path)
    return method.to(map_location).eval()


def without_memory(
    method_class: type[Method], build: Callable[[], VisionTransformer], values: dict[str, Any]
) -> Method | None:
    """The method with the knobs `values` and an encoder, to see their sizes: no memory is taken for their numbers.

    None for a user's own that cannot be built so.
    """
    with torch.device("meta"):
        vit = build()
        try:
            return method_class(vit, **values)
        except InputError:
            raise
        except Exception:
            if method_class.__module__.startswith(__name__):
                raise
            return None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"--method {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    if not path.stem.isidentifier():
        raise InputError(f"--method {path}: {path.stem!r} cannot be the name of a module; rename the file")
    other = None if path.stem in _files else importlib.util.find_spec(path.stem)
    if other is not None and other.origin is not None and os.path.realpath(other.origin) != os.path.realpath(path):
        raise InputError(f"--method {path}: there is a module named {path.stem!r} already; rename the file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    _files.add(path.stem)
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)  # so that worker processes find what they unpickle
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to read
        raise InputError(f"--method {path} cannot be imported: {one_line(error)}") from error
    return module


def _only_method(module: ModuleType, name: str) -> type[Method]:
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise InputError(f"--method {name} must define one class derived from Method, it defines {len(found)}")
    return found[0]


def explain(name: str | None) -> str:
    """The methods in a line each, or one with its recipe, and its knobs with default, range and the paper's value."""
    if name is None:
        return "\n".join(f"{n:<10} {first_line(find(n))}" for n in names())
    method = find(name)
    recipe = dict(method.recipe)
    memory, rate = recipe.pop("tau_memory", None), recipe.pop("max_lr_at_256", None)
    settings = [f"{flag(option)} {_shown(value)}" for option, value in recipe.items()]
    if rate is not None:
        settings.insert(0, f"{flag('max_lr')} {rate:g} x root of images a step / 256")
    rows = [first_line(method), "", f"AdamW: {', '.join(settings)}", ""]
    hints = get_type_hints(method.Config)
    for knob, field in knobs(method.Config).items():
        about = field.metadata
        rows.append(f"{flag(about['option']) if about['option'] else f'--set {knob}=VALUE':<32} {about['meaning']}")
        default = _shown(field.default)
        if memory is not None and about["option"] in ("tau_initial", "tau_end"):
            default = f"from the length of the run, of which the teacher remembers {memory:.0%}".replace("%", " %")
        within = " or ".join(map(str, choices(hints[knob]))) or (about["within"] and f"in {about['within']}")
        parts = [f"default {default}", within]
        parts.append(about["paper"] and f"the paper's {about['paper']}")
        rows.append(f"{'':<32} {', '.join(filter(None, parts))}")
    if method.paper is not None:
        rows += ["", f"--recipe paper: {method.paper.source}", *packed(command_options(method.paper), 110)]
    return "\n".join(rows)


def _shown(value: Any) -> str:
    """A value as it is typed."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def first_line(method: type[Method]) -> str:
    return (method.__doc__ or "").strip().splitlines()[0]
