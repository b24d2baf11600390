"""A method's own settings: declared once in its Config, set from the command line, explained by `methods`."""

import dataclasses
import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data2vec_vision.config import TrainConfig, check_interval, fields, flag
from data2vec_vision.errors import InputError

# Options of `train` that only some methods have a knob for.
METHOD_OPTIONS = tuple(
    name for name, f in fields().items() if f.metadata["group"] == "Method" and name not in ("method", "recipe", "set")
)


def knob(default: Any, meaning: str, within: str = "", paper: str = "", option: str = "") -> Any:
    """A field of a method's Config.

    `within` is its range, as "(0, 1)" or "[1, inf)"; `paper` the paper's value; `option` the field of
    TrainConfig that sets it, for a knob with an option of its own. None means: from the encoder or the data.
    """
    metadata = {"meaning": meaning, "within": within, "paper": paper, "option": option}
    return dataclasses.field(default=default, metadata=metadata)


def knobs(config_class: type) -> dict[str, dataclasses.Field]:
    """The knobs of a method's Config, by name."""
    return {f.name: f for f in dataclasses.fields(config_class)}


def check_knobs(config: Any) -> None:
    """Raises InputError for a value out of its range or not among its choices."""
    hints = get_type_hints(type(config))
    for name, field in knobs(type(config)).items():
        value, allowed = getattr(config, name), choices(hints[name])
        if allowed and value not in allowed:
            raise InputError(f"{_name(field)} must be {' or '.join(map(str, allowed))}, got {value!r}")
        if not allowed:
            _check_type(_name(field), value, hints[name])
        if field.metadata["within"] and value is not None:
            check_interval(_name(field), value, field.metadata["within"])


def option_defaults(config_class: type) -> dict[str, Any]:
    """{option of `train`: default} of the knobs that have an option."""
    return {f.metadata["option"]: f.default for f in knobs(config_class).values() if f.metadata["option"]}


def knobs_from(config_class: type, config: TrainConfig, method: str) -> dict[str, Any]:
    """The knobs that `config` sets, by its options and by `--set`.

    Raises InputError for an option that the method does not have, an unknown knob, and a value of another type.
    """
    known, hints = knobs(config_class), get_type_hints(config_class)
    by_option = {f.metadata["option"]: name for name, f in known.items() if f.metadata["option"]}
    values = {}
    for name in METHOD_OPTIONS:
        if getattr(config, name) is None:
            continue
        if name not in by_option:
            raise InputError(f"the method {method} does not use {flag(name)}; leave it out")
        values[by_option[name]] = getattr(config, name)
    for item in config.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set {item} must be NAME=VALUE")
        if name in by_option:
            raise InputError(f"--set {name}: this knob has an option of its own, {flag(name)}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"`methods {method}` lists them"
            raise InputError(f"the method {method} has no knob {name!r}; {hint}")
        if known[name].metadata["option"]:
            raise InputError(
                f"--set {name}: this knob has an option of its own, {flag(known[name].metadata['option'])}"
            )
        values[name] = _parse(name, text, hints[name])
    return values


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if allowed := choices(hint):
        if text not in map(str, allowed):
            raise InputError(f"--set {name}={text}: it must be {' or '.join(map(str, allowed))}")
        return next(value for value in allowed if str(value) == text)
    if type(None) in get_args(hint) and text.lower() in ("none", "auto"):
        return None
    kind = kinds[0]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"--set {name}={text}: it must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise InputError(f"--set {name}={text}: it must be {number}") from None


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raises InputError for a value of another type than the knob's; a whole number is a number too."""
    kinds = get_args(hint) or (hint,)
    if type(value) in kinds or (float in kinds and type(value) is int):
        return
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none", str: "a text"}
    raise InputError(f"{name} must be {' or '.join(words[k] for k in kinds)}, got {value!r}")


def choices(hint: Any) -> tuple[Any, ...]:
    """What a knob of that type may be, where it is a Literal."""
    return get_args(hint) if get_origin(hint) is Literal else ()


def _name(field: dataclasses.Field) -> str:
    return flag(field.metadata["option"]) if field.metadata["option"] else field.name
