"""Everything before the first step: build a run or restore one, and say what it is going to do."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from data2vec_vision import checkpoint, distributed, methods
from data2vec_vision.config import (
    OF_THE_CALL,
    Facts,
    TrainConfig,
    check,
    default_heads,
    flag,
    from_json,
    resolve,
    steps_per_epoch,
)
from data2vec_vision.device import (
    cores,
    device_exists,
    device_memory,
    find_device,
    fused_attention_pays,
    gpu_identity,
    has_compiler,
    make_ready,
    multiplies_bf16,
    set_fused_attention,
    set_grad_checkpointing,
    versions,
)
from data2vec_vision.errors import Finished, InputError
from data2vec_vision.knobs import knobs_from, option_defaults
from data2vec_vision.methods.base import Method
from data2vec_vision.normalization import Normalization, chosen
from data2vec_vision.recipes import as_typed, with_paper
from data2vec_vision.schedules import Plan
from data2vec_vision.seeding import seeded
from data2vec_vision.sources import ImageFolder, check_channels, open_source
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.untrusted import check_shapes
from data2vec_vision.vit import DEFAULT_MODEL, build_vit, forward_flops

# What `resolve` leaves on auto in no run.
ALWAYS_FILLED = ("image_size", "epochs", "batch_size", "grad_accum", "max_lr", "warmup_pct", "weight_decay",
                 "clip_grad", "eval_every", "device", "precision", "workers", "compile")  # fmt: skip
# What a resumed run may do differently, because it does not change what is computed.
MAY_DIFFER = {
    "input_path",
    "device",
    "workers",
    "compile",
    "grad_checkpointing",
    "deterministic",
    "save_every",
    "keep",
    "log_every",
    "checkpoint_minutes",
    "eval_path",
    "eval_every",
    "no_report",
    "no_tensorboard",
    "wandb",
    *OF_THE_CALL,
}


@dataclass
class Job:
    """A run, ready for its next step."""

    config: TrainConfig
    reasons: Mapping[str, str]
    source: ImageFolder
    method: Method
    schedule: Plan
    device: torch.device
    first_step: int = 0
    restored: dict[str, Any] | None = None  # the checkpoint that is continued
    notes: Sequence[tuple[str, str]] = ()  # titles and texts about how images and first weights were made to fit

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.config, len(self.source))

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoint_out_dir or "")

    def environment(self) -> dict[str, str]:
        """What the bits of the result depend on beside the configuration, by name."""
        return versions() | {"device": self.device.type, "compile": str(self.config.compile)}

    @property
    def evaluated_epochs(self) -> list[int]:
        """The epochs after which the kNN of --eval-path is run."""
        every = self.config.eval_every or max(1, self.config.epochs // 10)
        return [e for e in range(self.config.epochs) if (e + 1) % every == 0 or e + 1 == self.config.epochs]

    @property
    def saved_epochs(self) -> list[int]:
        """The epochs after which files are written: every `save_every`th and the last."""
        config = self.config
        return [e for e in range(config.epochs) if (e + 1) % config.save_every == 0 or e + 1 == config.epochs]

    @property
    def half_saved_epoch(self) -> int | None:
        """The epoch whose files a run was killed at, before the last of them was written; None as a rule."""
        if self.restored is None or self.first_step % self.steps_per_epoch:
            return None
        epoch = self.first_step // self.steps_per_epoch - 1
        missing = checkpoint.kept_name(epoch) not in self.restored["beside"]
        return epoch if missing and epoch in self.saved_epochs else None


def prepare(config: TrainConfig, steps: int | None = None, transform: ImageTransform | None = None) -> Job:
    """The run that `config` describes, of so many `steps` if given, else of its epochs.

    `transform` is that of a run that has been, whose mean and deviation need not be measured again. Raises InputError,
    naming the option, for what cannot be.
    """
    check(config)
    if not config.input_path:
        raise InputError("say which images to train on: train INPUT_PATH")
    method_class = methods.find(config.method)
    config = with_paper(config, method_class.paper)
    knobs_from(method_class.Config, config, config.method)  # refuses what the method does not use
    device = find_device(config.device)
    refuse_beyond_memory(config, method_class)
    source = open_source(config.inputs)
    check_channels(source, config.channels)
    with seeded(config.seed, "weights"):
        vit, start = build_encoder(config, method_class)
        facts = Facts(
            n_images=len(source),
            image_size=vit.patch_embed.img_size[0],
            depth=len(vit.blocks),
            recipe={**option_defaults(method_class.Config), **method_class.recipe},
            device=device.type,
            native_bf16=multiplies_bf16(device),
            cores=cores(),
            local_processes=distributed.local_processes(),
            flops=forward_flops(vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)),
            compiler=has_compiler(),
            steps=steps,
            pretrained=bool(config.init or config.pretrained),
        )
        config, reasons = resolve(config, facts)
        check(config)
        total = steps or config.epochs * steps_per_epoch(config, len(source))
        config, of_knobs = with_derived(config, method_class, replace(facts, steps=total))
        reasons |= of_knobs
        method = method_class(vit, **knobs_from(method_class.Config, config, config.method))
    notes: list[tuple[str, str]] = []
    if transform is None:
        normalization = chosen(config.normalize, config.channels, start.normalization, source)
        notes = notes_on_images(config, normalization, start)
        mean, std = normalization.mean, normalization.std
    else:
        mean, std = transform.mean, transform.std
    for encoder in method.encoders.values():
        encoder.transform = replace(encoder.transform, mean=mean, std=std)
        encoder.start_mask_token(start.mask_token)
    schedule = Plan(((0, total),), config.max_lr, config.warmup_pct)
    return made_ready(Job(config, reasons, source, method.to(device), schedule, device, notes=notes))


def notes_on_images(
    config: TrainConfig, normalization: Normalization, start: checkpoint.Start
) -> list[tuple[str, str]]:
    """What the plan says of channels and normalisation, where they are not as usual."""
    notes = []
    if config.channels != 3 or config.normalize != "auto":
        notes.append(("Channels", f"{config.channels}, normalised by {normalization}"))
    if normalization.note:
        notes.append(("Note", normalization.note))
    if start.channels not in (None, config.channels):
        notes.append(
            ("Weights", f"of {start.channels} channels; the first convolution is made one of {config.channels} of them")
        )
    return notes


def with_derived(config: TrainConfig, method_class: type[Method], facts: Facts) -> tuple[TrainConfig, dict[str, str]]:
    """`config` with the knobs that the method derives from the data, but for those typed; and the reasons."""
    typed = values_by_name(config.set)
    found = {name: value for name, value in method_class.derived(facts).items() if name not in typed}
    added = tuple(f"{name}={as_typed(value)}" for name, (value, _) in found.items())
    return replace(config, set=(*config.set, *added)), {name: why for name, (_, why) in found.items()}


def with_names(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The content of a checkpoint, with the names of those beside it, which other machines need not see."""
    return {**content, "beside": [other.name for other in Path(path).parent.glob("checkpoint_*.pt")]}


