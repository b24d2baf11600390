"""One page about a run: is it learning, what did it see, what do its features tell apart. One file, no network."""

import base64
import csv
import io
import json
import math
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from data2vec_vision import checkpoint, methods
from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.config import TrainConfig, fields, flag, read_config
from data2vec_vision.device import find_device, versions
from data2vec_vision.errors import InputError
from data2vec_vision.extract import feature_function
from data2vec_vision.figures import (
    Encoders,
    draw_attention,
    draw_embedding_map,
    draw_neighbours,
    draw_patch_features,
    draw_views,
    embedding_places,
    examples,
    principal_places,
)
from data2vec_vision.plan import Job, prepare
from data2vec_vision.run import command, complete_lines
from data2vec_vision.sources import read_image

NAME = "report.html"
MOST_IMAGES, FEWEST_IMAGES = 1000, 100  # whose features are computed
SECONDS = 20  # that this may take, roughly
EPOCHS = 4  # columns of the maps beside the untrained encoder
POINTS = 300  # of a curve
BAD_SHOWN = 50

CURVES = {  # name in metrics.jsonl: title, what it tells
    "loss": ("Loss", "what training lowers; with a moving teacher it may rise while the features get better"),
    "knn": ("kNN accuracy", "per cent, on the labelled images of --eval-path; step 0 is before training"),
    "feature_std": ("Feature spread", "0: all images have the same features; 1: they point everywhere"),
    "rankme": ("RankMe", "how many directions the features use, at most their width"),
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


def report(run: str, device: str | None = None, maps: bool = True) -> Path:
    """Write report.html to the folder of a run, running, stopped or finished, and return its path.

    The pictures are made anew from the student files and the images; where these are gone the page says so. With `maps`
    there is a map by UMAP or t-SNE beside that by PCA, where one is installed; it takes a while.
    Raises InputError for a folder without a run.
    """
    folder = Path(run)
    config, lines = read_run(folder)
    page = Environment(loader=PackageLoader("data2vec_vision", "."), autoescape=True).get_template(NAME)
    pictures, notes = draw_pictures(folder, config, lines, device, maps)
    html = page.render(**contents(folder, config, lines), pictures=pictures, notes=notes)
    try:
        with atomic_write(folder / NAME) as file:
            file.write(html.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"cannot write {folder / NAME}: {error.strerror}") from error
    return folder / NAME


def read_run(folder: Path) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """The settings of a run and the lines of its metrics.jsonl. Raises InputError where there are none."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the folder of a run, such as runs/photos-data2vec")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no run: it has no config.json; give the folder that `train` wrote to")
    values = read_config(str(folder / "config.json"), {})
    lines = []
    for text in complete_lines(folder / "metrics.jsonl"):
        try:
            line = json.loads(text)
        except ValueError:  # a failing disk has spoilt it; the others count
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    if not lines:
        raise InputError(f"{folder / 'metrics.jsonl'} has no lines yet; `train` writes one every --log-every steps")
    return TrainConfig(**values), lines


def write_csv(run: str, path: str) -> Path:
    """The lines of a run's metrics.jsonl as a table, a column for each name. Raises InputError as `report`."""
    _, lines = read_run(Path(run))
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names)
    table.writeheader()
    table.writerows(lines)
    try:
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return Path(path)


