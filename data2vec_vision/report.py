"""One page about a run: is it learning, what did it see, what do its features tell apart. One file, no network."""

import csv
import io
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.config import TrainConfig, fields, flag, read_config
from data2vec_vision.device import find_device, versions
from data2vec_vision.errors import InputError, one_line
from data2vec_vision.gallery import confusions, draw_pictures
from data2vec_vision.run import command, complete_lines

NAME = "report.html"
POINTS = 300  # of a curve
WHOLE = ("step", "steps", "epoch", "skipped", "bad_files")  # numbers of a line that are whole
WORDS = ("verdict", "level", "headline", "text")
BAD_SHOWN = 50
CLASSES = 20  # in a table

CURVES = {  # name in metrics.jsonl: title, what it tells
    "loss": ("Loss", "what training lowers; with a moving teacher it may rise while the features get better"),
    "knn": ("kNN accuracy", "per cent, on the labelled images of --eval-path; step 0 is before training"),
    "feature_std": (
        "Feature spread",
        "of what the student saw; 0: all views have the same features, 1: they point everywhere",
    ),
    "rankme": ("RankMe", "how many directions these features use, at most their width"),
    "r2_constant": ("R² beside the mean", "share of the targets' variance that is predicted"),
    "r2_position": ("R² beside the place", "the same, of what the place in the image does not tell"),
    "target_variance_tokens": ("Target variance over tokens", "near 0: the targets have collapsed"),
    "target_variance_images": ("Target variance over images", "at one place; near 0: they tell the place only"),
    "entropy": ("Prototype entropy", "of the mean prediction; 1: all prototypes are used alike, 0: a single one"),
    "target_entropy": ("Entropy of a target", "1: an image belongs to no prototype, 0: to exactly one"),
    "lr": ("Learning rate", ""),
    "tau": ("Teacher's tau", "share of itself that the teacher keeps in a step"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "images_per_second": ("Images a second", ""),
    "data_wait": ("Waiting for data", "share of the time; more workers help when it is large"),
}
# Whose curves begin at 0, so that noise does not look like a change.
FROM_ZERO = {"feature_std", "rankme", "target_variance_tokens", "target_variance_images", "entropy", "target_entropy",
             "images_per_second", "data_wait"}  # fmt: skip


def report(run: str, device: str | None = None, maps: bool = True) -> tuple[Path, list[str]]:
    """Write report.html to the folder of a run, running, stopped or finished; its path, and what it lacks and why.

    The pictures are made anew from the student files and the images; where these are gone the page says so. With `maps`
    there is a map by UMAP or t-SNE beside that by PCA, where one is installed; it takes a while.
    Raises InputError for a folder without a run, and for a `device` that there is not.
    """
    folder = Path(run)
    config, lines = read_run(folder)
    if device:
        find_device(device)
    page = Environment(loader=PackageLoader("data2vec_vision", "."), autoescape=True).get_template(NAME)
    pictures, notes = draw_pictures(folder, config, lines, device, maps)
    pictures += confusions(folder)
    html = page.render(**contents(folder, config, lines), pictures=pictures, notes=notes)
    try:
        with atomic_write(folder / NAME) as file:
            file.write(html.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"cannot write {folder / NAME}: {error.strerror}") from error
    return folder / NAME, notes


def read_run(folder: Path) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The settings of a run and the lines of its metrics.jsonl. Raises InputError where there are none."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the folder of a run, such as runs/photos-data2vec")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no run: it has no config.json; give the folder that `train` wrote to")
    try:
        config = TrainConfig(**read_config(str(folder / "config.json"), {}))
    except InputError as error:
        raise InputError(str(error).replace("--config ", "")) from error
    lines = [line for text in complete_lines(folder / "metrics.jsonl") if (line := sound(text))]
    if not lines:
        raise InputError(f"{folder / 'metrics.jsonl'} has no lines yet; `train` writes one every --log-every steps")
    return config, lines


