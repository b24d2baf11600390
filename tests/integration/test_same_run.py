"""The same run on any number of processes: in float64 to 1e-8, through the real loop, loader and optimizer.

`pytest -s tests/integration/test_same_run.py` prints the deviations (benchmarks/RESULTS.md).
"""

import contextlib
import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from several import Together
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from data2vec_vision import train as loop
from data2vec_vision.config import TrainConfig
from data2vec_vision.data import StreamDataset
from data2vec_vision.errors import Stopped
from data2vec_vision.plan import prepare
from data2vec_vision.transforms import constant

STEPS = 20
HEAD = ("n_prototypes=16", "head_dim=32", "projection_dim=16")
KNOBS = {
    "data2vec": (),
    "data2vec2": ("n_masks=2",),
    "ijepa": (),
    "mae": (),
    "msn": HEAD,
    "swav": (*HEAD, "queue_length=24", "queue_start=0.2", "freeze_prototypes=0.1"),
}


def configuration(images, method, **more):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_heads": 2, "n_encoders": 2, "batch_size": 8}
    machine = {"workers": 0, "precision": "fp32", "device": "cpu", "no_report": True, "no_tensorboard": True}
    return TrainConfig(str(images), method=method, set=KNOBS[method], **{**sizes, **machine, **more})


@contextlib.contextmanager
def precision(dtype):
    """Inside, everything is made and computed in `dtype`."""
    torch.set_default_dtype(dtype)
    constant.cache_clear()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        constant.cache_clear()


def trained(images, method, steps, dtype):
    """What `steps` of the real loop make: the student, the losses, the first gradient, all of all processes."""
    with precision(dtype):
        job = prepare(configuration(images, method, clip_grad=0.0, max_lr=1e-3), steps=steps)
        loop.distributed.start()
        optimizer, scaler = loop.optimizer_and_scaler(job)
        gradients = []

        def note_gradient(optimizer, *_):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

        optimizer.register_step_pre_hook(note_gradient)
        losses = [loop.distributed.mean(s.logs["loss"].clone()) for s in loop.training_steps(job, optimizer, scaler)]
        student = torch.cat([p.detach().flatten() for p in job.method.student.parameters()])
        assert student.dtype == dtype and len(losses) == steps
        return student, torch.stack(losses), gradients[0], getattr(job.method, "queued", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_images):
    folder = tmp_path_factory.mktemp("same")
    make_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def together(folder):
    """{n: calls a function in n processes}"""
    groups = {size: Together(size, folder) for size in (1, 2, 4)}
    yield groups
    for group in groups.values():
        group.end()


def everywhere(groups, *call):
    """What a call gives in 1, 2 and 4 processes: {size: [answer of each process]}."""
    for group in groups.values():
        group.begin(*call)
    return {size: group.answers() for size, group in groups.items()}