def contents(folder: Path, config: TrainConfig, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says in words, numbers and curves."""
    trained = [line for line in lines if "loss" in line] or list(lines)
    last, verdicts = trained[-1], [line for line in lines if "verdict" in line]
    total = next((line["steps"] for line in reversed(verdicts) if "steps" in line), None)
    finished = total is not None and last["step"] >= total
    unsaid = {"level": "early", "headline": "No verdict yet", "text": "It comes with the first steps of training."}
    bad = [line.partition("\t")[::2] for line in complete_lines(folder / "bad_files.txt")]
    return {
        "name": folder.resolve().name,
        "method": Path(config.method).stem,
        "input_path": config.input_path,
        "state": f"finished after {last['step']:,} steps"
        if finished
        else f"at step {last['step']:,}" + (f" of {total:,}" if total else ""),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "verdict": verdicts[-1] if verdicts else unsaid,
        "history": [(line["step"], line["headline"], line["text"]) for line in verdicts],
        "tiles": list(tiles(lines, config)),
        "x_label": "steps",
        "charts": [curve for name in CURVES if (curve := chart(name, lines))],
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


def chart(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A curve as the template draws it, in a box of 340 x 150; None for fewer than two points."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    found = [(x, float(y)) for x, y in found if math.isfinite(y)]
    if len(found) < 2:
        return None
    size = -(-len(found) // POINTS)
    parts = [found[i : i + size] for i in range(0, len(found), size)]
    means = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    low, high = min(y for _, y in means), max(y for _, y in means)
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
        "title": CURVES[name][0],
        "help": CURVES[name][1],
        "path": "M" + "L".join(f"{x} {y}" for x, y, *_ in points),
        "points": json.dumps(points),
        "ticks": [(place(first, y)[1], short(y)) for y in (low, (low + high) / 2, high)],
        "first": f"{first:,}",
        "last": f"{last:,}",
    }


def short(y: float) -> str:
    """A number that fits beside a curve."""
    far = y and not 1e-3 <= abs(y) < 1e5
    return f"{y:.1e}".replace("e-0", "e-").replace("e+0", "e") if far else f"{y:.3g}"


def reproduce(config: TrainConfig, folder: Path) -> str:
    """The command that repeats the run, and what its configuration file does instead."""
    words: list[object] = ["train", config.input_path]
    for name in fields():
        value = getattr(config, name)
        if name in ("checkpoint_out_dir", "resume_checkpoint", "config", "wandb", "eval_path") or value in (None, ()):
            continue
        if value == fields()[name].default and type(value) is type(fields()[name].default):
            continue
        if name == "set":
            words += [word for item in value for word in (flag(name), item)]
        else:
            words += [flag(name)] if value is True else [flag(name), value]
    again = folder.with_name(folder.name + "-again")
    short = ("train", config.input_path, "--config", folder / "config.json", "--checkpoint-out-dir", again)
    return f"{command(*words, '--checkpoint-out-dir', again)}\n\nor, the same: {command(*short)}"


def draw_pictures(
    folder: Path, config: TrainConfig, lines: Sequence[Mapping[str, Any]], device: str | None, maps: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The pictures of the page, and a sentence for each that cannot be made."""
    # Without --init and --pretrained: their files may be gone, and only the views and the masks are needed.
    plain = replace(
        config, init=None, pretrained=False, resume_checkpoint=None, workers=0, checkpoint_out_dir=str(folder)
    )
    try:
        where = find_device(device or (config.device if device_is_here(config.device) else None))
        job = prepare(replace(plain, device=str(where)))
    except InputError as error:
        return [], [f"The pictures are left out: {error}."]
    pictures = [picture("What the model saw", VIEWS, draw_views(job))]
    files = encoder_files(folder)
    if not files:
        return pictures, ["Pictures of features come with the first saved encoder."]
    encoders = [(f"epoch {epoch}", checkpoint.load(path)) for epoch, path in files]
    trained = encoders[-1][1].to(where)
    if not (config.init or config.pretrained):
        encoders.insert(0, ("untrained", job.method.student.eval().cpu()))
    images = examples(job.source)
    for _, encoder in encoders:
        encoder.to(where)
    pictures += reconstruction(folder, job, images)
    pictures += patch_maps(encoders, images)
    rate = next((line["images_per_second"] for line in reversed(lines) if line.get("images_per_second")), 0.0)
    count = int(min(MOST_IMAGES, max(FEWEST_IMAGES, SECONDS * rate)))
    return [*pictures, *neighbourhoods(job, trained, where, count, maps)], []


VIEWS = "A row an image: the image, its views, and what of the first view the student gets. Every epoch draws others."
MAPS = (
    "A row an image, a column a saved encoder. The first three principal components of the patch features, as red, "
    "green and blue: what has one colour is alike to the encoder. Things and their parts should come to stand out."
)
ATTENTION = "How much the last block attends to each patch, the mean over heads; bright is much."
NEIGHBOURS = "Left: an image of the training set. Right: those nearest to it by cosine of their features."
PLACES = "{count:,} images, placed by their features in two dimensions; of those that would overlap the first is shown."


def device_is_here(name: str | None) -> bool:
    try:
        find_device(name)
    except InputError:
        return False
    return True


def encoder_files(folder: Path) -> list[tuple[str, Path]]:
    """Some of the saved students with their epochs, the last one included; else the rolling checkpoint."""
    numbered = ((re.fullmatch(r"student_(\d+)", path.stem), path) for path in folder.glob("student_*.pt"))
    found = {int(match[1]): path for match, path in numbered if match}
    if not found:
        rolling = folder / "checkpoint_last.pt"
        return [("now", rolling)] if rolling.exists() else []
    epochs = sorted(found)
    chosen = torch.linspace(0, len(epochs) - 1, min(EPOCHS, len(epochs))).round().long().tolist()
    return [(str(epochs[i]), found[epochs[i]]) for i in chosen]


def patch_maps(encoders: Encoders, images: Sequence[Image.Image]) -> Iterator[dict[str, Any]]:
    if images:
        yield picture("What the patch features tell apart", MAPS, draw_patch_features(encoders, images))
        if attention := draw_attention(encoders, images):
            yield picture("Where it looks", ATTENTION, attention)


def reconstruction(folder: Path, job: Job, images: Sequence[Image.Image]) -> Iterator[dict[str, Any]]:
    """For a method that draws its predictions (MAE)."""
    if not hasattr(job.method, "picture") or not (folder / "checkpoint_last.pt").exists():
        return
    method: Any = methods.load_method(str(folder / "checkpoint_last.pt"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = method.eval().picture(images)
    yield picture(
        "What it reconstructs", "Image, what the encoder sees of it, and what the decoder makes of that.", drawn
    )


def neighbourhoods(job: Job, encoder: Any, where: torch.device, count: int, maps: bool) -> Iterator[dict[str, Any]]:
    """Nearest neighbours and maps of `count` images."""
    N = len(job.source)
    indices = torch.linspace(0, N - 1, min(count, N)).long().unique().tolist()
    compute = feature_function(encoder, where, None, None)
    features, thumbnails, names = [], [], []
    for start in range(0, len(indices), 50):
        pixels = []
        for index in indices[start : start + 50]:
            image = read_image(job.source, index)
            if isinstance(image, Image.Image):
                pixels.append(encoder.transform.resized(image))
                names.append(job.source.name(index))
        if pixels:
            features.append(compute(torch.stack(pixels)))
            thumbnails += [small(p) for p in pixels]
    bank = torch.cat(features) if features else torch.empty(0)
    if len(bank) < 3 or not bank.isfinite().all():
        return
    yield picture("What it finds alike", NEIGHBOURS, draw_neighbours(bank, thumbnails.__getitem__, names))
    for name, places in (embedding_places(bank) if maps else {"PCA": principal_places(bank)}).items():
        drawn = draw_embedding_map(places, thumbnails.__getitem__)
        yield picture(f"A map of the images ({name})", PLACES.format(count=len(bank)), drawn)


def small(pixels: Tensor) -> Image.Image:
    image = to_pil_image(pixels)
    image.thumbnail((96, 96))
    return image


def picture(title: str, caption: str, image: Image.Image) -> dict[str, Any]:
    """An image inside the page itself."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"title": title, "caption": caption, "source": source, "width": image.width}


def evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """What `evaluate` has written beside the encoders, as tables."""
    return iter(())
