"""What a training run is: one flat frozen dataclass whose fields are the options of `train`.

Light on purpose: `--help` reads this file and must not wait for torch.
"""

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from data2vec_vision.errors import InputError, brief

MANY = 1000  # from which on the end of a range is there against mistakes only
LARGEST = 10**18  # of a number; more is a mistake
LARGEST_FILE = 2**26  # bytes of a config.json, which may name very many inputs

GROUPS = ("Images", "Model", "Method", "Optimisation", "Output and resume", "Machine")


def _option(
    group: str,
    default: Any,
    help: str,
    within: str = "",
    *,
    auto: str = "",
    metavar: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """A field that is an option of `train`: `within` is its range, `auto` what None stands for."""
    metadata = dict(group=group, help=help, within=within, auto=auto, metavar=metavar, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


_images, _model, _method, _optim, _output, _machine = (partial(_option, group) for group in GROUPS)


# fmt: off
@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. None is `auto`: `resolve` fills it in from the data and the machine."""

    input_path: str | tuple[str, ...] = ""  # a tuple where there are several

    image_size: int | None = _images(None, "Side of the square views, pixels.", "[1, 65536]", auto="the model's")
    channels: int = _images(3, "Of images; 3: 8-bit RGB, else as stored.", "[1, 65536]")
    normalize: str = _images("auto", "By the mean and deviation of imagenet or dataset.", choices=("auto", "imagenet", "dataset"), metavar="HOW", auto="by the channels")

    model: str | None = _model(None, "Any timm VisionTransformer (see `models`), instead of the sizes below.", metavar="NAME", auto="a ViT-S/16")
    patch_size: int | None = _model(None, "Side of a patch, in pixels.", "[1, 65536]", auto="16")
    hidden_dim: int | None = _model(None, "Width of the encoder.", "[1, 65536]", auto="384")
    n_encoders: int | None = _model(None, "Number of transformer blocks.", "[1, 1000]", auto="12")
    n_heads: int | None = _model(None, "Attention heads.", "[1, 65536]", auto="width / 64")
    dropout: float = _model(0.0, "Dropout in the encoder's blocks.", "[0, 1)")
    pretrained: bool = _model(False, "Start from timm's weights of --model.")
    init: str | None = _model(None, "Start from a student file or a file of timm weights.", metavar="FILE")

    method: str = _method("data2vec", "A name (see `methods`), or a Python file that defines one.", metavar="NAME")
    recipe: str = _method("auto", "Ours, or that of the method's paper for a ViT-B.", choices=("auto", "paper"))
    mask_erase_pct: float | None = _method(None, "Masked share of the image.", "(0, 1)", auto="the method's")
    k: int | None = _method(None, "Top states in the target.", "[1, inf)", auto="the method's")
    beta: float | None = _method(None, "Where smooth L1 turns from square to straight.", "[0, inf)", auto="the method's")
    tau_initial: float | None = _method(None, "Teacher's EMA factor at the start.", "[0, 1]", auto="the method's, or by the steps")
    tau_end: float | None = _method(None, "Teacher's EMA factor after its rise.", "[0, 1]", auto="the method's, or by the steps")
    tau_increase_pct: float | None = _method(None, "Share of the run in which tau rises.", "[0, 1]", auto="the method's")
    set: tuple[str, ...] = _method((), "Another knob of the method (see `methods`); can be repeated.", metavar="NAME=VALUE")

    epochs: int | None = _optim(None, "Passes over the images.", "[1, inf)", auto="by their number")
    batch_size: int | None = _optim(None, "Images in a pass, over all processes.", "[1, 1000000]", auto="64")
    grad_accum: int | None = _optim(None, "Forward passes in one step.", "[1, 1000000]", auto="1")
    max_lr: float | None = _optim(None, "Peak of the one-cycle learning rate.", "(0, inf)", auto="from the images a step")
    warmup_pct: float | None = _optim(None, "Warm-up's share of the run.", "[0, 1)", auto="the method's")
    weight_decay: float | None = _optim(None, "AdamW's decay of matrices.", "[0, inf)", auto="the method's")
    clip_grad: float | None = _optim(None, "Largest norm of a step's gradient; 0: no limit.", "[0, inf)", auto="the method's")
    seed: int = _optim(0, "Seed of everything random.", "[0, inf)")

    checkpoint_out_dir: str | None = _output(None, "Folder that the run writes to.", metavar="DIRECTORY", auto="runs/<input>-<method>")
    resume_checkpoint: str | None = _output(None, "Continue the run that wrote this checkpoint, exactly; auto: the newest in the output folder, if any.", metavar="FILE|auto")
    allow_changed_images: bool = _output(False, "Resume although images have changed.")
    save_every: int = _output(10, "Epochs between saved files; the last epoch is always saved.", "[1, inf)")
    keep: int = _output(3, "Checkpoints of epochs that stay; encoders all do.", "[1, inf)")
    checkpoint_minutes: float = _output(10.0, "Minutes between rolling checkpoints.", "(0, inf)")
    log_every: int = _output(10, "Steps between lines of metrics.jsonl.", "[1, inf)")
    eval_path: str | None = _output(None, "Folder of class folders: log the kNN accuracy on it.", metavar="DIRECTORY")
    eval_every: int | None = _output(None, "Epochs between such evaluations.", "[1, inf)", auto="a tenth of the run")
    no_report: bool = _output(False, "Write no report.html at the end.")
    no_tensorboard: bool = _output(False, "Write no TensorBoard events.")
    wandb: str | None = _output(None, "Log to this project of Weights & Biases too.", metavar="PROJECT")
    config: str | None = _output(None, "The config.json whose settings to take.", metavar="FILE")
    dry_run: bool = _output(False, "Print the plan with time and memory, draw example views, train nothing.")

    device: str | None = _machine(None, "cpu, cuda, cuda:1, mps, ...", metavar="NAME", auto="the best present")
    precision: str = _machine("auto", "Of the forward pass; weights are fp32.", choices=("auto", "bf16", "fp16", "fp32"), auto="from the device")
    compile: bool | None = _machine(None, "Compile the method with torch.compile.", auto="long runs in bf16 on a CPU")
    grad_checkpointing: bool = _machine(False, "Recompute activations in the backward pass: less memory, slower.")
    deterministic: bool = _machine(False, "On a GPU too, the same command gives the same bits; slower.")
    workers: int | None = _machine(None, "Processes that read images; 0: none beside the main one.", "[0, 1000]", auto="from the cores")
    cache: str = _machine("none", "Keep images decoded in memory, if they fit.", choices=("none", "ram"))
    debug: bool = _machine(False, "Show the traceback of an error.")

    def __post_init__(self) -> None:
        if isinstance(self.input_path, (list, tuple)) and len(self.input_path) <= 1:  # as the command line has it
            object.__setattr__(self, "input_path", "".join(self.input_path))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The paths of the images, however many."""
        return inputs_of(self.input_path)

    @property
    def images_a_step(self) -> int:
        """Of a configuration in which batch size and accumulation are no longer on auto."""
        return self.batch_size * self.grad_accum
# fmt: on


LONG_WORK = 4e14  # FLOP a core, of forward passes: in bf16 about two hours of data2vec, half an hour of MAE
SEEN, MOST_EPOCHS = 2_000_000, 800  # what the peers' small-data runs take: 200 to 800 epochs of 9,500 images
SIZES = ("patch_size", "hidden_dim", "n_encoders", "n_heads")
# What belongs to one call and not to the run: never taken over from a file.
OF_THE_CALL = (
    "checkpoint_out_dir", "resume_checkpoint", "allow_changed_images", "config", "dry_run", "debug",
)  # fmt: skip


def inputs_of(given: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """INPUT_PATH, one or several, as a tuple; empty where there is none."""
    if isinstance(given, str | os.PathLike):
        return (os.fspath(given),) if given else ()
    return tuple(given)


def default_epochs(n_images: int) -> int:
    """Passes over so many images where nobody says how many: 100, more where that is less than SEEN images."""
    return min(MOST_EPOCHS, max(100, math.ceil(SEEN / n_images)))


def default_prototypes(n_images: int, most: int) -> int:
    """How many prototypes: the power of two below an eighth of the images, at least 64 and at most `most`."""
    return min(most, max(64, 2 ** int(math.log2(max(1, n_images / 8)))))


def flag(name: str) -> str:
    """The option of a field: tau_end -> --tau-end."""
    return "--" + name.replace("_", "-")


def fields() -> dict[str, dataclasses.Field]:
    """The options of `train` by field name, in the order of `--help`: all but INPUT_PATH."""
    return {f.name: f for f in dataclasses.fields(TrainConfig) if f.metadata}


def not_default(config: TrainConfig) -> dict[str, Any]:
    """What somebody who built `config` in Python may be taken to have said."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value != getattr(TrainConfig, name)}


def field_type(name: str) -> type:
    """The type of an option's value, leaving out the None of `auto`."""
    hint = get_type_hints(TrainConfig)[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None))
    return get_origin(hint) or hint


def check_interval(name: str, value: float, within: str) -> None:
    """Raises InputError unless `value` lies in `within`, such as "(0, 1]"; names what to give instead."""
    if not abs(value) < LARGEST:  # nan neither
        kind = "a finite number" if value != value or abs(value) == math.inf else f"less than {LARGEST:.0e}"
        raise InputError(f"{name} must be {kind}, got {brief(value)}")
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value > low if within[0] == "(" else value >= low
    below = value < high if within[-1] == ")" else value <= high
    if above and below:
        return
    hint = f"; use {value / 100:g} for {value:g} %" if high == 1 and 1 < value <= 100 else ""
    if above and high >= MANY:
        allowed = f"at most {high:,.0f}"
    elif high >= MANY:
        allowed = f"{'more than' if within[0] == '(' else 'at least'} {low:g}"
    else:
        ends = {"()": ", both excluded", "[)": f", {high:g} excluded", "(]": f", {low:g} excluded", "[]": ""}
        allowed = f"between {low:g} and {high:g}{ends[within[0] + within[-1]]}"
    raise InputError(f"{name} must be {allowed}, got {value:g}{hint}")


def check(config: TrainConfig) -> None:
    """Raises InputError, naming the option and what to give instead, for settings that cannot be meant."""
    for name, field in fields().items():
        value, choices = getattr(config, name), field.metadata["choices"]
        if field.metadata["within"] and value is not None:
            check_interval(flag(name), value, field.metadata["within"])
        if choices and value not in choices:
            raise InputError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")
    first, last = config.tau_initial, config.tau_end
    if first is not None and last is not None and last < first:
        raise InputError(f"--tau-end {last:g} is below --tau-initial {first:g}, but tau rises during a run")
    if config.model:
        if typed := [flag(name) for name in SIZES if getattr(config, name) is not None]:
            raise InputError(
                f"--model {config.model} has sizes of its own; leave out {' and '.join(typed)}, or --model"
            )
    elif config.pretrained:
        raise InputError("--pretrained needs --model NAME, the timm model whose weights it loads")
    else:
        _check_sizes(config)
    if config.normalize == "imagenet" and config.channels not in (1, 3):
        raise InputError(
            f"--normalize imagenet is for 1 or 3 channels, not {config.channels}; give --normalize dataset"
        )
    if config.pretrained and config.init:
        raise InputError("--pretrained and --init both say where to start from; give one of them")


def _check_sizes(config: TrainConfig) -> None:
    size, patch, width = config.image_size or 224, config.patch_size or 16, config.hidden_dim or 384
    if size % patch or size == patch:
        near = patch * max(2, round(size / patch))
        why = f"is not divisible by --patch-size {patch}" if size % patch else "is a single patch"
        raise InputError(f"--image-size {size} {why}; use --image-size {near}, or another --patch-size")
    heads = config.n_heads or default_heads(width)
    if heads is None:
        raise InputError(
            f"--hidden-dim {width} is not a multiple of 64; use --hidden-dim {64 * round(width / 64)}, or give --n-heads"
        )
    if width % heads:
        near = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))
        raise InputError(f"--n-heads {heads} does not divide --hidden-dim {width}; use --n-heads {near}")


