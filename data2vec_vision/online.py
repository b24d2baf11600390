"""What a run shows while it trains: figures for files and loggers, kNN on labelled images, a verdict in words."""

import math
from typing import Any

from PIL import Image

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
    """Watches a run from its main process. It changes nothing of it: no weight, no random state.

    Raises InputError for an --eval-path that holds no classes and for loggers that cannot be had.
    """

    def __init__(self, job: Job, folder: RunFolder):
        self.job, self.folder = job, folder
        self.judge = Judge(facts(job))
        self.probe: KnnProbe | None = None
        if not distributed.is_main():
            return
        if job.config.eval_path:
            self.probe = KnnProbe(job.config.eval_path, job.method.student.transform, workers=job.config.workers)
        self.loggers = Loggers(job.config, folder.path, job.first_step)
        for line in folder.lines:
            self.judge.add(line)
        self._examples: list[Image.Image] | None = None

    def start(self) -> None:
        """Before the first step of all: the kNN of the untrained encoder, and the views."""
        if self.job.first_step == 0 and distributed.is_main():
            self.evaluate(0, 0)
            if self.loggers.pictures:
                self.loggers.picture("views", draw_views(self.job), 0)

    def log(self, record: dict[str, Any]) -> None:
        """A line of figures, with the verdict where it has changed and at the end."""
        if not distributed.is_main():
            return
        changed = self.judge.add(record)
        if record["step"] == self.job.schedule.total_steps:
            changed = self.judge.now
        if changed is not None:
            record |= {**changed._asdict(), "steps": self.job.schedule.total_steps}
            self.loggers.text("verdict", f"{changed.headline}. {changed.text}", record["step"])
            if changed.level != "early" and record["step"] < self.job.schedule.total_steps:
                say(told(changed, record["step"]))
        self.folder.log(record)
        self.loggers.log(record)

    def epoch_done(self, step: int, epoch: int) -> None:
        """After the last step of an epoch: kNN and pictures, where they are due."""
        if not distributed.is_main():
            return
        if epoch in self.job.evaluated_epochs:
            self.evaluate(step, epoch)
        if epoch in self.job.saved_epochs and self.loggers.pictures:
            student = self.job.method.student
            if self._examples is None:
                self._examples = examples(self.job.source)
            if self._examples:
                drawn = draw_patch_features([(f"epoch {epoch}", student.eval())], self._examples)
                self.job.method.train()
                self.loggers.picture("patch features", drawn, step)

    def evaluate(self, step: int, epoch: int) -> None:
        if self.probe is None:
            return
        method = self.job.method
        accuracy = self.probe.probe(method.student, self.job.device, "fp32", None)
        record = {
            "step": step,
            "epoch": epoch,
            "knn": accuracy if math.isfinite(accuracy) else None,
            "knn_images": len(self.probe.test),
        }
        self.judge.add(record)
        self.folder.log(record)
        self.loggers.log(record)
        before = f", {self.judge.knn[0]:.1f} % before training" if len(self.judge.knn) > 1 else ""
        when = "Before training" if step == 0 else f"After epoch {epoch}"
        on = f"{record['knn_images']:,} images of {self.job.config.eval_path}"
        say(f"{when}: kNN accuracy {accuracy:.1f} % on {on}{before}")

    def finish(self) -> str:
        """The last words on a finished run, after writing its page."""
        if not distributed.is_main():
            return ""
        return "\n".join([told(self.judge.now), *self.write_report()])

    def write_report(self) -> list[str]:
        if self.job.config.no_report:
            return []
        try:
            return [f"Report: {report(str(self.folder.path), maps=False)}"]
        except Exception as error:  # the run itself is safe; its page can be made again
            return [f"The report could not be made: {one_line(error)}; try {command('report', self.folder.path)}"]

    def close(self) -> None:
        if distributed.is_main():
            self.loggers.close()


def told(verdict: Verdict, step: int | None = None) -> str:
    """A verdict as a line of the terminal."""
    when = f" at step {step:,}" if step is not None else ""
    return f"Verdict{when}: {verdict.headline}. {verdict.text}"
