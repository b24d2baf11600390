"""What a run says: the plan at its start, the estimate after some steps, how to go on, what came of it."""

import errno
import shlex
import shutil
import statistics
import textwrap
import time
from collections import Counter
from pathlib import Path

import torch

from data2vec_vision import distributed, shards
from data2vec_vision.config import flag
from data2vec_vision.device import cores, device_name, free_memory
from data2vec_vision.errors import of_writing, one_line
from data2vec_vision.failures import of_reading, out_of_memory
from data2vec_vision.plan import Job
from data2vec_vision.recipes import compared, packed
from data2vec_vision.run import BadFiles, command, duration, launched, plural, size
from data2vec_vision.sources import ImageFolder, sizes_of_some
from data2vec_vision.vit import forward_flops

# Of what `resolve` chose, what the plan prints with its reason.
SHOWN = ("epochs", "k", "tau_initial", "tau_end", "max_lr", "precision", "workers")
WIDTH = 101  # columns of a long text, beside its title
LONG_ON_CPU = 2 * 3600  # seconds
# Smaller settings, from the largest: image size, patch size, width, blocks, epochs.
SMALLER = (
    (224, 16, 192, 12, 100),
    (128, 16, 192, 12, 100),
    (96, 16, 192, 6, 100),
    (64, 8, 128, 4, 50),
    (32, 8, 128, 4, 20),
)


def describe(job: Job) -> str:
    """The plan: what the run will do, with the reasons for what was chosen for the user."""
    config, method = job.config, job.method
    G, spe, total = config.images_a_step, job.steps_per_epoch, job.schedule.total_steps
    S, rows, columns = method.student.n_patches, *method.student.grid
    model = config.model or f"ViT {config.hidden_dim} x {config.n_encoders}, {plural(config.n_heads, 'head', 'heads')}"
    parameters = sum(p.numel() for p in method.student.vit.parameters())
    millions = f"{parameters / 1e6:.1f} M" if parameters > 1e5 else f"{parameters:,}"
    share = config.batch_size // distributed.processes()
    each = f" of {share} each" if distributed.processes() > 1 else ""
    lines = [
        ("Images", f"{len(job.source):,} in {', '.join(config.inputs)} ({suffixes(job.source)})"),
        *passed_over(job.source),
        *job.notes,
        *left_out(job),
        ("Model", f"{model}, {millions} parameters"),
        ("Input", f"{config.image_size} px in {rows} x {columns} = {S} patches of {method.student.patch_size} px"),
        ("Method", f"{config.method}: {method.describe()}"),
        ("Step", f"{G} images a step = {plural(config.grad_accum, 'pass', 'passes')} of {config.batch_size}, "
                 f"{plural(distributed.processes(), 'process', 'processes')}{each}"),
        *([("Batch", f"{method.batch_statistics} see the {config.batch_size} images of a pass; a larger --grad-accum "
                     "does not show them more")] if method.batch_statistics else []),
        ("Length", f"{plural(config.epochs, 'epoch', 'epochs')} of {plural(spe, 'step', 'steps')} = "
                   f"{plural(total, 'step', 'steps')}"),
        ("Device", f"{device_name(job.device)}, {config.precision}, {plural(config.workers, 'worker', 'workers')}"
                   f"{', compiled: the first step takes a minute or two' if config.compile else ''}"),
    ]  # fmt: skip
    settings = [
        f"{flag(name)} {value:g} ({why})"
        if isinstance(value := getattr(config, name), float)
        else f"{flag(name)} {value} ({why})"
        for name, why in job.reasons.items()
        if name in SHOWN
    ]
    settings += [
        f"--set {name}={value} ({job.reasons[name]})"
        for name, _, value in (item.partition("=") for item in config.set)
        if name in job.reasons
    ]
    lines += [("Chosen" if n == 0 else "", text) for n, text in enumerate(settings)]
    decay = config.weight_decay, method.weight_decay(config.weight_decay, 1.0)
    if decay[0] and decay[0] != decay[1]:
        lines.append(("", f"weight decay from --weight-decay {decay[0]:g} to {decay[1]:g} at the end"))
    if config.recipe == "paper" and (paper := method.paper) is not None:
        lines.append(("Recipe", f"paper: {paper.source}"))
        lines += [("", text) for text in packed(compared(paper, config, vars(method.config)), WIDTH)]
        lines += [("", text) for text in textwrap.wrap(paper.notes, WIDTH, break_on_hyphens=False)]
    if job.restored is not None:
        if method.batch_statistics and job.restored["config"]["batch_size"] != config.batch_size:
            before = job.restored["config"]["batch_size"]
            lines.append(("Note", f"{method.batch_statistics} saw {before} images a pass before: this changes the run"))
        lines.append(("Resumed", f"from {config.resume_checkpoint} after step {job.first_step:,} of {total:,}"))
        if changed := changed_environment(job):
            lines.append(("Note", f"{changed}: the run continues, but not bit for bit"))
    needed, free = disk_needed(job), disk_free(job.folder)
    stay = f"the last {plural(config.keep, 'checkpoint', 'checkpoints')} of an epoch stay{'s' * (config.keep == 1)}"
    lines.append(("Files", f"{job.folder}, {size(needed)} to write, {size(free)} free; {stay}"))
    if needed > free:
        lines.append(("Note", "that is not enough room: make some, or give a larger --save-every"))
    gpus = torch.cuda.device_count() if job.device.type == "cuda" else 0
    if gpus > 1 and distributed.processes() == 1:
        every = f"torchrun --nproc-per-node {gpus} -m data2vec_vision train {shlex.join(config.inputs)}"
        lines.append(("Hint", f"{gpus} GPUs found, using 1; all {gpus}: {every} ..."))
    return "\n".join(f"{title:<8} {text}" for title, text in lines)