def apart(one, other):
    """The largest difference, as a share of the largest number where that is above one."""
    return ((one - other).abs().max() / one.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("method", KNOBS)
def test_two_and_four_processes_make_the_run_of_one(together, folder, method):
    many = everywhere(together, trained, folder / "images", method, STEPS, torch.float64)
    first = everywhere(together, trained, folder / "images", method, 1, torch.float32)
    [(student, losses, _, queued)], [(_, loss, gradient, _)] = many.pop(1), first.pop(1)
    assert queued in (None, 24)  # SwAV's queue is full, and in use
    for size in many:
        deviations = [apart(student, s) for s, *_ in many[size]]
        assert max(deviations) < 1e-8
        assert all(apart(losses, theirs) < 1e-8 for _, theirs, *_ in many[size])
        of_loss = max((abs(theirs - loss) / abs(loss)).item() for _, theirs, *_ in first[size])
        of_gradient = max(((g - gradient).norm() / gradient.norm()).item() for _, _, g, _ in first[size])
        assert of_loss < 1e-4 and of_gradient < 1e-4
        print(f"\n| {method} | {size} | {max(deviations):.0e} | {of_loss:.0e} | {of_gradient:.0e} |", end="")


def run_to(config, stop_after=None):
    """Train, in float64, and note what each position of the stream was: {position: (image, views, masks)}."""
    seen, original, steps = {}, StreamDataset.__getitem__, loop.training_steps

    def noted(dataset, key):
        sample = original(dataset, key)
        seen[key[0]] = (key[1], sample.views, sample.masks)
        return sample

    def stopped(*arguments):
        for step in steps(*arguments):
            if step.number == stop_after and loop.distributed.is_main():
                os.kill(os.getpid(), signal.SIGTERM)  # of one process only
            yield step

    StreamDataset.__getitem__, loop.training_steps = noted, stopped
    try:
        with precision(torch.float64):
            loop.train(config)
    except Stopped:
        assert stop_after is not None
    finally:
        StreamDataset.__getitem__, loop.training_steps = original, steps
    return seen


def states(path):
    content = torch.load(path, weights_only=True)
    return [t for t in content["method_state"].values() if t.is_floating_point()], content["step"]


@pytest.mark.parametrize("method", ["data2vec", "swav"])
def test_a_run_of_two_processes_goes_on_with_one_or_four(together, folder, method):
    """24 images, 8 a step: it stops in the middle of the third epoch; data2vec has left its pixels, SwAV has a queue."""
    config = configuration(folder / "images", method, epochs=5, save_every=9, log_every=1)
    whole, parts = folder / f"{method}-whole", folder / f"{method}-2"
    [expected] = together[1](run_to, configuration_in(config, whole))
    assert sorted(expected) == list(range(15 * 8))
    begun = joined(together[2](run_to, configuration_in(config, parts), 7))
    assert states(parts / "checkpoint_last.pt")[1] == 7
    for size in (1, 4):
        folder_of_size = shutil.copytree(parts, folder / f"{method}-{size}")
        again = TrainConfig(resume_checkpoint=str(folder_of_size / "checkpoint_last.pt"))
        seen = begun | joined(together[size](run_to, again))
        assert sorted(seen) == sorted(expected)
        for position, (image, views, masks) in expected.items():
            assert seen[position][0] == image
            assert all(torch.equal(a, b) for a, b in zip(seen[position][1], views, strict=True))
            assert masks.keys() == seen[position][2].keys()
            assert all(torch.equal(seen[position][2][name], mask) for name, mask in masks.items())
        ends = states(whole / "checkpoint_4.pt"), states(folder_of_size / "checkpoint_4.pt")
        assert ends[0][1] == ends[1][1] == 15
        assert max(apart(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True)) < 1e-8


def configuration_in(config, folder):
    return TrainConfig(**{**vars(config), "checkpoint_out_dir": str(folder)})


def joined(parts):
    """What all processes saw; no position was seen twice."""
    everything = {}
    for part in parts:
        assert not everything.keys() & part.keys()
        everything |= part
    return everything


def traffic(images, grad_accum, hidden_dim):
    """What a step sends: of each of 3 steps the order of gradient buckets, of calls of all_reduce, and of "images", the
    gradient that a backward pass reaches last; and the number of parameters with a gradient."""
    events, original, reduce = [], loop.compiled_and_parallel, dist.all_reduce

    def hook(state, bucket):
        events.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    def hooked(job):
        forward = original(job)
        forward.register_comm_hook(None, hook)
        return forward

    def counted(*arguments, **named):
        events.append("all_reduce")
        return reduce(*arguments, **named)

    config = configuration(images, "data2vec", batch_size=4, grad_accum=grad_accum, hidden_dim=hidden_dim)
    job = prepare(config, steps=3)
    loop.distributed.start()
    job.method.student.vit.patch_embed.proj.weight.register_hook(lambda g: events.append("images"))
    loop.compiled_and_parallel, dist.all_reduce, found = hooked, counted, []
    try:
        for _ in loop.training_steps(job, *loop.optimizer_and_scaler(job)):
            found.append(tuple(events))
            events.clear()
    finally:
        loop.compiled_and_parallel, dist.all_reduce = original, reduce
    return found, sum(p.numel() for p in job.method.parameters() if p.requires_grad)


def test_gradients_travel_once_a_step_while_others_are_computed(together, folder):
    """Not with each of the passes of a step; and the centre of the targets once more, when there is one."""
    for steps, parameters in together[2](traffic, folder / "images", 3, 192):
        for number, events in enumerate(steps):
            buckets = [n for n in events if isinstance(n, int)]
            assert sum(buckets) == parameters
            assert events[:2] == ("images", "images") and events.count("images") == 3  # two passes that send nothing
            assert events.count("all_reduce") <= len(buckets) + 1  # the hook uses it too
            if number > 0:  # after the first backward pass it is known in which order gradients come
                assert len(buckets) > 1 and isinstance(events[2], int)  # before the last gradient is there
