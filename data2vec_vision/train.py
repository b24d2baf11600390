"""Pretraining: the loop, and what it keeps.

`training_steps` is the training itself, read from top to bottom; `train` watches it, logs, saves and stops.
"""

import contextlib
import inspect
import logging
import math
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data2vec_vision import checkpoint, distributed, resume
from data2vec_vision.config import TrainConfig, not_default
from data2vec_vision.data import Batch, MicroBatches, Stream, StreamDataset, make_loader
from data2vec_vision.device import deterministic, fast_products, free_memory
from data2vec_vision.errors import Finished, InputError, RunFailed, Stopped, of_writing, one_line
from data2vec_vision.loading import lasting
from data2vec_vision.messages import describe, estimate, failure, farewell, go_on, slow_loading
from data2vec_vision.methods.base import Output
from data2vec_vision.monitor import WINDOW, health, health_sums, on_host
from data2vec_vision.online import Onlooker
from data2vec_vision.plan import Job, agree, prepare, restore
from data2vec_vision.ramcache import RamCache, fill, opened_whole, shareable
from data2vec_vision.run import (
    BadFiles,
    Progress,
    RunFolder,
    asked_to_save,
    caught_signals,
    duration,
    plural,
    say,
    size,
)
from data2vec_vision.seeding import generator, seed_device
from data2vec_vision.skips import SkippedSteps

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ESTIMATE_AFTER = 20  # steps
STEADY = 2 * ESTIMATE_AFTER  # steps after which the loader has got going
SLOW_LOADING = 0.3  # share of the time spent waiting for images that is worth a word
SKIPS_IN_A_ROW = 100  # so many steps without a finite gradient end the run
NOTED = 16  # skipped steps between two lines of metrics.jsonl, the first ones, whose images are looked up
LOST = (
    "another process of the run has ended without a word: it was killed, for want of memory perhaps, or its machine is "
    "gone; torchrun tells which one"
)


@dataclass
class Step:
    """What a finished optimizer step leaves behind; tensors stay on the device until they are logged."""

    number: int  # steps done, this one included
    lr: float
    logs: dict[str, Tensor]  # scalars, means over the step's images
    skipped: Tensor  # 1.0 where the gradient was not finite and nothing was changed, else 0.0
    bad: dict[int, str]  # unreadable images met
    waited: float  # seconds spent waiting for data
    health: dict[str, Tensor]  # sums, see monitor.health_sums
    phase: str  # of the method, in this step
    scheduled: dict[str, float]  # what the method changes in the course of a run, in this step


def training_steps(
    job: Job, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, cache: RamCache | None = None
) -> Iterator[Step]:
    """Train, from the job's first step to its last; yields after each."""
    config, method, device, schedule = job.config, job.method, job.device, job.schedule
    rank, autocast = distributed.rank(), config.precision != "fp32"
    forward = compiled_and_parallel(job)
    # A compiler chooses for itself, and what is computed again in the backward pass has to be computed the same way.
    alike = config.compile or config.grad_checkpointing
    products = contextlib.nullcontext() if alike else fast_products(device, config.precision)
    batches = iter(loader(job, cache))
    method.train()
    for step in range(job.first_step, schedule.total_steps):
        lr, phase = schedule.lr(step), method.phase
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["weight_decay"]:
                group["weight_decay"] = method.weight_decay(config.weight_decay, schedule.progress(step))
        shared = method.shared_by_step(generator(config.seed, "step", step))
        shared = {name: to_device(value, device) for name, value in shared.items()}
        logs, waited = Means(config.grad_accum), 0.0
        sums: dict[str, Tensor] = {}
        bad: dict[int, str] = {}
        for micro in range(config.grad_accum):
            clock = time.perf_counter()
            batch: Batch = next(batches).to(device)
            waited += time.perf_counter() - clock
            bad |= batch.bad
            views = [method.student.transform.normalized(view) for view in batch.views]
            seed_device(device, config.seed, "dropout", step, micro, rank)
            last = micro + 1 == config.grad_accum
            with contextlib.nullcontext() if last else without_all_reduce(forward):
                with products, torch.autocast(device.type, DTYPES[config.precision], enabled=autocast):
                    output = forward(views, masks=batch.masks | shared)
                del views  # the backward pass needs none
                # A loss that is not finite may have a finite gradient; the factor, else exactly 1, spoils that too.
                loss = output.loss * (1 + 0 * output.loss.detach())
                scaler.scale(loss / config.grad_accum).backward()
            logs.add({"loss": output.loss.detach(), **output.logs})
            for name, value in health_sums(output.embedding, output.extras, method.student.n_patches).items():
                sums[name] = sums.get(name, 0) + value
            del output, loss  # else predictions and targets live until the next pass has made its own
        progress = schedule.progress(step + 1)
        method.before_step(progress)
        norm, skipped = clip_and_step(optimizer, scaler, method, config.clip_grad)
        scheduled = method.scheduled(progress)
        method.after_step(progress)
        values = {**logs.values, "grad_norm": norm}
        yield Step(step + 1, lr, values, skipped, bad, waited, sums, phase, scheduled)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A copy that does not make the host wait, which takes pinned memory."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class Means:
    """Means of scalars over the micro-batches of a step."""

    def __init__(self, count: int):
        self.count = count
        self.values: dict[str, Tensor] = {}

    def add(self, logs: Mapping[str, Tensor]) -> None:
        for name, value in logs.items():
            self.values[name] = self.values.get(name, 0) + value / self.count