def sound(text: str) -> dict[str, Any]:
    """The numbers and the verdict in a line of metrics.jsonl; {} for one that a failing disk has spoilt."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(line, dict) or any(type(line.get(name, 0)) is not int for name in WHOLE):
        return {}
    words = line if all(isinstance(line.get(name), str) for name in WORDS) else {}
    numbers = {n: v for n, v in line.items() if isinstance(v, int | float) and abs(v) <= sys.float_info.max}
    return numbers | {name: words[name] for name in WORDS if name in words} if "step" in line else {}


def write_csv(run: str, path: str) -> Path:
    """The lines of a run's metrics.jsonl as a table, a column for each name. Raises InputError as `report`."""
    if not path.lower().endswith(".csv"):
        raise InputError(f"--csv {path!r} must end in .csv")
    _, lines = read_run(Path(run))
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(lines)
    try:
        with atomic_write(path) as file:
            file.write(text.getvalue().encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return Path(path)


def contents(folder: Path, config: TrainConfig, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says in words, numbers and curves."""
    trained = [line for line in lines if "loss" in line] or list(lines)
    last, verdicts = trained[-1], [line for line in lines if "verdict" in line]
    total = next((line["steps"] for line in reversed(lines) if "steps" in line), None)
    changes = [line for before, line in zip([{}, *verdicts], verdicts) if line["verdict"] != before.get("verdict")]
    finished = total is not None and last["step"] >= total
    unsaid = {"level": "early", "headline": "No verdict yet", "text": "It comes with the first steps of training."}
    bad = [line.partition("\t")[::2] for line in complete_lines(folder / "bad_files.txt")]
    return {
        "name": folder.resolve().name,
        "method": Path(config.method).stem,
        "input_path": ", ".join(config.inputs),
        "state": f"finished after {last['step']:,} steps"
        if finished
        else f"at step {last['step']:,}" + (f" of {total:,}" if total else ""),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "verdict": verdicts[-1] if verdicts else unsaid,
        "history": [(line["step"], line["headline"]) for line in changes],
        "tiles": list(tiles(lines, config)),
        "charts": [curve for name in curve_names(lines) if (curve := chart(name, lines))],
        "evaluations": [*evaluations(folder)],
        "n_bad": len(bad),
        "bad_files": bad[:BAD_SHOWN],
        "command": reproduce(config, folder),
        "configuration": [(name, shown(value)) for name, value in asdict(config).items()],
        "environment": ", ".join(f"{name} {value}" for name, value in versions().items())
        + f", Python {platform.python_version()} wrote this page",
    }


def shown(value: Any) -> str:
    return "" if value is None else " ".join(value) if isinstance(value, tuple) else str(value)


def tiles(lines: Sequence[Mapping[str, Any]], config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The figures on top: label, value."""

    def latest(name: str) -> Any:
        return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)

    for name, label, form in (
        ("loss", "loss", "{:.4g}"),
        ("knn", "kNN accuracy", "{:.1f} %"),
        ("feature_std", "feature spread", "{:.3f}"),
        ("rankme", "RankMe", "{:.1f}"),
        ("r2_constant", "R² beside the mean", "{:.3f}"),
        ("r2_position", "R² beside the place", "{:.3f}"),
        ("entropy", "prototype entropy", "{:.3f}"),
        ("images_per_second", "images a second", "{:,.0f}"),
    ):
        if (value := latest(name)) is not None:
            yield label, form.format(value)
    yield "epoch", f"{lines[-1].get('epoch', 0) + 1} of {config.epochs}"
    for name, label in (("skipped", "skipped steps"), ("bad_files", "bad files")):
        if latest(name):
            yield label, f"{latest(name):,}"


def curve_names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is drawn: the known figures, then whatever else the method has logged."""
    others = dict.fromkeys(name for line in lines for name in line)
    return [*CURVES, *(name for name in others if name not in (*CURVES, *WHOLE, *WORDS, "knn_images"))]


def chart(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A curve as the template draws it, in a box of 340 x 150; None for fewer than two points."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    if len(found) < 2:
        return None
    size = -(-len(found) // POINTS)
    parts = [found[i : i + size] for i in range(0, len(found), size)]
    means = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    low, high = min(y for _, y in means), max(y for _, y in means)
    low = min(low, 0.0) if name in FROM_ZERO else low
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - 0.5 * abs(low) - 1e-9, high + 0.5 * abs(high) + 1e-9
    first, last = means[0][0], means[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(46 + 288 * (x - first) / max(last - first, 1), 1),
            round(126 - 114 * (y - low) / (high - low), 1),
        )

    points = [(*place(x, y), f"step {x:,}", f"{y:.4g}") for x, y in means]
    return {
        "title": CURVES[name][0] if name in CURVES else name.replace("_", " "),
        "help": CURVES[name][1] if name in CURVES else "",
        "path": "M" + "L".join(f"{x} {y}" for x, y, *_ in points),
        "points": json.dumps(points),
        "ticks": [(place(first, y)[1], short(y)) for y in (low, (low + high) / 2, high)],
        "first": f"{first:,}",
        "last": f"{last:,}",
    }


def short(y: float) -> str:
    """A number that fits beside a curve."""
    far = y and not 1e-3 <= abs(y) < 1e5
    return f"{y:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e") if far else f"{y:.3g}"


def reproduce(config: TrainConfig, folder: Path) -> str:
    """The command that repeats the run, and what its configuration file does instead."""
    words: list[object] = ["train", *config.inputs]
    for name in fields():
        value = getattr(config, name)
        if name in ("checkpoint_out_dir", "resume_checkpoint", "config", "wandb") or value in (None, ()):
            continue
        if value == fields()[name].default and type(value) is type(fields()[name].default):
            continue
        if name == "set":
            words += [word for item in value for word in (flag(name), item)]
        else:
            on_or_off = {True: [flag(name)], False: [f"--no-{flag(name)[2:]}"]}
            words += on_or_off[value] if isinstance(value, bool) else [flag(name), value]
    again = folder.with_name(folder.name + "-again")
    from_file = ("train", *config.inputs, "--config", folder / "config.json", "--checkpoint-out-dir", again)
    return f"{command(*words, '--checkpoint-out-dir', again)}\n\nor, the same: {command(*from_file)}"


def evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """What `evaluate` has written beside the encoders, as tables."""
    for path in sorted(folder.glob("*.evaluation.json"), key=lambda path: path.stat().st_mtime):
        yield from tables_of(path)


def tables_of(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [accuracies(path, found), classes(path, found)]
    except Exception as error:  # somebody else's file, in which anything can be
        return [{"title": path.name, "caption": f"cannot be read: {one_line(error)}", "header": [], "rows": []}]


def accuracies(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The table of one evaluation: an encoder or a floor a row, a probe a column."""
    shots = sorted({int(n) for row in found["results"].values() for n in row["few_shot"]})
    rows = []
    for name, row in found["results"].items():
        few = (row["few_shot"].get(str(n)) for n in shots)
        cells = [f"{row[probe]:.1f}" for probe in ("knn", "linear")]
        rows.append([name, *cells, *(f"{f['mean']:.1f} ± {f['sd']:.1f}" if f else "" for f in few)])
    images, where = found["images"], found["test_path"] or found["input_path"]
    return {
        "title": f"Evaluation of {path.name.removesuffix('.evaluation.json')}",
        "caption": f"{found['verdict']} Accuracy in per cent on {images['test']:,} images of {where}, by the labels of "
        f"{images['train']:,} others; standard error up to {found['standard_error']:.1f}; the most frequent class has "
        f"{found['chance']:.1f} %.",
        "header": ["", "kNN", "linear", *(f"{n}-shot" for n in shots)],
        "rows": rows,
    }


def classes(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of one evaluation, the worst first."""
    tested = (row for row in found["per_class"] if row["test"])
    worst = sorted(tested, key=lambda row: row["linear"])
    return {
        "title": f"Classes of {path.name.removesuffix('.evaluation.json')}",
        "caption": "Accuracy in per cent, the worst first"
        + (f"; {CLASSES} of {len(worst):,}." if len(worst) > CLASSES else "."),
        "header": ["class", "test images", "kNN", "linear"],
        "rows": [[r["class"], f"{r['test']:,}", f"{r['knn']:.1f}", f"{r['linear']:.1f}"] for r in worst[:CLASSES]],
    }