def restore(config: TrainConfig, given: Mapping[str, Any]) -> Job:
    """The run that wrote `config.resume_checkpoint`, where it stood; `given` are the typed options.

    The configuration is the file's. Raises InputError for a typed option that contradicts it, for
    another file, and for a folder whose images have changed.
    """
    path = config.resume_checkpoint
    # One reads it for all: who starts again need not share a disk with it, and a shared one shows new files late.
    content = distributed.from_main(lambda: with_names(checkpoint.read_training(path), path))
    stored = stored_config(content, path)
    config = merged(stored, config, given, path)
    check(config)
    if "device" not in given:
        config = replace(config, device=device_to_go_on(stored.device))
    device = find_device(config.device)
    source = open_source(config.inputs)
    step, schedule = content["step"], Plan(content["segments"], config.max_lr, config.warmup_pct)
    total = config.epochs * steps_per_epoch(config, len(source))
    if (len(source), source.fingerprint()) != (content["n_images"], content["fingerprint"]):
        refuse_changed_images(source, content, config)
    if total != schedule.total_steps:
        schedule = schedule.extended(step, total)
    method_class = methods.find(config.method)
    refuse_misfit(config, method_class, content, path)
    vit, _ = build_encoder(config, method_class, weights=False)
    method = method_class(vit, **knobs_from(method_class.Config, config, config.method))
    method.load_content(content, path)
    job = made_ready(Job(config, {}, source, method.to(device), schedule, device, step, content))
    if step >= schedule.total_steps and job.half_saved_epoch is None:
        raise Finished(f"the run in {path} is finished; add epochs with --epochs {2 * config.epochs}, for example")
    return job


def stored_config(content: Mapping[str, Any], path: str) -> TrainConfig:
    """The configuration in a training checkpoint, whole. Raises InputError for one with something left on auto."""
    config = TrainConfig(**from_json(content["config"], path))
    if missing := [name for name in ALWAYS_FILLED if getattr(config, name) in (None, "auto")]:
        raise InputError(f"{path} is damaged: its config lacks {', '.join(missing)}")
    check(config)
    return config