def clip_and_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, method: nn.Module, clip: float
) -> tuple[Tensor, Tensor]:
    """Clip once, step unless the gradient is not finite, clear. Returns its norm and 1.0 if it was skipped.

    The optimizer itself looks at `found_inf`, on the device, so that the host does not have to wait. It is not stepped
    by the scaler, which would put its own flag there: a norm can overflow where no gradient does.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def train(config: TrainConfig, given: Mapping[str, Any] | None = None) -> Path:
    """Run, or with `config.resume_checkpoint` continue, a pretraining. Returns the folder of the run.

    `given` are the settings that the user typed, by name, else those that are not the defaults: a resumed
    run checks them against its own.
    Raises InputError for input that cannot be used, RunFailed when the run cannot go on, and Stopped
    after a signal, when the run's state is saved. A run that `auto` finds finished is left as it is, which is said.
    """
    if config.dry_run:
        raise InputError("a dry run trains nothing; call data2vec_vision.dry_run.dry_run instead")
    typed = not_default(config) if given is None else given
    with distributed.joined():
        if config.resume_checkpoint != resume.AUTO:
            return pretrain(config, typed)
        try:
            config, typed = resume.found(config, typed)
            return pretrain(config, typed)
        except Finished as finished:
            say(f"Nothing is left to do: {finished}")
            return Path(config.resume_checkpoint or "").parent


def pretrain(config: TrainConfig, typed: Mapping[str, Any]) -> Path:
    """`train`, when it is known which checkpoint is gone on with."""
    job: Job | None = None
    folder: RunFolder | None = None
    try:
        job = distributed.together(lambda: restore(config, typed) if config.resume_checkpoint else prepare(config))
        agree(job)
        folder = opened_folder(job)
        onlooking = contextlib.closing(distributed.together(partial(Onlooker, job, folder)))
        with deterministic(job.config.deterministic), onlooking as onlooker:
            watch(job, folder, onlooker)
    except (InputError, RunFailed, Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        kept = folder.keep_traceback(traceback.format_exc()) if folder else None
        if distributed.is_loss(error):
            more = "" if distributed.is_cut_off(error) else f" ({one_line(error)})"
            raise RunFailed(LOST + more + (go_on(job) if job else "")) from error
        if job is None or folder is None:
            raise
        raise RunFailed(failure(error, job, kept) + go_on(job)) from error
    finally:
        if folder is not None:
            folder.close()
    return job.folder


def opened_folder(job: Job) -> RunFolder:
    """The folder of the run, taken by the main process, after the plan was printed; all raise what that one does."""
    folder = RunFolder(job.folder)
    if job.restored is None:
        distributed.from_main(folder.refuse_if_used)
    say(describe(job))
    distributed.together(partial(folder.open, job.config, job.first_step))
    return folder


def watch(job: Job, folder: RunFolder, onlooker: Onlooker) -> None:
    """Take all steps; log, show, save and stop in between."""
    config, total = job.config, job.schedule.total_steps
    optimizer, scaler = optimizer_and_scaler(job)
    window, progress = Window(job), Progress(job.first_step, total)
    onlooker.start()
    bad_files = BadFiles(job.source, folder.path, resumed=job.restored is not None)
    cache, told = filled_cache(job), False
    saved, estimate_at = time.monotonic(), job.first_step + ESTIMATE_AFTER
    if job.half_saved_epoch is not None:
        save(job, optimizer, scaler, window, job.first_step, job.half_saved_epoch)
    with (
        caught_signals() as signals,
        asked_to_save() as asked,
        distributed.patient(signals, lambda: LOST + go_on(job)),
        contextlib.closing(progress),
    ):
        for step in training_steps(job, optimizer, scaler, cache):
            left = progress.step(step.number)
            window.add(step)
            late = time.monotonic() - saved > 60 * config.checkpoint_minutes  # clocks differ
            bad, stop, due, wanted = distributed.any_process_each(bool(step.bad), bool(signals), late, asked.taken())
            bad_files.add(distributed.union(step.bad) if bad else {})
            epoch = (step.number - 1) // job.steps_per_epoch
            epoch_ends = step.number % job.steps_per_epoch == 0
            if epoch_ends:
                with window.paused():
                    onlooker.evaluate_if_due(step.number, epoch)
            if step.number % config.log_every == 0 or step.number == total:
                record = {"step": step.number, "steps": total, "epoch": epoch, **window.read(step)}
                record |= {"bad_files": len(bad_files), **window.read_health(step.number)}
                onlooker.log(record)
                progress.show(record, left)
                if record["data_wait"] > SLOW_LOADING and not told and step.number >= job.first_step + STEADY:
                    say(slow_loading(job, record["data_wait"]))
                    told = True
            if step.number == estimate_at and step.number < total:
                say(estimate(job, left))
            if job.method.phase != step.phase:  # the steps to come take another time, and mean something else
                estimate_at = step.number + ESTIMATE_AFTER
                window.drop_health()
            epoch_to_save = epoch if epoch_ends and epoch in job.saved_epochs else None
            if epoch_to_save is not None or stop or due or wanted:
                save(job, optimizer, scaler, window, step.number, epoch_to_save)
                saved = time.monotonic()
            if wanted:
                say(f"Saved after step {step.number:,}, as SIGUSR1 asks: {job.folder / 'checkpoint_last.pt'}")
            if epoch_to_save is not None:  # saved first: whatever happens to a picture, the epoch is safe
                with window.paused():
                    onlooker.draw(step.number, epoch)
            if stop and step.number < total:
                distributed.any_process(False)  # a process that left now would make torchrun end the one that writes
                raise Stopped(
                    signals[0] if signals else signal.SIGTERM, f"Stopped after step {step.number:,}{go_on(job)}"
                )
    say(farewell(job, bad_files))
    say(onlooker.finish())


class Window:
    """Sums since the last line of metrics.jsonl; the loop waits for the device in `read` and `read_health` only."""

    def __init__(self, job: Job):
        self.job = job
        self._skipped = self._in_a_row = self._used = torch.zeros((), device=job.device)
        self._health: dict[str, Tensor] = {}
        self._health_steps = 0
        self._skips = SkippedSteps(job)
        self._places = torch.arange(NOTED, device=job.device)
        self._clear()
        if job.restored is not None:
            self._skipped = self._skipped + job.restored["skipped"]
            window = job.restored["window"]
            self._in_a_row, self._used = self._in_a_row + window["in_a_row"], self._used + window["used"]
            self._sums.update({name: total.to(job.device) for name, total in window["sums"].items()})
            share = 1 / distributed.processes()  # of the sums over all processes
            self._health.update({n: share * total.to(job.device) for n, total in window.get("health", {}).items()})
            self._health_steps = window.get("health_steps", 0)

    @property
    def skipped(self) -> int:
        """Steps skipped since the run began."""
        return int(self._skipped)

    def state(self) -> dict[str, Any]:
        """What the next line of metrics.jsonl is made of, for a checkpoint between two lines; asks all processes."""
        sums = {name: distributed.mean(total.clone()) for name, total in self._sums.items()}
        health = {name: distributed.total(total) for name, total in self._health.items()}
        if self._steps:
            self._list_skips(distributed.mean(self._noted.flatten()).tolist())
        counts = {"in_a_row": float(self._in_a_row), "used": float(self._used), "health_steps": self._health_steps}
        return {**counts, "sums": sums, "health": health}

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._clock = 0, 0.0, time.perf_counter()
        self._used = torch.zeros((), device=self.job.device)
        self._slot = torch.zeros((), device=self.job.device)  # skipped steps of this window
        self._noted = torch.zeros(2, NOTED, device=self.job.device)  # which step of it, 1 the first; loss not finite

    def add(self, step: Step) -> None:
        logs = {name: value.float() for name, value in step.logs.items()}
        for of, new in ((self._sums, logs), (self._health, step.health)):
            for name, value in new.items():
                of[name] = of.get(name, 0) + torch.where(step.skipped > 0, 0.0, value)
        self._used = self._used + (1 - step.skipped)
        self._skipped = self._skipped + step.skipped
        self._in_a_row = (self._in_a_row + 1) * step.skipped
        self._steps += 1
        self._first = step.number + 1 - self._steps
        here = (self._places == self._slot) * step.skipped  # a place for this step if it was skipped
        self._noted = self._noted + torch.stack([here * self._steps, here * ~logs["loss"].isfinite()])
        self._slot = self._slot + step.skipped
        self._health_steps += 1
        self._waited += step.waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def read(self, step: Step) -> dict[str, Any]:
        """Means since the last call. Raises RunFailed when no step has been possible for a long time."""
        scalars = torch.stack([*self._sums.values(), self._used, self._skipped, self._in_a_row])
        parts = torch.cat([scalars, self._noted.flatten()])
        read = distributed.mean(parts).tolist()
        *sums, used, skipped, in_a_row = read[: -2 * NOTED]
        self._list_skips(read[-2 * NOTED :])
        seconds = time.perf_counter() - self._clock
        if in_a_row >= SKIPS_IN_A_ROW:
            raise RunFailed(
                f"no finite gradient in {in_a_row:.0f} steps; try a lower --max-lr or --precision fp32, and look at "
                f"the images in {self._skips.path}{go_on(self.job)}"
            )
        means = {name: total / max(used, 1) for name, total in zip(self._sums, sums)}
        values = {name: mean if used and math.isfinite(mean) else None for name, mean in means.items()}
        images = self._steps * self.job.config.images_a_step
        record = {
            **values,
            "lr": step.lr,
            **step.scheduled,
            **({"phase": step.phase} if step.phase else {}),
            "images_per_second": round(images / seconds, 2),
            "data_wait": round(distributed.largest(self._waited / seconds), 4),  # all wait for who waits longest
            "skipped": int(skipped),
        }
        self._clear()
        return record

    def _list_skips(self, noted: list[float]) -> None:
        """List the steps in `_noted`, once."""
        pairs = zip(noted[:NOTED], noted[NOTED:])
        self._skips.add([(self._first - 1 + round(nth), not bad_loss) for nth, bad_loss in pairs if nth])
        self._noted = torch.zeros_like(self._noted)

    def drop_health(self) -> None:
        """Begin the sums for monitor.health again."""
        self._health, self._health_steps = {}, 0

    def read_health(self, step: int) -> dict[str, float | None]:
        """The figures of monitor.health, once there are WINDOW images for them; at the end of the run fewer will do,
        of a short one the half."""
        G = self.job.config.images_a_step
        least = WINDOW if step < self.job.schedule.total_steps else min(WINDOW // 4, step * G // 2)
        if not self._health or self._health_steps * G < least:
            return {}
        sums = on_host({name: distributed.total(total) for name, total in self._health.items()})
        self.drop_health()
        return health(sums) if sums["images"] > 1 else {}  # all steps may have been skipped


def optimizer_and_scaler(job: Job) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """AdamW and, for fp16, the loss scaler, both as the checkpoint left them."""
    groups = job.method.param_groups(job.config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=job.config.max_lr, betas=job.method.betas, fused=True)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.config.precision == "fp16")
    if job.restored is not None:
        try:
            optimizer.load_state_dict(job.restored["optimizer"])
            for weight, moments in optimizer.state.items():
                if any(t.shape not in (weight.shape, ()) for t in moments.values()):
                    raise ValueError(f"moments of a weight {list(weight.shape)} are of another shape")
            scaler.load_state_dict(job.restored["scaler"])
        except Exception as error:  # of what anybody may have written into it
            raise InputError(f"{job.config.resume_checkpoint} is damaged: its optimizer: {one_line(error)}") from error
        for taken in ("optimizer", "method_state", "encoders"):  # else they stay in memory, in each process
            job.restored.pop(taken, None)
    return optimizer, scaler


def filled_cache(job: Job) -> RamCache | None:
    """The decoded images where they are to be kept; else None, and None, which is said, where they do not fit."""
    if job.config.cache != "ram":
        return None
    if job.config.channels != 3:
        say("--cache ram keeps images of three channels only; these are read from their files")
        return None
    limit = shareable(free_memory() / 2, job.config.workers) / distributed.local_processes()
    cache = fill(job.source, job.config.workers, limit)
    if isinstance(cache, int):
        say(
            f"--cache ram: the images take about {size(cache)} decoded, and half of the free memory, for all processes "
            f"of this machine, leaves {size(limit)}; they are read from their files"
        )
        return None
    images, taken = plural(len(job.source), "image", "images"), size(cache.nbytes)
    say(f"Cached   {images} in {taken} of memory, decoded in {duration(cache.seconds)}")
    return cache


def loader(job: Job, cache: RamCache | None = None) -> Iterable[Batch]:
    """The batches of all steps that are left, though processes that read images are lost."""
    config = job.config
    views, masks = job.method.views(), job.method.masks()
    dataset = StreamDataset(job.source, views, masks, config.seed, config.images_a_step, config.channels)
    if cache is not None:
        dataset.opened = cache.opened
    elif config.cache == "ram" and config.channels == 3:  # the images do not fit
        dataset.opened = partial(opened_whole, job.source)
    batches = MicroBatches(
        Stream(len(job.source), config.seed),
        config.batch_size,
        config.grad_accum,
        job.first_step,
        job.schedule.total_steps,
        distributed.rank(),
        distributed.processes(),
    )

    def from_pass(done: int) -> DataLoader:
        return make_loader(dataset, replace(batches, done=done), config.workers, pin=job.device.type == "cuda")

    return lasting(from_pass, job.source.name, say)


def compiled_and_parallel(job: Job) -> nn.Module:
    """The method, compiled where asked for, and with its gradients averaged over the processes."""
    forward: nn.Module = Compiled(job.method) if job.config.compile else job.method
    if distributed.processes() > 1:
        index = None if job.device.type == "cpu" else [job.device.index]
        # Buffers are the same in all processes, by what the methods reduce. Newer versions of torch rename the keyword.
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        forward = DistributedDataParallel(forward, index, gradient_as_bucket_view=True, **buffers)
    return forward


class Compiled(nn.Module):
    """The method by torch.compile or, where that fails, as it is, which is said once."""

    def __init__(self, method: nn.Module):
        super().__init__()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for CUDA, on a CPU too
        self.method = method
        try:
            self._forward = torch.compile(method.forward)
        except RuntimeError as error:  # a Python that this torch does not compile for
            self._go_without(error)

    def forward(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        try:
            return self._forward(views, masks=masks)
        except Exception as error:
            if self._forward == self.method.forward or not type(error).__module__.startswith("torch._"):
                raise
            self._go_without(error)
            return self._forward(views, masks=masks)

    def _go_without(self, error: Exception) -> None:
        reason = one_line(error).partition(" Set TORCH")[0]
        say(f"Note     torch.compile does not work here, so the run goes on without it: {reason}")
        self._forward = self.method.forward


def without_all_reduce(forward: nn.Module) -> contextlib.AbstractContextManager[None]:
    """For all but the last micro-batch of a step: its gradients travel with the last one's."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else contextlib.nullcontext()


