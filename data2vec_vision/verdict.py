"""What the figures of a run mean: a verdict in plain words, with the remedy where something is wrong."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """Whether it learns, in words. `level` is "good", "early" or "bad"."""

    verdict: str  # a short name, which stays the same however the words change
    level: str
    headline: str
    text: str  # what is seen and, where it is bad, the remedy


@dataclass(frozen=True)
class Facts:
    """What a judge needs to know of a run."""

    total_steps: int
    warmup: float  # share of the run in which the rate rises
    max_lr: float
    tau: tuple[float, float] | None  # first and last, where there is a teacher
    n_prototypes: int | None
    knobs: tuple[str, ...] = ()  # of the method, by name


# Judged on runs of all methods on two sets of images and on provoked collapses; see benchmarks/RESULTS.md.
FEATURES_ALIKE = 0.03  # spread of unit features
TARGETS_ALIKE = 0.005  # variance between images, of targets that a layer norm has given unit size
SHRUNK = 0.2  # of the first reading: so small a rest of rank or variance is a collapse when other signs agree
CROWDED = 0.5  # entropy of the mean prediction, of 1
AT_LN_K = 0.985  # of ln K: a loss above has not left where it began
NOTHING = 0.01  # R^2
MANY_SKIPPED = 0.1  # share of the steps
CALIBRATING = 50  # steps, of which fp16 skips some until its loss scale fits
FEATURES_GONE = 0.003  # a spread that no encoder begins with
LEARNED_BY = 500, 5000  # steps: after half of a run, and after the warm-up of a long one, something should be learned


class Judge:
    """Reads the lines of metrics.jsonl one after another and says so when what they mean has changed.

    It has no state but these lines: a resumed run reads the old ones first. A problem counts when two readings in a row
    show it, or the last.
    """

    def __init__(self, facts: Facts, labelled: str | None = None):
        self.facts = facts
        self.labelled = labelled  # the images of the kNN: accuracies on others do not count
        self.readings = 0
        self.first: Mapping[str, Any] = {}  # of this phase
        self.untrained: float | None = None  # accuracy of the kNN before training, in per cent
        self.knn: list[float] = []  # and since
        self.knn_images = 1
        self.now = Verdict("early", "early", "Too early to tell", "No figures yet.")
        self._suspicion: Verdict | None = None
        self._before = (0, 0)  # steps, and skipped steps, at the reading before

    def add(self, line: Mapping[str, Any]) -> Verdict | None:
        """The verdict after this line if it is another than before, else None."""
        if line.get("knn") is not None and line.get("knn_path") == self.labelled:
            self._add_knn(line)
        if line.get("feature_std") is not None:
            return self._read(line)
        if self._suspicion is not None and line["step"] == self.facts.total_steps:
            return self._say(self._suspicion)
        return None

    def _add_knn(self, line: Mapping[str, Any]) -> None:
        self.knn_images = line.get("knn_images", 1)
        if line["step"] == 0:
            self.untrained = line["knn"]
        else:
            self.knn.append(line["knn"])

    def _read(self, line: Mapping[str, Any]) -> Verdict | None:
        self.readings += 1
        if line.get("phase") != self.first.get("phase"):  # figures of another target: nothing to compare with
            self.first, self._suspicion = {}, None
        self.first = self.first or line
        verdict = self._problem(line)
        self._before = line["step"], line.get("skipped") or 0
        again = verdict is not None and self._suspicion is not None and verdict.verdict == self._suspicion.verdict
        sure = verdict is None or again or line["step"] == self.facts.total_steps
        self._suspicion = verdict
        return self._say(verdict or self._fine(line)) if sure else None

    def _say(self, verdict: Verdict) -> Verdict | None:
        before, self.now = self.now, verdict
        return verdict if verdict.verdict != before.verdict or self.readings == 1 else None

    def _settled(self, step: int) -> bool:
        """Whether a run has gone on for long enough that something should have been learned."""
        progress = step / self.facts.total_steps
        soon, surely = LEARNED_BY
        return (progress >= 0.5 and step >= soon) or (progress >= self.facts.warmup + 0.1 and step >= surely)

    def _problem(self, line: Mapping[str, Any]) -> Verdict | None:
        for look in (self._numbers, self._prototypes, self._targets, self._features, self._predictions, self._labels):
            if found := look(line):
                return Verdict(found[0], "bad", found[1], found[2])
        return None

    def _calmer(self) -> str:
        """The remedy for what moves too fast."""
        f = self.facts
        tau = f", or raise --tau-initial and --tau-end (now {f.tau[0]:g} and {f.tau[1]:g})" if f.tau else ""
        return f"Lower --max-lr (now {f.max_lr:g}){tau}."

    def _numbers(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        steps, skipped = line["step"] - self._before[0], (line.get("skipped") or 0) - self._before[1]
        if line["step"] < CALIBRATING or skipped <= MANY_SKIPPED * steps:
            return None
        seen = f"{skipped:,} of the last {steps:,} steps had no finite gradient and changed nothing."
        return (
            "numbers",
            "The numbers overflow",
            f"{seen} Lower --max-lr (now {self.facts.max_lr:g}) or use --precision fp32.",
        )

    def _prototypes(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        K, entropy = self.facts.n_prototypes, line.get("entropy")
        if K is None or entropy is None:
            return None
        fewer = f"fewer prototypes (--set n_prototypes={max(2, K // 4)})"
        if entropy < CROWDED:
            weight = ", a larger --set mean_entropy_weight" if "mean_entropy_weight" in self.facts.knobs else ""
            seen = f"Their mean assignment has an entropy of {entropy:.2f}, where 1 is an even use of all {K:,}."
            return (
                "crowded",
                "Nearly all images fall on a few prototypes",
                f"{seen} {self._calmer()} Or try {fewer}{weight}.",
            )
        loss, ln_k = line.get("cross_entropy", line.get("loss")), math.log(K)
        if self._settled(line["step"]) and loss is not None and loss > AT_LN_K * ln_k:
            sharper = ", sharper assignments (a smaller --set epsilon)" if "epsilon" in self.facts.knobs else ""
            seen = f"The loss sits at ln({K}) = {ln_k:.2f}, what it is when every prototype is as likely as any other."
            return (
                "unused",
                "The prototypes are unused",
                f"{seen} Try {fewer}{sharper}, a larger --batch-size, or a lower --max-lr.",
            )
        return None

    def _targets(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """Only a teacher's targets can collapse; pixels are what they are."""
        images, first = line.get("target_variance_images"), self.first.get("target_variance_images")
        if images is None or first is None:
            return None
        fell = f"Their variance between images is {images:.2g}, {first:.2g} at first."
        if self.facts.tau is None or first < 2 * TARGETS_ALIKE:
            look = f"{fell} Are the images all alike, or blank? Look at the views, and at what `scan` says."
            return ("plain", "The targets hardly differ between images", look) if images < TARGETS_ALIKE else None
        r2 = line.get("r2_position")
        if images < TARGETS_ALIKE or (images < SHRUNK * first and (r2 is None or r2 < NOTHING) and self._late(line)):
            return (
                "targets",
                "The targets no longer differ between images: the encoder is collapsing",
                f"{fell} {self._calmer()}",
            )
        return None

    def _late(self, line: Mapping[str, Any]) -> bool:
        return line["step"] >= (self.facts.warmup + 0.1) * self.facts.total_steps

    def _features(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        spread, rank, first = line["feature_std"], line.get("rankme"), self.first.get("rankme")
        if spread < FEATURES_GONE or (spread < FEATURES_ALIKE and spread < self.first["feature_std"] / 2):
            seen = f"Their spread is {spread:.3f}, {self.first['feature_std']:.2f} at first."
            return "features", "All images get nearly the same features", f"{seen} {self._calmer()}"
        if rank is not None and first is not None and rank < 3 and rank < SHRUNK * first:
            seen = f"RankMe is {rank:.1f}, {first:.1f} at first."
            return "rank", "The features have shrunk to a few directions", f"{seen} {self._calmer()}"
        return None

    def _predictions(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        constant, position = line.get("r2_constant"), line.get("r2_position")
        if constant is None or position is None or not self._settled(line["step"]):
            return None
        lr = self.facts.max_lr
        if constant < NOTHING:
            seen = f"They explain {100 * max(0.0, constant):.1f} % of what the targets vary by."
            return (
                "constant",
                "The predictions are no better than the mean",
                f"{seen} Try --max-lr {lr / 10:g} or {lr * 10:g}.",
            )
        if position < NOTHING:
            seen = (
                f"They explain {100 * constant:.0f} % of what the targets vary by, but nothing that the place does not."
            )
            return (
                "place",
                "The predictions know the place and not the image",
                f"{seen} Train for longer, or try another --max-lr (now {lr:g}).",
            )
        return None

    def _labels(self, line: Mapping[str, Any]) -> tuple[str, str, str] | None:
        if self.untrained is None or not self.knn or not self._settled(line["step"]):
            return None
        if self.knn[-1] >= self.untrained - self._noise():
            return None
        seen = f"kNN accuracy on your labels is {self.knn[-1]:.1f} %, and was {self.untrained:.1f} % before training."
        return (
            "labels",
            "The features have become worse than untrained ones",
            f"{seen} {self._calmer()} Or train for longer.",
        )

    def _noise(self) -> float:
        """Two standard errors, at most, of the difference of two kNN accuracies, in points."""
        return 200 * (0.5 / self.knn_images) ** 0.5

    def _fine(self, line: Mapping[str, Any]) -> Verdict:
        """What there is to say where nothing is wrong."""
        figures = self._figures(line)
        learned = self._has_learned(line)
        if self.readings < 3 or not self._late(line) or (learned is False and self.now.level != "good"):
            when = "Too early" if line["step"] < self.facts.total_steps else "Too short a run"
            return Verdict("early", "early", f"{when} to tell", f"No sign of a collapse so far. {figures}")
        if self.untrained is not None and self.knn and max(self.knn) < self.untrained + self._noise():
            headline = "No collapse, but on your labels no gain over an untrained encoder yet"
            return Verdict("unproven", "early", headline, figures)
        if learned is None and not self.knn:
            more = "Whether it learns, its figures do not say; --eval-path, a folder of labelled images, would."
            return Verdict("quiet", "early", "No sign of a collapse", f"{figures} {more}")
        return Verdict("learning", "good", "It is learning", figures)

    def _has_learned(self, line: Mapping[str, Any]) -> bool | None:
        """By the predictions, or the loss of a method with prototypes; None where there is neither."""
        if line.get("r2_position") is not None:
            return line["r2_position"] >= NOTHING
        loss, K = line.get("cross_entropy", line.get("loss")), self.facts.n_prototypes
        return None if K is None or loss is None else loss <= AT_LN_K * math.log(K)

    def _figures(self, line: Mapping[str, Any]) -> str:
        parts = []
        if line.get("r2_constant") is not None and line.get("r2_position") is not None:
            constant, position = (100 * max(0.0, line[name]) for name in ("r2_constant", "r2_position"))
            parts.append(
                f"Predictions explain {constant:.0f} % of what the targets vary by, "
                f"and {position:.0f} % of what the place does not tell."
            )
        if line.get("entropy") is not None:
            parts.append(f"The mean assignment to prototypes has an entropy of {line['entropy']:.2f} (1: even use).")
        rank = f", in about {line['rankme']:.0f} directions (RankMe)" if line.get("rankme") else ""
        parts.append(f"Features of the views differ (spread {line['feature_std']:.2f} of 1){rank}.")
        if self.knn:
            untrained = f", untrained {self.untrained:.1f} %" if self.untrained is not None else ""
            parts.append(f"kNN on your labels: {self.knn[-1]:.1f} %{untrained}.")
        return " ".join(parts)
