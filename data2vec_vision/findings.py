"""What an evaluation says to people: the table, a verdict in words, the classes, the pairs that are confused."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data2vec_vision.linear import UNCHOSEN, WEAKEST
from data2vec_vision.run import plural
from data2vec_vision.split import listed

PIXELS, UNTRAINED, TRAINED = "raw pixels", "untrained encoder", "trained encoder"
SHOTS = (1, 5, 10)
BEYOND = 2.0  # standard errors from which on a difference counts
FEW_CLASSES = 13  # are all shown
INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    "}
PROBES = {"knn": "kNN", "linear": "a linear probe"}


def findings(
    results: Mapping[str, Mapping[str, Any]],
    predicted: Mapping[str, Mapping[str, np.ndarray]],
    train: np.ndarray,
    test: np.ndarray,
    classes: Sequence[str],
) -> dict[str, Any]:
    """What follows from the figures of each encoder and its predictions [Q] by each probe.

    train [N] and test [Q] are the classes of the images.
    """
    gains = {}
    if UNTRAINED in predicted:
        gains = {
            probe: gain(predicted[TRAINED][probe] == test, predicted[UNTRAINED][probe] == test) for probe in PROBES
        }
    share = (results[TRAINED]["linear"] / 100 * len(test) + 1) / (len(test) + 2)  # not 0 or 1, which have no error
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (test, predicted[TRAINED]["linear"]), 1)
    return {
        "chance": 100 * float(np.bincount(test).max()) / len(test),
        "standard_error": 100 * math.sqrt(share * (1 - share) / len(test)),
        "results": results,
        "gain": gains,
        "verdict": " ".join(filter(None, (verdict(gains), pixels_ahead(results, len(test))))) if gains else "",
        "classes": classes,
        "per_class": class_table(classes, train, test, predicted[TRAINED]),
        "confusion": confusion.tolist(),
        "most_confused": confused_pairs(confusion, classes),
    }


def class_table(
    classes: Sequence[str], train: np.ndarray, test: np.ndarray, predicted: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Images and accuracy by each probe, in per cent, of every class; None where it has no test image."""
    rows = []
    for number, name in enumerate(classes):
        mine = test == number
        right = {p: 100 * float((predicted[p][mine] == number).mean()) if mine.any() else None for p in PROBES}
        rows.append({"class": name, "train": int((train == number).sum()), "test": int(mine.sum()), **right})
    return rows


def gain(right: np.ndarray, right_before: np.ndarray) -> dict[str, float]:
    """Points gained and their standard error; both bool [Q], about the same images.

    The error is that of the mean of the paired differences, which is smaller than that of two samples.
    """
    difference = right.astype(float) - right_before.astype(float)
    spread = difference.var(ddof=1) if len(difference) > 1 else 1.0
    error = math.sqrt((spread + 1 / len(difference)) / len(difference))  # not 0 where all of a few are alike
    return {"points": 100 * difference.mean(), "standard_error": 100 * error}


def verdict(gains: Mapping[str, Mapping[str, float]]) -> str:
    """What training added by each probe of PROBES, and whether that is more than chance explains."""
    points = {name: values["points"] for name, values in gains.items()}
    chance = {name: BEYOND * values["standard_error"] for name, values in gains.items()}
    up = [name for name in gains if points[name] > chance[name]]
    down = [name for name in gains if points[name] < -chance[name]]
    sides = [f"{abs(p):.1f} points {'above' if p >= 0 else 'below'}" for p in points.values()]
    if len({side.split()[-1] for side in sides}) == 1:
        sides = [sides[0] + " the untrained one", *(side.split()[0] for side in sides[1:])]
    else:
        sides = [side + " the untrained one" for side in sides]
    what = " and ".join(f"{side} by {PROBES[name]}" for side, name in zip(sides, gains))
    limit = "chance explains " + " and ".join(f"{c:.1f}" for c in chance.values())
    if len(up) == len(gains):
        ending = "it has learned"
    elif up and not down:
        ending = f"it has learned, as far as {PROBES[up[0]]} can tell"
    elif up:
        ending = f"{PROBES[up[0]]} says that it has learned, {PROBES[down[0]]} that it has lost"
    elif down:
        ending = "it is worse than the untrained encoder; see whether the run collapsed, or train longer"
    else:
        ending = "it is not better than the untrained encoder, as far as these test images can tell"
    return f"The trained encoder is {what} ({limit}): {ending}."


