"""Schedules: pure functions of progress in [0, 1], so there is nothing to save and nothing to restore."""

import math
from dataclasses import dataclass


def one_cycle(progress: float, peak: float, warmup: float, start: float = 25.0, end: float = 1e4) -> float:
    """The one-cycle rate (Smith & Topin 2018), cosine in both phases, as in torch's OneCycleLR.

    Rises from `peak / start` to `peak` at progress `warmup`, then falls to `peak / start / end`.
    """
    low, last = peak / start, peak / start / end
    if progress < warmup:
        return cosine(low, peak, progress / warmup)
    if warmup >= 1:
        return peak
    return cosine(peak, last, min(1.0, (progress - warmup) / (1 - warmup)))


def cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def linear_ramp(progress: float, first: float, last: float, until: float) -> float:
    """From `first` to `last` in a straight line until progress `until`, then constant."""
    return last if progress >= until else first + (last - first) * progress / until


@dataclass(frozen=True)
class Plan:
    """How far the run is at each step, and its learning rate, also when its length was changed under way.

    `segments` are (first step, total steps) pairs: a run begins as ((0, total),), and each time it
    is given more epochs at step t, (t, new total) is added. In the first `warmup` part of a later
    segment the rate goes smoothly from what it was to the new plan's; progress never falls, so no
    schedule that a method hangs on it (the teacher's tau) runs backwards.
    """

    segments: tuple[tuple[int, int], ...]
    max_lr: float
    warmup: float

    @property
    def total_steps(self) -> int:
        return self.segments[-1][1]

    def progress(self, step: int) -> float:
        """The share of the run that is done when `step` steps are, in [0, 1]; it never falls."""
        ends = [first for first, _ in self.segments[1:]] + [self.total_steps]
        return max(min(step, end) / total for (_, total), end in zip(self.segments, ends))

    def lr(self, step: int) -> float:
        """The learning rate of step `step` in [0, total_steps)."""
        return self._lr(step, len(self.segments) - 1)

    def extended(self, step: int, total_steps: int) -> "Plan":
        """This plan with `total_steps` in all, decided when `step` steps were done."""
        return Plan((*self.segments, (step, total_steps)), self.max_lr, self.warmup)

    def _lr(self, step: int, segment: int) -> float:
        first, total = self.segments[segment]
        planned = one_cycle(step / total, self.max_lr, self.warmup)
        if segment == 0:
            return planned
        blend = max(1.0, self.warmup * (total - first))
        share = min(1.0, (step - first) / blend)
        return cosine(self._lr(first, segment - 1), planned, share)