def refuse_misfit(config: TrainConfig, method_class: type[Method], content: Mapping[str, Any], path: str) -> None:
    """Raises InputError where the configuration in a file is not that of its weights, before memory is asked for."""
    knobs = knobs_from(method_class.Config, config, config.method)
    twin = methods.without_memory(method_class, lambda: plain_encoder(config, method_class), knobs)
    if twin is None:
        return
    try:
        check_shapes(twin, content["method_state"])
    except ValueError as error:
        raise InputError(
            f"the weights in {path} are of another shape, or of another version of this program: {error}"
        ) from error


def refuse_beyond_memory(config: TrainConfig, method_class: type[Method]) -> None:
    """Raises InputError for a model whose weights alone are more than the machine has memory."""
    knobs = knobs_from(method_class.Config, config, config.method)
    twin = methods.without_memory(method_class, lambda: plain_encoder(config, method_class), knobs)
    if twin is None:
        return
    needed = sum(t.numel() * t.element_size() for t in twin.state_dict().values())
    if needed > (there := device_memory(torch.device("cpu"))):
        raise InputError(
            f"the weights of such a model take {needed / 1e9:,.0f} GB, and this machine has {there / 1e9:,.0f} GB; "
            "give a smaller --hidden-dim, --n-encoders, --image-size or --set"
        )


def device_to_go_on(stored: str) -> str:
    """The device of a resumed run: the checkpoint's where it is present, else the best one."""
    if distributed.processes() > 1:
        stored = stored.partition(":")[0]  # each process has its own
    return stored if device_exists(stored) else find_device(None).type


def merged(stored: TrainConfig, typed: TrainConfig, given: Mapping[str, Any], path: str) -> TrainConfig:
    """The checkpoint's configuration with what a resumed run may change taken from the typed options."""
    if typed.config:
        raise InputError("--config and --resume-checkpoint both bring a configuration; leave out --config")
    changes = {n: getattr(TrainConfig, n) for n in OF_THE_CALL}
    changes |= {n: getattr(typed, n) for n in given if n in MAY_DIFFER and getattr(typed, n) is not None}
    for name in given:
        value, old = getattr(typed, name), getattr(stored, name)
        if name in MAY_DIFFER or name in ("batch_size", "grad_accum") or value in (old, None, "auto"):
            continue
        if name == "set" and values_by_name(value).items() <= values_by_name(old).items():
            continue  # the rest came from the recipe or the data
        if name == "epochs" and value > old:
            changes[name] = value
            continue
        less = " (more epochs can be added, not fewer)" if name == "epochs" else ""
        theirs = "none" if old in (None, ()) else " ".join(old) if name == "set" else old
        typed_value = " ".join(value) if name == "set" else value
        raise InputError(
            f"{flag(name)} {typed_value} contradicts {path}, which has {theirs}{less}; leave it out to continue the run"
        )
    changes |= slices(stored, typed, given)
    out = Path(path).resolve().parent
    if typed.checkpoint_out_dir and Path(typed.checkpoint_out_dir).resolve() != out:
        raise InputError(
            f"--checkpoint-out-dir contradicts --resume-checkpoint: the run continues in {out}; leave it out"
        )
    changes |= {"checkpoint_out_dir": str(Path(path).parent), "resume_checkpoint": path}
    return replace(stored, **changes)


def values_by_name(items: Sequence[str]) -> dict[str, str]:
    """What `--set` says of each knob; of several the last, which counts."""
    return {name: value for name, _, value in (item.partition("=") for item in items)}


