"""What a run shows while it trains: figures for files and loggers, kNN on labelled images, a verdict in words."""

import math
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from data2vec_vision import distributed
from data2vec_vision.errors import one_line
from data2vec_vision.evaluate import KnnProbe
from data2vec_vision.figures import draw_patch_features, draw_views, examples
from data2vec_vision.loggers import Loggers
from data2vec_vision.plan import Job
from data2vec_vision.report import report
from data2vec_vision.run import RunFolder, command, say
from data2vec_vision.verdict import Facts, Judge, Verdict


def facts(job: Job) -> Facts:
    """What the judge is told of the run."""
    c, knobs = job.config, vars(job.method.config)
    has_tau = job.method.teacher is not None and {"tau_initial", "tau_end"} <= knobs.keys()
    return Facts(
        total_steps=job.schedule.total_steps,
        warmup=c.warmup_pct,
        max_lr=c.max_lr,
        tau=(knobs["tau_initial"], knobs["tau_end"]) if has_tau else None,
        n_prototypes=knobs.get("n_prototypes"),
        knobs=tuple(knobs),
    )


class Onlooker:
    """Watches a run from its main process. It changes nothing of it, no weight and no random state, and cannot end it.

    Raises InputError, before the first step, for an --eval-path without classes and for loggers that cannot be had.
    """

    def __init__(self, job: Job, folder: RunFolder):
        self.job, self.folder = job, folder
        self.judge = Judge(facts(job), job.config.eval_path)
        self.probe: KnnProbe | None = None
        self._examples: list[Image.Image | Tensor] = []
        self._given_up: set[str] = set()
        if not distributed.is_main():
            return
        if job.config.eval_path:
            self.probe = KnnProbe(job.config.eval_path, job.method.student.transform, workers=job.config.workers)
        self.loggers = Loggers(job.config, folder.path, job.first_step)
        for line in folder.lines:
            self.judge.add(line)

    def start(self) -> None:
        """Before the first step of all: the kNN of the untrained encoder, and the views."""
        if self.job.first_step == 0 and distributed.is_main():
            self._try("kNN", lambda: self._evaluate(0, 0))
            if self.loggers.pictures:
                self._try("the picture of the views", lambda: self.loggers.picture("views", draw_views(self.job), 0))

    def log(self, record: dict[str, Any]) -> None:
        """A line of figures, and a verdict with those that it is read off; it is printed when it changes."""
        if not distributed.is_main():
            return
        last, before = record["step"] == self.job.schedule.total_steps, self.judge.now
        changed = self.judge.add(record)
        if last or record.get("feature_std") is not None:
            record |= self.judge.now._asdict()
        if changed is not None and not last:
            self._try("logging", lambda: self.loggers.text("verdict", told(changed), record["step"]))
            if changed.level != "early" or before.level == "bad":
                say(told(changed, record["step"]))
        self.folder.log(record)
        self._try("logging", lambda: self.loggers.log(record))

    def evaluate_if_due(self, step: int, epoch: int) -> None:
        """After the last step of an epoch: the kNN."""
        if distributed.is_main() and epoch in self.job.evaluated_epochs:
            self._try("kNN", lambda: self._evaluate(step, epoch))

    def draw(self, step: int, epoch: int) -> None:
        """Pictures for the loggers, of an epoch whose files are written."""
        if distributed.is_main() and self.loggers.pictures:
            self._try("the picture of the patch features", lambda: self._draw(step, epoch))

    def _draw(self, step: int, epoch: int) -> None:
        self._examples = self._examples or examples(self.job.source, self.job.config.channels)
        try:
            drawn = draw_patch_features([(f"epoch {epoch}", self.job.method.student.eval())], self._examples)
        finally:
            self.job.method.train()
        self.loggers.picture("patch features", drawn, step)

    def _evaluate(self, step: int, epoch: int) -> None:
        if self.probe is None:
            return
        accuracy = self.probe.probe(self.job.method.student, self.job.device, "fp32", None)
        path, count = self.job.config.eval_path, len(self.probe.test)
        knn = accuracy if math.isfinite(accuracy) else None
        record = {"step": step, "epoch": epoch, "knn": knn, "knn_images": count, "knn_path": path}
        self.judge.add(record)
        self.folder.log(record)
        self.loggers.log(record)
        untrained = self.judge.untrained
        before = f", {untrained:.1f} % before training" if untrained is not None and step else ""
        when = f"After epoch {epoch}" if step else "Before training"
        say(f"{when}: kNN accuracy {accuracy:.1f} % on {count:,} images of {path}{before}")

    def _try(self, what: str, look: Callable[[], None]) -> None:
        """Looking on must not end a run: what fails is said and left out from then on."""
        if what in self._given_up:
            return
        try:
            look()
        except Exception as error:
            self._given_up.add(what)
            say(f"note: {what} is left out from here on: {one_line(error)}")

    def finish(self) -> str:
        """The last words on a finished run, after writing its page."""
        if not distributed.is_main():
            return ""
        self._try("logging", lambda: self.loggers.text("verdict", told(self.judge.now), self.job.schedule.total_steps))
        return "\n".join([told(self.judge.now), *self.write_report()])

    def write_report(self) -> list[str]:
        if self.job.config.no_report:
            return []
        try:
            path, notes = report(str(self.folder.path), maps=False)
            return [f"Report: {path}", *notes]
        except Exception as error:  # the run itself is safe; its page can be made again
            return [f"The report could not be made: {one_line(error)}; try {command('report', self.folder.path)}"]

    def close(self) -> None:
        if distributed.is_main():
            self.loggers.close()


def told(verdict: Verdict, step: int | None = None) -> str:
    """A verdict as a line of the terminal."""
    when = f" at step {step:,}" if step is not None else ""
    return f"Verdict{when}: {verdict.headline}. {verdict.text}"
