"""The whole path on images that come with the package: train, extract, and see what was learned."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError
from data2vec_vision.extract import extract, feature_function, image_loader
from data2vec_vision.pictures import RIGHT, WRONG, Tile, grid
from data2vec_vision.plan import prepare
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.run import PROGRAM, duration, say
from data2vec_vision.samples import write_samples
from data2vec_vision.sources import open_source
from data2vec_vision.train import train
from data2vec_vision.vit import MaskedVisionTransformer

HELD_OUT = 160  # of the 200 images of a class, those from this number on are held out
NEIGHBOURS = 5
MARK = ".made-by-the-demo"  # a file of this name says that the folder may be used again

# The best of 88 short runs, judged on other Fashion-MNIST images; see benchmarks/RESULTS.md. The photos are centred
# and of one size, so crops and mirror images only cost; of four patches, pixels at first cost 2 points.
SETTINGS: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_dim": 256,
    "n_encoders": 2,
    "batch_size": 32,
    "epochs": 60,
    "max_lr": 5e-4,
    "tau_initial": 0.999,
    "tau_end": 0.9998,
    "set": ("crop_min=1", "flip=0", "color_jitter=0", "pixel_pct=0"),
}


def demo(directory: str, seed: int = 0, epochs: int | None = None) -> dict[str, float]:
    """Train on 1,600 small images, and print what a kNN makes of 400 others; returns these accuracies in per cent.

    Writes to `directory`, which must be new, empty, or of an earlier demo: the images, the run, features as
    .npz and neighbours.png. Raises InputError for another folder.
    """
    begin, home = time.perf_counter(), Path(directory)
    make_home(home)
    folders = {part: home / "images" / part for part in ("train", "test")}
    write_samples(str(folders["train"]), lambda name: number(name) < HELD_OUT)
    write_samples(str(folders["test"]), lambda name: number(name) >= HELD_OUT)
    config = TrainConfig(
        **(SETTINGS | ({} if epochs is None else {"epochs": epochs})),
        input_path=str(folders["train"]),
        checkpoint_out_dir=str(home / "run"),
        seed=seed,
    )
    untrained = prepare(config).method.student.eval()
    train(config)
    student = home / "run" / f"student_{config.epochs - 1}.pt"
    for part in folders:
        extract(str(student), str(folders[part]), str(home / f"{part}.npz"))
    trained = {part: torch.from_numpy(np.load(home / f"{part}.npz")["features"]) for part in folders}
    before = {part: features(untrained, folders[part]) for part in folders}
    pixels = {part: raw_pixels(folders[part]) for part in folders}
    labels = {part: class_numbers(folders[part]) for part in folders}
    results, nearest = {}, {}
    for name, f in (("raw pixels", pixels), ("untrained encoder", before), ("trained encoder", trained)):
        predicted, nearest[name] = knn_classify(f["train"], labels["train"], f["test"])
        results[name] = accuracy(predicted, labels["test"])
    picture = home / "neighbours.png"
    with atomic_write(picture) as file:
        draw_neighbours(folders, labels, nearest, results).save(file, "PNG")
    tell(results, home, picture, student, time.perf_counter() - begin)
    return results


def make_home(home: Path) -> None:
    """Make the demo's folder, or clear the run from that of an earlier demo. Raises InputError for another folder."""
    try:
        used = home.exists() and (not home.is_dir() or (any(home.iterdir()) and not (home / MARK).exists()))
        if used:
            elsewhere = f"give the demo a folder of its own: {PROGRAM} demo another-folder"
            raise InputError(f"{home} holds other files; {elsewhere}")
        home.mkdir(parents=True, exist_ok=True)
        (home / MARK).touch()
        shutil.rmtree(home / "run", ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write to {home}: {error.strerror}; give another folder") from error


def number(name: str) -> int:
    """The number in a sample's name, "<class>/<number>.png"."""
    return int(Path(name).stem)


def features(encoder: MaskedVisionTransformer, folder: Path) -> Tensor:
    """The features of all images below `folder`, [N, D], as `extract` computes them."""
    compute = feature_function(encoder, torch.device("cpu"), pool=None, layer=None)
    return torch.cat([compute(pixels) for pixels, _ in image_loader(open_source(folder), encoder.transform, 64, 0)])


def raw_pixels(folder: Path) -> Tensor:
    """The grey values of all images below `folder` as they are, [N, 784]."""
    source = open_source(folder)
    grey = [np.asarray(Image.open(source.open(i)).convert("L"), np.float32).ravel() for i in range(len(source))]
    return torch.from_numpy(np.stack(grey))


def class_numbers(folder: Path) -> Tensor:
    """The class of each image below `folder` by its folder's name, int64 [N]."""
    source = open_source(folder)
    names = [source.name(i).split("/")[0] for i in range(len(source))]
    order = {name: n for n, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names])


def draw_neighbours(
    folders: dict[str, Path], labels: dict[str, Tensor], nearest: dict[str, Tensor], results: dict[str, float]
) -> Image.Image:
    """A row a class: a held-out image, and the training images nearest to it before and after training."""
    sources = {part: open_source(folder) for part, folder in folders.items()}

    def tile(part: str, index: int, caption: str, frame: tuple[int, int, int] | None = None) -> Tile:
        return Image.open(sources[part].open(index)), caption, frame

    rows: list[list[Tile]] = []
    for label in labels["test"].unique().tolist():
        query = int((labels["test"] == label).nonzero()[0])
        row = [tile("test", query, sources["test"].name(query).split("/")[0])]
        for name in ("untrained encoder", "trained encoder"):
            for rank, index in enumerate(nearest[name][query, :NEIGHBOURS].tolist()):
                right = int(labels["train"][index]) == label
                caption = f"{name.split()[0]} {rank + 1}"
                row.append(tile("train", index, caption, RIGHT if right else WRONG))
        rows.append(row)
    title = "Held-out images and their nearest training images; green: same class. kNN accuracy: " + ", ".join(
        f"{name} {value:.1f} %" for name, value in results.items()
    )
    return grid(rows, side=84, title=title, groups=(1, 1 + NEIGHBOURS))


def tell(results: dict[str, float], home: Path, picture: Path, student: Path, seconds: float) -> None:
    """Say the accuracies, what was written and what to type next."""
    say("\nkNN accuracy on 400 held-out images (k = 20, labels of the 1,600 training images, never used in training):")
    for name, value in results.items():
        say(f"  {name:<18} {value:5.1f} %")
    gain = results["trained encoder"] - results["untrained encoder"]
    lead = results["trained encoder"] - results["raw pixels"]
    say(
        f"Training {'added' if gain > 0 else 'cost'} {abs(gain):.1f} points; "
        f"raw pixels are {'beaten' if lead > 0 else 'still ahead'} by {abs(lead):.1f}."
    )
    say(f"\nWrote in {duration(seconds)}:")
    say(f"  {picture}: held-out images and what the encoder finds most alike, before and after; look at it")
    say(f"  {student}: the trained encoder")
    say(f"  {home / 'train.npz'}, {home / 'test.npz'}: features and paths")
    say(f"\nNext, on your own images:\n  {PROGRAM} train path/to/your/images\n  {PROGRAM} train --help")