def default_heads(width: int) -> int | None:
    """Heads of 64 channels, a single one below that; None where 64 does not divide the width."""
    if width <= 64:
        return 1
    return width // 64 if width % 64 == 0 else None


def read_config(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's config.json, with `given`, the typed options, in place of the file's.

    Raises InputError for a file that is not a config.json.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is a folder, a device or a pipe")
        if (size := os.path.getsize(path)) > LARGEST_FILE:
            raise OSError(f"{size:,} bytes are too many for settings")
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--config {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no settings; give the config.json of a run")
    values = from_json(values, f"--config {path}")
    for name in ("recipe", "method"):  # all of the recipe is in the file, of that method
        then = values.get(name, getattr(TrainConfig, name))
        if "paper" in (values.get("recipe"), given.get("recipe")) and given.get(name, then) != then:
            raise InputError(f"{flag(name)} {given[name]} contradicts --config {path}, which has {then}; give only one")
    if given.get("method", method := values.get("method", TrainConfig.method)) != method:
        values.pop("set", None)  # knobs of the other method
    if "model" in given:
        values = {name: value for name, value in values.items() if name not in (*SIZES, "image_size")}
    elif any(name in given for name in SIZES):
        values.pop("model", None)
    return {**{name: value for name, value in values.items() if name not in OF_THE_CALL}, **given}


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that comes twice, of which Python would take the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{brief(name)} comes twice")
        found[name] = value
    return found


def from_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings as a file has them -> as TrainConfig has them. Raises InputError for unknown ones and other types."""
    known, result = {f.name: f for f in dataclasses.fields(TrainConfig)}, {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name)[:50], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where} has an unknown setting {brief(name)}{hint}")
        kind = field_type(name)
        texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        if name == "set" and texts:
            value = tuple(value)
        elif name == "input_path" and texts:
            value = tuple(value) if len(value) > 1 else "".join(value)
        elif kind is float and type(value) is int and abs(value) < LARGEST:
            value = float(value)
        elif not (type(value) is kind or (value is None and known[name].default is None)):
            raise InputError(f"{where}: {name} must be of type {kind.__name__}, got {brief(value)}")
        result[name] = value
    return result


def to_json(config: TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


@dataclass(frozen=True)
class Facts:
    """What `resolve` needs to know of the images, the encoder, the method and the machine."""

    n_images: int
    image_size: int  # pixels, of the encoder that was built
    depth: int  # blocks
    recipe: Mapping[str, Any]  # what the method says of options left on auto
    device: str  # its kind, without a number: each process of a run has its own
    native_bf16: bool  # whether the device multiplies bf16 matrices in hardware
    cores: int
    local_processes: int = 1  # that share the cores
    flops: float = 0.0  # of the encoder's forward pass over one image
    compiler: bool = False  # whether there is one for torch.compile on the device
    steps: int | None = None  # of the run, where they are not those of its epochs
    pretrained: bool = False  # whether the encoder has trained weights


def name_of(inputs: Sequence[str]) -> str:
    """What to call the images at these paths: photos, or photos-and-2-more; by a pattern, the folder that it is about."""
    path = Path(inputs[0] if inputs else "")
    while any(sign in path.name for sign in "*?[{") and not path.exists():
        path = path.parent
    path = path.resolve()
    name = (path.stem if path.is_file() else path.name) or "images"
    return name + (f"-and-{len(inputs) - 1}-more" if len(inputs) > 1 else "")


def default_folder(inputs: Sequence[str], method: str) -> str:
    """Where a run writes to when nobody says it."""
    return str(Path("runs") / f"{name_of(inputs)}-{Path(method).stem}")


def steps_per_epoch(config: TrainConfig, n_images: int) -> int:
    """Steps in which every image is seen at least once; every step is full."""
    return -(-n_images // config.images_a_step)


def resolve(config: TrainConfig, facts: Facts) -> tuple[TrainConfig, dict[str, str]]:
    """Fill in what was left on auto. Returns the full configuration and the reason for each value filled in."""
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def fill(name: str, value: Any, reason: str) -> None:
        if getattr(config, name) in (None, "auto") and name not in values:
            values[name], reasons[name] = value, reason

    epochs = default_epochs(facts.n_images)
    fill("epochs", epochs, "the default" if epochs == 100 else f"{epochs * facts.n_images:,} images seen")
    fill("batch_size", 64, "the default")
    fill("grad_accum", 1, "the default")
    config = dataclasses.replace(config, **values)
    fill("image_size", facts.image_size, "the model's own")
    if not config.model:
        fill("patch_size", 16, "ViT-S/16")
        fill("hidden_dim", 384, "ViT-S/16")
        fill("n_encoders", facts.depth, "ViT-S/16")
        fill("n_heads", default_heads(config.hidden_dim or 384), "width / 64")
    if "tau_memory" in facts.recipe:
        # The teacher remembers 1 / (1 - tau) steps: this share of the run, at first a tenth of that.
        memory = facts.recipe["tau_memory"] * (facts.steps or config.epochs * steps_per_epoch(config, facts.n_images))
        why = f"the teacher's memory is {memory:,.0f} steps, {facts.recipe['tau_memory']:.0%} of the run".replace(
            "%", " %"
        )
        last = round(1 - 1 / max(memory, 10), 6)
        if memory < 10:
            why = "the teacher's memory is 10 steps at least"
        if (config.tau_initial or 0) > last:
            last, why = config.tau_initial, "as --tau-initial, which is more than the rule gives"
        fill("tau_end", last, why)
        first = min(values.get("tau_end", config.tau_end), round(1 - 1 / max(memory / 10, 2), 6))
        fill("tau_initial", first, "a tenth of that memory at first")
    elif "tau_end" in facts.recipe:  # the method's own, unless the other end was typed beyond it
        why, first, last = (
            f"default of {Path(config.method).stem}",
            *(facts.recipe[n] for n in ("tau_initial", "tau_end")),
        )
        if (config.tau_initial or 0) > last:
            fill("tau_end", config.tau_initial, "as --tau-initial, which is more than the method's default")
        fill("tau_end", last, why)
        if first > (last := values.get("tau_end", config.tau_end)):
            fill("tau_initial", last, "as --tau-end, which is less than the method's default")
        fill("tau_initial", first, why)
    if "max_lr_at_256" in facts.recipe:
        lr = facts.recipe["max_lr_at_256"] * math.sqrt(config.images_a_step / 256)
        fill("max_lr", float(f"{lr:.2g}"), f"{facts.recipe['max_lr_at_256']:g} x root of {config.images_a_step} / 256")
    if "k" in facts.recipe:
        fill("k", facts.recipe["k"] or facts.depth, "all blocks of the encoder")
    for name, value in facts.recipe.items():
        if name in fields():
            fill(name, value, f"default of {Path(config.method).stem}")
    fill("eval_every", max(1, config.epochs // 10), "a tenth of the run")
    fill("device", facts.device, "the best present")
    fast, why = ("bf16", "computes bf16 in hardware") if facts.native_bf16 else ("fp32", "has no fast bf16")
    fill("precision", fast, f"{facts.device} {why}")
    fill(
        "workers",
        min(8, max(1, facts.cores // facts.local_processes - 1)) if facts.cores > 1 else 0,
        f"{facts.cores} cores",
    )
    # The whole run's forward passes; a compiler takes a minute or two and then gains 5 to 22 % on a CPU.
    work = facts.flops * facts.n_images * config.epochs
    pays = facts.device == "cpu" and values.get("precision", config.precision) == "bf16" and facts.compiler
    long = work > LONG_WORK * facts.cores
    fill("compile", pays and long, "a long run on a CPU")
    fill("checkpoint_out_dir", default_folder(config.inputs, config.method), "")
    return dataclasses.replace(config, **values), reasons