def pixels_ahead(results: Mapping[str, Mapping[str, Any]], count: int) -> str:
    """A sentence where raw pixels do better than the trained encoder on `count` images, by more than chance."""
    limit = 200 * math.sqrt(0.5 / count)
    ahead = {name: results[PIXELS][name] - results[TRAINED][name] for name in PROBES if PIXELS in results}
    sides = [f"{points:.1f} points by {PROBES[name]}" for name, points in ahead.items() if points > limit]
    return f"But raw pixels are ahead of it by {' and '.join(sides)}." if sides else ""


def later_notes(unreadable: Mapping[str, str], train: np.ndarray, trained: Mapping[str, Any]) -> list[str]:
    """Sentences about what was seen only with the images read, or left out of the probes."""
    notes = []
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        count = plural(len(unreadable), "image", "images")
        notes.append(f"{count} that cannot be read left out, such as {listed([name])}: {reason}")
    if missing := [f"{n}-shot" for n in SHOTS if str(n) not in trained["few_shot"]]:
        counts = np.bincount(train)
        least = plural(counts[counts > 0].min(), "training image", "training images")
        notes.append(f"{', '.join(missing)} left out: the smallest class has {least}.")
    if not trained["held_out_accuracy"]:
        notes.append(f"The linear probe's penalty is not chosen but {UNCHOSEN}: no class has two training images.")
    elif trained["penalty"] <= 10.0**WEAKEST:
        notes.append("The linear probe's penalty is the weakest that was tried.")
    return notes


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each of `results`, a column for each probe, in per cent."""
    shots = list(next(iter(results.values()))["few_shot"])
    rows = [["", "kNN", "linear", *(f"{n}-shot" for n in shots)]]
    for name, values in results.items():
        few = [f"{v['mean']:.1f} ± {v['sd']:.1f}" for v in values["few_shot"].values()]
        rows.append([name, f"{values['knn']:.1f}", f"{values['linear']:.1f}", *few])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def class_lines(classes: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by class, worst first; of many classes the 10 worst and the 3 best."""
    ranked = sorted((c for c in classes if c["test"]), key=lambda c: c["linear"])
    few = len(ranked) <= FEW_CLASSES
    width = min(40, max(len(printable(c["class"])) for c in ranked))

    def lines(part: Sequence[Mapping[str, Any]]) -> list[str]:
        return [f"  {printable(c['class']):<{width}}  {c['linear']:5.1f}  of {c['test']:,}" for c in part]

    if few:
        return "\n".join(["By class, linear probe, the worst first:", *lines(ranked)])
    return "\n".join(["The 10 worst classes, linear probe:", *lines(ranked[:10]), "The 3 best:", *lines(ranked[-3:])])


def confused_pairs(confusion: np.ndarray, classes: Sequence[str], count: int = 10) -> list[dict[str, Any]]:
    """The pairs of classes most often confused: confusion [C, C] counts images, a row a true class."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:count]
    pairs = [(index // len(classes), index % len(classes)) for index in order.tolist()]
    return [
        {"class": classes[a], "taken_for": classes[b], "images": int(wrong[a, b]), "of": int(confusion[a].sum())}
        for a, b in pairs
        if wrong[a, b]
    ]


def printable(name: str) -> str:
    """A name on one line, as a terminal takes it."""
    return "".join(c if c.isprintable() else "?" for c in name)[:40]


def text(report: Mapping[str, Any]) -> str:
    """All of an evaluation that a person wants to see, from what its JSON file holds."""
    images, protocol = report["images"], dict(report["protocol"])
    count = f"{images['train']:,} training and {images['test']:,} test images in {len(report['classes'])} classes"
    parts = [
        f"{count}; {protocol.pop('split')}.",
        *report["notes"],
        "",
        f"Accuracy in per cent; chance {report['chance']:.1f}, standard error about {report['standard_error']:.1f}:",
        table(report["results"]),
        "",
        *(textwrap.fill(f"{name}: {words}", 110, **INDENT) for name, words in protocol.items()),
        "",
    ]
    if report["verdict"]:
        parts += [textwrap.fill(report["verdict"], 110), ""]
    parts.append(class_lines(report["per_class"]))
    if len(report["classes"]) > FEW_CLASSES and report["most_confused"]:
        parts.append("Most often confused, linear probe:")
        parts += [
            f"  {printable(p['class'])} taken for {printable(p['taken_for'])}: {p['images']} of {p['of']}"
            for p in report["most_confused"]
        ]
    return "\n".join(parts)
