"""The steps that a run skipped because a number was not finite: which images they had."""

import json
from collections.abc import Sequence

from data2vec_vision import distributed
from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.data import Stream
from data2vec_vision.plan import Job
from data2vec_vision.run import complete_lines, say, step_of

NAMES = 64  # images of a step that are named
LINES = 1000  # steps that are listed
# In fp16 gradients of a finite loss overflow until the factor of the loss is found, and now and then after that.
WHY = {"loss": "its loss is not finite", "gradient": "its gradient is not finite", "fp16": "beyond fp16, as is usual"}


class SkippedSteps:
    """skipped_steps.jsonl: a line a skipped step, with the names of its images. There is none where none was skipped.

    A resumed run begins with the lines of the steps before it.
    """

    def __init__(self, job: Job):
        self.job, self.path = job, job.folder / "skipped_steps.jsonl"
        self._stream = Stream(len(job.source), job.config.seed)
        self._said = False
        self._listed = 0
        if distributed.is_main() and self.path.exists():
            kept = [line for line in complete_lines(self.path) if step_of(line) <= job.first_step]
            with atomic_write(self.path) as file:
                file.write("".join(line + "\n" for line in kept).encode("utf-8", "surrogateescape"))
            self._listed = len(kept)

    def add(self, steps: Sequence[tuple[int, bool]]) -> None:
        """Numbers of steps, each with whether its loss was finite, so that it was the gradient that was not."""
        if not distributed.is_main():
            return
        for number, finite_loss in steps:
            why = "loss" if not finite_loss else "fp16" if self.job.config.precision == "fp16" else "gradient"
            if self._listed < LINES:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": number, "why": WHY[why], **self.images(number)}) + "\n")
                self._listed += 1
            if why != "fp16" and not self._said:
                self._said = True
                say(f"Note     step {number:,} was skipped: {WHY[why]}; {self.path} names the images of such steps")

    def images(self, step: int) -> dict[str, int | list[str]]:
        """How many images step `step`, from 1 on, had, and the names of the first NAMES."""
        G = self.job.config.images_a_step
        positions = range((step - 1) * G, step * G)[:NAMES]
        return {"n_images": G, "images": [self.job.source.name(self._stream.image(p)) for p in positions]}