def slices(stored: TrainConfig, typed: TrainConfig, given: Mapping[str, Any]) -> dict[str, int]:
    """Another batch size and accumulation with the same images a step. Either one typed gives the other."""
    G = stored.images_a_step
    batch, passes = (getattr(typed, n) if n in given else None for n in ("batch_size", "grad_accum"))
    batch = batch or (G // passes if passes else stored.batch_size)
    passes = passes or G // batch
    if batch * passes != G:
        raise InputError(
            f"the run has {G} images a step (--batch-size {stored.batch_size} --grad-accum {stored.grad_accum}); "
            "--batch-size times --grad-accum must stay that number"
        )
    return {"batch_size": batch, "grad_accum": passes}


def refuse_changed_images(source: ImageFolder, content: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises InputError unless the user allows that the images are not those of the checkpoint."""
    if config.allow_changed_images:
        return
    then, now = content["n_images"], len(source)
    what = f"{then:,} images then, {now:,} now" if then != now else f"its {now:,} images have other names"
    changed = f"{', '.join(config.inputs)} has changed since the checkpoint: {what}"
    raise InputError(f"{changed}; restore it, or go on with --allow-changed-images")


def agree(job: Job) -> None:
    """Raises InputError, in all processes, unless they are about to make one run: each has read the images itself.

    Machines may differ, and a shared file system shows new files late.
    """
    # Cadences may differ from run to run, but not here: they say when processes speak with each other.
    own = MAY_DIFFER - {"log_every", "save_every"}
    config = {name: value for name, value in asdict(job.config).items() if name not in own}
    transform = job.method.student.transform
    config |= {"device": job.device.type, "normalize": f"mean {transform.mean}, deviation {transform.std}"}
    mine: dict[str, Any] = {
        "host": platform.node(),
        "n_images": len(job.source),
        "names": job.source.fingerprint(),
        "place": ", ".join(job.config.inputs),
        "config": config,
        "gpu": gpu_identity(job.device),
    }
    first, *others = distributed.everyone(mine)
    for number, other in enumerate(others, start=1):
        who = f"process {number} on {other['host']}", f"process 0 on {first['host']}"
        if (first["n_images"], first["names"]) != (other["n_images"], other["names"]):
            what = f"{other['n_images']:,} images in {other['place']}"
            what += f", {who[1]} {first['n_images']:,}" if other["n_images"] != first["n_images"] else ""
            what += f" with other names than {who[1]}" if other["n_images"] == first["n_images"] else ""
            raise InputError(
                f"{who[0]} sees {what}; a shared file system shows new files late: "
                "start again when all machines see the same"
            )
        for name, value in first["config"].items():
            if other["config"][name] != value:
                raise InputError(
                    f"{flag(name)} is {value} in {who[1]} and {other['config'][name]} in {who[0]}; "
                    "give all the same, or take machines that are alike"
                )
    gpus = [(m["host"], m["gpu"]) for m in (first, *others) if m["gpu"]]
    if len(set(gpus)) < len(gpus):
        host, gpu = next(g for g in gpus if gpus.count(g) > 1)
        raise InputError(
            f"{gpus.count((host, gpu))} processes have the same GPU of {host}; start one process for each GPU"
        )


def made_ready(job: Job) -> Job:
    """The job, made ready for its device. Raises InputError for what only shows when everything is known."""
    make_ready(job.device)
    # The backward pass of fused attention adds up in whatever order a GPU's blocks end.
    exact = job.config.deterministic and job.device.type != "cpu"
    set_fused_attention(job.method, fused_attention_pays(job.device, job.config.precision) and not exact)
    set_grad_checkpointing(job.method, job.config.grad_checkpointing)
    if job.device.type == "mps" and job.config.grad_checkpointing and job.config.dropout:
        raise InputError("--grad-checkpointing cannot draw the same dropout again on mps; leave one of them out")
    if job.source.would_take_in(job.folder):
        raise InputError(
            f"the run would write to {job.folder}, inside the folder of the images; "
            f"give a --checkpoint-out-dir outside {', '.join(job.config.inputs)}"
        )
    if job.config.batch_size < (least := job.method.smallest_batch):
        raise InputError(f"--batch-size {job.config.batch_size}: {job.config.method} needs {least} images in a pass")
    if job.config.batch_size % distributed.processes():
        raise InputError(
            f"--batch-size {job.config.batch_size} cannot be shared by {distributed.processes()} processes; "
            f"use a multiple of {distributed.processes()}"
        )
    return job


def plain_encoder(config: TrainConfig, method_class: type[Method], pretrained: bool = False) -> VisionTransformer:
    """The timm model of `config` as the method wants it, with timm's own first weights, or its `pretrained` ones."""
    parts = {"in_chans": config.channels, **method_class.encoder_arguments(config.pretrained)}
    if config.model:
        size = {} if config.image_size is None else {"img_size": config.image_size}
        return build_vit(config.model, pretrained, proj_drop_rate=config.dropout, **size, **parts)
    width = config.hidden_dim or 384
    return build_vit(
        DEFAULT_MODEL,
        img_size=config.image_size or 224,
        patch_size=config.patch_size or 16,
        embed_dim=width,
        depth=config.n_encoders or 12,
        num_heads=config.n_heads or default_heads(width),
        proj_drop_rate=config.dropout,
        **parts,
    )


def build_encoder(
    config: TrainConfig, method_class: type[Method], weights: bool = True
) -> tuple[VisionTransformer, checkpoint.Start]:
    """The timm model of `config` as the method wants it, with its first weights, and what else comes with these.

    Without `weights` those of --init and --pretrained are left out, because a checkpoint's follow.
    """
    vit = plain_encoder(config, method_class, config.pretrained and weights)
    if not (config.init or config.pretrained):
        method_class.initialize(vit)
    if not weights:
        return vit, checkpoint.Start()
    if config.init:
        return vit, checkpoint.load_weights(vit, config.init)
    if config.pretrained:
        about: Any = vit.pretrained_cfg
        usual = {name: tuple(about[name]) for name in ("mean", "std")}
        return vit, checkpoint.Start(usual, channels=about.get("input_size", (3,))[0])
    return vit, checkpoint.Start()