def passed_over(source: ImageFolder) -> list[tuple[str, str]]:
    """Archives that lie beside the images of a folder."""
    found = {suffix: count for suffix, count in source.skipped.items() if suffix in shards.SUFFIXES}
    if not found:
        return []
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in found.items())
    return [
        ("", f"beside archives that are not looked into ({kinds}); give them as inputs of their own to train on them")
    ]


def left_out(job: Job) -> list[tuple[str, str]]:
    """What of the augmentation is for photos only, and not done to other images."""
    names = getattr(job.method.views(), "left_out", ())
    if job.config.channels == 3 or not names:
        return []
    *first, last = names
    listed = f"{', '.join(first)} and {last}" if first else last
    return [("Views", f"without {listed}, which need{'' if first else 's'} the three channels of RGB")]


def changed_environment(job: Job) -> str:
    """What differs from where the checkpoint was written, of what the bits of the result depend on."""
    then, now = job.restored["environment"], job.environment()
    return "; ".join(f"{name} {old} then, {now[name]} now" for name, old in then.items() if now.get(name, old) != old)


def suffixes(source: ImageFolder) -> str:
    """The kinds of files among the first 10,000 images, the most frequent first: ".jpg .png"."""
    counts = Counter(Path(source.name(i)).suffix.lower() for i in range(min(len(source), 10_000)))
    return " ".join(suffix for suffix, _ in counts.most_common())


def disk_needed(job: Job) -> int:
    """Bytes of all files that the run has yet to write: fp32 weights, and AdamW's two moments of what is trained."""
    encoder = sum(p.numel() for p in job.method.student.parameters())
    trained = sum(p.numel() for p in job.method.parameters() if p.requires_grad)
    everything = sum(t.numel() for t in job.method.state_dict().values())
    encoders = 1 if job.method.teacher is None else 2
    still = sum((e + 1) * job.steps_per_epoch > job.first_step for e in job.saved_epochs)
    checkpoints = 1 + min(still, job.config.keep)
    return 4 * (still * encoders * encoder + checkpoints * (everything + 2 * trained))


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return shutil.disk_usage(existing).free


def go_on(job: Job) -> str:
    """How to continue the run, as the end of a sentence."""
    last = job.folder / "checkpoint_last.pt"
    return f"; continue with: {launched('train', '--resume-checkpoint', last)}" if last.exists() else ""


