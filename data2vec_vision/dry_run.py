"""What a run would be: its time and memory from a measured step, and a picture of what it would see."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data2vec_vision import distributed, resume
from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.config import TrainConfig, not_default
from data2vec_vision.data import Stream
from data2vec_vision.device import peak_memory
from data2vec_vision.errors import InputError
from data2vec_vision.figures import draw_views, example_dataset
from data2vec_vision.messages import advice_if_long, describe
from data2vec_vision.plan import Job, prepare, restore
from data2vec_vision.run import PROGRAM, RunFolder, duration, plural, say, size
from data2vec_vision.train import optimizer_and_scaler, training_steps

STEPS = 3  # taken; the last is timed, the first ones allocate and compile


def dry_run(config: TrainConfig, given: Mapping[str, Any] | None = None) -> Path:
    """Say what the run would do and take, from a few steps that are thrown away, and draw example views.

    Arguments and errors as for `train`. Writes views.png to the folder of the run and returns that folder.
    """
    if distributed.processes() > 1:
        raise InputError(f"a dry run takes one process: {PROGRAM} train ... --dry-run")
    typed = not_default(config) if given is None else given
    if config.resume_checkpoint == resume.AUTO:
        config, typed = resume.found(config, typed)
    job = restore(config, typed) if config.resume_checkpoint else prepare(config)
    folder = RunFolder(job.folder)
    if job.restored is None:
        folder.refuse_if_used()
    say(describe(job))
    folder.make()
    picture = job.folder / "views.png"
    try:
        with atomic_write(picture) as file:
            draw_views(job).save(file, "PNG")
    except OSError as error:
        raise InputError(
            f"cannot write to {job.folder}: {error.strerror}; give another --checkpoint-out-dir"
        ) from error
    load = seconds_to_load(job) * job.config.images_a_step / max(1, job.config.workers or 0)
    compute = seconds_to_compute(job)
    step = load + compute if job.config.workers == 0 else max(load, compute)
    total = step * (job.schedule.total_steps - job.first_step)
    say(f"Time     about {duration(total)}: {step:.2f} s a step, {compute:.2f} s to compute and {load:.2f} s to load")
    workers = f", and {plural(job.config.workers, 'worker', 'workers')} beside it" if job.config.workers else ""
    where = "in the main process" + workers if job.device.type == "cpu" else f"on {job.device}"
    say(f"Memory   {size(peak_memory(job.device))} {where}, the most in {STEPS} steps")
    if advice := advice_if_long(job, total):
        say(advice)
    say(f"Picture  {picture}: images, their views, and the views as the student sees them. Nothing was trained.")
    return job.folder


def seconds_to_load(job: Job) -> float:
    """Seconds that one process takes for one image: read, decode, make views and masks."""
    dataset = example_dataset(job)
    stream = Stream(len(job.source), job.config.seed)
    count = min(64, 4 * len(job.source))
    _ = dataset[0, stream.image(0)]
    start = time.perf_counter()
    for position in range(count):
        _ = dataset[position, stream.image(position)]
    return (time.perf_counter() - start) / count


def seconds_to_compute(job: Job) -> float:
    """Seconds of one step without its data, measured on a copy of the run that loads in this process."""
    first = job.first_step
    job.method.skip_beginning()
    short = dataclasses.replace(job, config=dataclasses.replace(job.config, workers=0, cache="none"))
    optimizer, scaler = optimizer_and_scaler(short)
    start, seconds = time.perf_counter(), 0.0
    for step in training_steps(short, optimizer, scaler):
        if job.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start - step.waited
        start = time.perf_counter()
        if step.number >= min(first + STEPS, job.schedule.total_steps):
            break
    return seconds