def save(
    job: Job,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    window: Window,
    step: int,
    epoch: int | None = None,
) -> None:
    """Write checkpoint_last.pt and, after an epoch that is kept, its encoders and then its checkpoint.

    Raises RunFailed when the disk does not take them, and for weights that are not finite, which skipping steps does
    not let happen but a method of one's own may; what was written before is intact.
    """
    open_window = window.state()
    if not distributed.is_main():
        return
    config, folder = asdict(job.config), job.folder
    about = {"config": config, "step": step, "epoch": (step - 1) // job.steps_per_epoch}
    if name := first_not_finite(job.method, optimizer):
        raise RunFailed(
            f"{name} is not finite, so it was not saved; try a lower --max-lr or --precision fp32{go_on(job)}"
        )
    try:
        checkpoint.save_training(
            folder,
            {
                "method": job.config.method,
                "method_state": job.method.state_dict(),
                "encoders": {name: checkpoint.encoder_content(e) for name, e in job.method.encoders.items()},
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "segments": job.schedule.segments,
                "skipped": window.skipped,
                "window": open_window,
                "n_images": len(job.source),
                "fingerprint": job.source.fingerprint(),
                "environment": job.environment(),
                **about,
            },
        )
        if epoch is not None:
            for name, encoder in job.method.encoders.items():
                checkpoint.save_encoder(encoder, folder / f"{name}_{epoch}.pt", job.config.method, **about)
            checkpoint.keep_training(folder, epoch)
            checkpoint.prune(folder, job.config.keep)
    except OSError as error:
        raise RunFailed(of_writing(error, folder) + go_on(job)) from error


def first_not_finite(method: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The name of a part of the state that is not finite, "" if all is; waits for the device once."""
    state = method.state_dict()
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"the optimizer's {name} of parameter {number}": value for name, value in moments.items()}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
    device = next(method.parameters()).device
    finite = torch.stack([value.isfinite().all().to(device) for value in state.values()])
    return next((name for name, whole in zip(state, finite.tolist()) if not whole), "")