def failure(error: Exception, job: Job, traceback: Path | None) -> str:
    """Why the run cannot go on, and what to try; `traceback` is the file that has the details, if it was written."""
    config, text = job.config, str(error)
    if reason := of_reading(error, config.workers):
        return reason
    if out_of_memory(error):
        return f"the memory of {job.device} is not enough for batches of {config.batch_size}; try {smaller_passes(job)}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return of_writing(error, job.folder)
    if config.deterministic and "deterministic" in text:
        return f"--deterministic is not to be had here: {one_line(error)}; try --no-deterministic"
    if config.compile and type(error).__module__.startswith("torch._"):
        return f"the model cannot be compiled here: {one_line(error)}; try --no-compile"
    return one_line(error) + (f" (the traceback is in {traceback})" if traceback else "")


def smaller_passes(job: Job) -> str:
    """Options with which a step takes less memory and has the same images."""
    config, each = job.config, job.config.batch_size // distributed.processes()
    factor = next((n for n in range(2, each + 1) if each % n == 0), 1)
    ways = []
    if factor > 1 and config.batch_size // factor >= job.method.smallest_batch:
        passes = f"--batch-size {config.batch_size // factor} --grad-accum {config.grad_accum * factor}"
        ways.append(f"{passes}, the same images a step")
    if not config.grad_checkpointing:
        ways.append("--grad-checkpointing, which is slower")
    if job.method.batch_statistics:  # of fewer images they are not the same
        ways.reverse()
    return ", or ".join(ways) or "a smaller model, or a smaller --image-size"


def estimate(job: Job, left: float) -> str:
    """When the run will end; on a CPU that takes long also a setting that would take less."""
    end = time.strftime("%H:%M" if left < 12 * 3600 else "%a %d %b %H:%M", time.localtime(time.time() + left))
    return "\n".join(filter(None, (f"About {duration(left)} to go, until {end}.", advice_if_long(job, left))))


def slow_loading(job: Job, share: float) -> str:
    """What to change where so large a share of the time is spent waiting for images: the first that may help first."""
    config, most = job.config, max(1, cores() // distributed.local_processes())
    ways = [f"--workers {most}"] if config.workers < most else []
    sides = [min(sizes) for sizes in sizes_of_some(job.source, 16)]
    if sides and config.cache == "none" and 3 * statistics.median(sides) ** 2 * len(job.source) < free_memory() / 4:
        ways.append("--cache ram")
    if sides and statistics.median(sides) > 3 * config.image_size:
        ways.append(f"images made smaller beforehand, to a short side of about {2 * config.image_size} px")
    ways = ways or ["a faster disk, or a machine with more cores"]
    return f"Waiting for images takes {share:.0%} of the time. Faster: {', or '.join(ways)}.".replace("%", " %")


def advice_if_long(job: Job, left: float) -> str:
    """For a run of more than LONG_ON_CPU seconds on a CPU: one line with the largest smaller setting that fits.

    Its time is this run's by the ratio of multiplications, so it is an estimate.
    """
    if job.device.type != "cpu" or left < LONG_ON_CPU or job.restored is not None:
        return ""
    config, vit = job.config, job.method.student
    now = forward_flops(vit.n_patches, vit.embed_dim, vit.depth) * config.epochs
    for image_size, patch_size, width, depth, epochs in SMALLER:
        if image_size > config.image_size:  # nobody wants small images blown up
            image_size, patch_size = config.image_size, vit.patch_size
        epochs = min(epochs, config.epochs)
        time_then = left * forward_flops((image_size // patch_size) ** 2, width, depth) * epochs / now
        if time_then < LONG_ON_CPU:
            instead = " instead of --model" if config.model else ""
            return (
                f"That is long for a CPU. About {duration(time_then)}: --image-size {image_size} "
                f"--patch-size {patch_size} --hidden-dim {width} --n-encoders {depth} --epochs {epochs}{instead}"
            )
    return "That is long for a CPU, and so would be every smaller setting worth having; take a GPU, or fewer images."


def farewell(job: Job, bad_files: BadFiles) -> str:
    """Which files to use, and the next command."""
    name = f"{job.folder}/student_{job.saved_epochs[-1]}.pt"
    lines = [f"Done. The encoder is {name}, the run's curve {job.folder / 'metrics.jsonl'}."]
    if len(bad_files):
        count = plural(len(bad_files), "image", "images")
        lines.append(f"{count} could not be read; {bad_files.path} lists what and why.")
    lines.append(f"Next: {command('extract', name, *job.config.inputs, '--output', 'features.npz')}")
    return "\n".join(lines)
