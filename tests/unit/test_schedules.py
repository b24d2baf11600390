"""Schedules are pure functions of progress; a run can be made longer without a jump."""

import pytest
import torch

from data2vec_vision.schedules import Plan, linear_ramp, one_cycle


# torch divides by zero where its warm-up is a single step, and starts past the peak where it is less.
@pytest.mark.parametrize(("total", "warmup"), [(t, w) for w in (0.1, 0.3) for t in range(2, 26) if w * t > 1])
def test_one_cycle_is_torchs_one_cycle(total, warmup):
    """torch counts phases in whole steps and ends them one step early: the same curve at its own positions."""
    peak_at = warmup * total - 1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    for step in range(total):
        ours = one_cycle(step / (total - 1), 0.5, peak_at / (total - 1))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


@pytest.mark.parametrize("total", range(1, 26))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_runs_of_1_to_25_steps_have_a_rate_at_every_step(total, warmup):
    plan = Plan(((0, total),), 0.5, warmup)
    rates = [plan.lr(step) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates)


def test_linear_ramp_rises_then_stays():
    values = [linear_ramp(p / 10, 0.9, 0.99, 0.3) for p in range(11)]
    assert values[0] == 0.9 and values[1] == pytest.approx(0.93)
    assert values[3:] == [0.99] * 8
    assert linear_ramp(0.0, 0.5, 0.9, 0.0) == 0.9


def test_progress_ends_at_one():
    plan = Plan(((0, 40),), 1.0, 0.1)
    assert [plan.progress(s) for s in (0, 10, 40)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("at", [1, 37, 100])
def test_a_longer_plan_begins_at_the_present_rate_and_reaches_the_new_one(at):
    old = Plan(((0, 100),), 1.0, 0.1)
    new = old.extended(at, 300)
    assert new.total_steps == 300
    assert new.lr(at) == pytest.approx(old.lr(at))
    jumps = [abs(new.lr(s + 1) - new.lr(s)) for s in range(at, 299)]
    assert max(jumps) < 0.12  # a plan of 300 steps with 10 % warm-up rises by 0.05 a step, a blend by less than 0.12
    blended = at + round(0.1 * (300 - at)) + 1
    fresh = Plan(((0, 300),), 1.0, 0.1)
    assert all(new.lr(s) == pytest.approx(fresh.lr(s)) for s in range(blended, 300))


def test_progress_never_falls_when_a_run_is_made_longer():
    plan = Plan(((0, 100),), 1.0, 0.1).extended(50, 400).extended(120, 1000)
    values = [plan.progress(s) for s in range(50, 1001)]
    assert values[0] == 0.5 and values[-1] == 1.0
    assert values == sorted(values)


def test_an_extended_plan_is_known_by_its_segments():
    plan = Plan(((0, 100),), 1.0, 0.1).extended(50, 400)
    again = Plan(tuple(map(tuple, [[0, 100], [50, 400]])), 1.0, 0.1)
    assert [again.lr(s) for s in range(50, 400)] == [plan.lr(s) for s in range(50, 400)]
