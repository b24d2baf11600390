"""A number that is not finite: its step is skipped, its images are listed, and nothing of it stays in the run's state."""

import json

import pytest
import torch
from test_step import NAMES, job_of
from torch import nn

from data2vec_vision import skips, train
from data2vec_vision.data import Stream
from data2vec_vision.train import Window, clip_and_step, first_not_finite, optimizer_and_scaler, training_steps

PRECISIONS = [*((name, "fp32") for name in NAMES), ("data2vec", "bf16"), ("data2vec", "fp16"), ("swav", "fp16")]


def spoil_input(job, number):
    """In the forward pass of that number one pixel of the first view is not a number."""
    passes = []

    def hook(module, args):
        passes.append(None)
        if len(passes) == number:
            args[0][0][0, 0, 0, 0] = float("nan")

    job.method.register_forward_pre_hook(hook)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_an_input_that_is_not_a_number_costs_its_step_and_nothing_else(images, name, precision):
    """Neither weights nor moments, teacher, centre or queue keep any of it: the steps after it are finite."""
    knobs = {"swav": ("queue_length=8", "queue_start=0"), "msn": ("n_prototypes=16", "head_dim=32")}.get(name, ())
    job = job_of(images, method=name, precision=precision, set=knobs, grad_accum=2)
    spoil_input(job, 3)
    optimizer, scaler = optimizer_and_scaler(job)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=precision == "fp16")
    skipped, losses = [], []
    for step in training_steps(job, optimizer, scaler):
        skipped.append(step.skipped.item())
        losses.append(step.logs["loss"].isfinite().item())
        assert first_not_finite(job.method, optimizer) == "", step.number
    assert skipped == [0, 1, 0] and losses[0] and losses[2]
    assert not losses[1] or name == "msn"  # whose spoilt target shows in the gradient only


def gradients_of(value):
    linear = nn.Linear(4, 4)
    for parameter in linear.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return linear


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_a_gradient_or_a_norm_that_is_not_finite_changes_nothing(value, clip, fp16):
    """Gradients of 1e30 are finite, and their norm in fp32 is not."""
    linear = gradients_of(value)
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=fp16)
    scaler.scale(torch.zeros(()))  # as the backward pass does
    _, skipped = clip_and_step(optimizer, scaler, linear, clip)
    assert skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    for parameter in linear.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert clip_and_step(optimizer, scaler, linear, clip)[1] == 0
    assert not torch.equal(linear.weight, before["weight"]) and linear.weight.isfinite().all()


def listed(job):
    path = job.folder / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def take(job, window, bad, read_every, norm_only=False):
    """The window's part in steps of which some are skipped; without the training."""
    for number in range(1, 13):
        skipped = torch.tensor(float(number in bad))
        loss = torch.tensor(1.0 if norm_only or number not in bad else float("nan"))
        step = train.Step(number, 0.1, {"loss": loss}, skipped, {}, 0.0, {}, "", {})
        window.add(step)
        if number % read_every == 0:
            window.read(step)


def test_the_images_of_skipped_steps_are_listed_by_name(images, capsys):
    job = job_of(images, precision="fp32", grad_accum=2, checkpoint_out_dir="run")
    job.folder.mkdir()
    take(job, Window(job), {2, 3, 9}, read_every=4)
    lines, stream = listed(job), Stream(24, job.config.seed)
    assert [line["step"] for line in lines] == [2, 3, 9]
    for line in lines:
        positions = range(8 * (line["step"] - 1), 8 * line["step"])
        assert line["images"] == [job.source.name(stream.image(p)) for p in positions] and line["n_images"] == 8
        assert line["why"] == "its loss is not finite"
    out = capsys.readouterr().out
    assert out.count("Note") == 1 and "step 2 was skipped" in out and "run/skipped_steps.jsonl names" in out


def test_the_list_is_bounded(images, monkeypatch):
    monkeypatch.setattr(train, "NOTED", 2)
    monkeypatch.setattr(skips, "NAMES", 3)
    monkeypatch.setattr(skips, "LINES", 3)
    job = job_of(images, precision="fp32", grad_accum=2, checkpoint_out_dir="run")
    job.folder.mkdir()
    take(job, Window(job), set(range(1, 13)), read_every=4)
    assert [line["step"] for line in listed(job)] == [1, 2, 5]
    assert all(len(line["images"]) == 3 and line["n_images"] == 8 for line in listed(job))


def test_what_fp16_skips_while_it_looks_for_its_scale_is_no_alarm(images, capsys):
    job = job_of(images, precision="fp16", checkpoint_out_dir="run")
    job.folder.mkdir()
    take(job, Window(job), {1, 2}, read_every=4, norm_only=True)
    assert [line["why"] for line in listed(job)] == ["beyond fp16, as is usual"] * 2
    assert "Note" not in capsys.readouterr().out


def test_where_nothing_is_skipped_there_is_no_list(images):
    job = job_of(images, precision="fp32", checkpoint_out_dir="run")
    job.folder.mkdir()
    take(job, Window(job), set(), read_every=4)
    assert not (job.folder / "skipped_steps.jsonl").exists()
