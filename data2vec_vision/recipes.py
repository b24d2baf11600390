"""`--recipe paper`: what a paper trains its ViT-B with, in place of what `train` would choose."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data2vec_vision.config import SIZES, TrainConfig, flag
from data2vec_vision.errors import InputError

VIT_B: dict[str, Any] = {"model": "vit_base_patch16_224", "image_size": 224}


@dataclass(frozen=True)
class PaperRecipe:
    """A paper's settings, and where they stand. AdamW's betas are the method's own."""

    source: str
    options: Mapping[str, Any]  # fields of TrainConfig; batch_size is the paper's images a step
    knobs: Mapping[str, Any]  # the method's other knobs
    notes: str  # what is not as in the paper, and what was taken where its sources differ


def with_paper(config: TrainConfig, paper: PaperRecipe | None) -> TrainConfig:
    """`config` with the paper's value for all that was left on auto; the same as it was without `--recipe paper`.

    The result says all of it, so that neither a resumed nor a repeated run asks for the recipe again.
    Raises InputError where there is no recipe, and for a batch size that does not divide the paper's.
    """
    if config.recipe != "paper":
        return config
    if paper is None:
        raise InputError(f"--recipe paper: the method {config.method} names no paper's recipe; leave the option out")
    values = {name: value for name, value in paper.options.items() if getattr(config, name) is None}
    if any(getattr(config, name) is not None for name in SIZES):
        values.pop("model", None)  # typed sizes are another encoder than the paper's
    if "batch_size" in paper.options:
        values |= sliced(config, paper.options["batch_size"])
    typed = {item.partition("=")[0] for item in config.set}
    knobs = tuple(f"{name}={as_typed(value)}" for name, value in paper.knobs.items() if name not in typed)
    return dataclasses.replace(config, **values, set=(*knobs, *config.set))


def sliced(config: TrainConfig, images: int) -> dict[str, int]:
    """Batch size and accumulation with `images` a step, or what was typed. Raises InputError for no whole number."""
    batch, passes = config.batch_size, config.grad_accum
    if batch is None and passes is None:
        return {"batch_size": images, "grad_accum": 1}
    if batch is not None and passes is not None:
        return {}
    name, other, value = ("batch_size", "grad_accum", batch) if passes is None else ("grad_accum", "batch_size", passes)
    if images % value:
        divisors = [n for n in range(1, images + 1) if images % n == 0]
        near = " or ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - value))[:2])))
        raise InputError(
            f"{flag(name)} {value} does not divide the {images} images a step of the paper's recipe; "
            f"use {flag(name)} {near}, or give {flag(other)} too"
        )
    return {other: images // value}


def as_typed(value: Any) -> str:
    """A value as the command line takes it, with all its digits."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def command_options(paper: PaperRecipe) -> list[str]:
    """The recipe as it would be typed: "--epochs 800", "--set flip=0.5"."""
    options = [f"{flag(name)} {as_typed(value)}" for name, value in paper.options.items()]
    return options + [f"--set {name}={as_typed(value)}" for name, value in paper.knobs.items()]


def compared(paper: PaperRecipe, config: TrainConfig, knobs: Mapping[str, Any]) -> list[str]:
    """The settings of a resolved run that the recipe speaks of, as typed; those that are not the paper's say so.

    `knobs` are the method's, by name.
    """
    items = []
    for name, value in paper.options.items():
        now = getattr(config, name)
        text, papers = f"{flag(name)} {as_typed(now)}", as_typed(value)
        if name == "model" and now is None:
            text, papers = " ".join(f"{flag(size)} {getattr(config, size)}" for size in SIZES), f"{flag(name)} {value}"
        elif name == "batch_size":
            now, text, papers = (
                config.images_a_step,
                f"{text} --grad-accum {config.grad_accum}",
                f"{value} images a step",
            )
        items.append(text if now == value else f"{text} (the paper's: {papers})")
    for name, value in paper.knobs.items():
        text = f"--set {name}={as_typed(knobs[name])}"
        items.append(text if knobs[name] == value else f"{text} (the paper's: {as_typed(value)})")
    return items


def packed(items: list[str], width: int) -> list[str]:
    """The items in lines of at most `width` columns, none of them broken unless it is wider."""
    lines = [""]
    for item in items:
        joined = f"{lines[-1]}  {item}" if lines[-1] else item
        if len(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(item)
    return lines
