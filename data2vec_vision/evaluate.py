"""How good an encoder's features are, told by labels that training never saw."""

import json as json_format
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data2vec_vision.checkpoint import atomic_write, check_place, load_encoder, refuse_overwriting
from data2vec_vision.device import device_name, find_device, versions
from data2vec_vision.distributed import from_main, is_main
from data2vec_vision.errors import InputError, RunFailed, Stopped, one_line
from data2vec_vision.extract import ImageBatches, feature_function, fingerprint, image_loader, reading_processes
from data2vec_vision.failures import said_with
from data2vec_vision.features import (
    check_room,
    one_pass,
    pixel_shape,
    raw_pixels,
    refuse_broken,
    refuse_not_finite,
    untrained_twin,
)
from data2vec_vision.findings import PIXELS, SHOTS, TRAINED, UNTRAINED, findings, later_notes, printable, text
from data2vec_vision.labels import labels_of
from data2vec_vision.linear import linear_probe
from data2vec_vision.pictures import confusion_picture
from data2vec_vision.probes import accuracy, few_shot, knn_classify
from data2vec_vision.run import caught_signals, say
from data2vec_vision.seeding import generator
from data2vec_vision.shares import joined, refuse_unlike, shared
from data2vec_vision.sources import open_source
from data2vec_vision.split import Selected, labelled_images, refuse_few, stratified_split
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer

STOPPED = "Stopped; nothing was written"
PROTOCOL = {
    "kNN": "k = {k}, cosine similarity s, votes weighted by exp(s / 0.07)",
    "linear": "logistic regression on features standardised by the training part; its L2 penalty is the power of ten "
    "that does best on a held-out fifth of the training part, all of which then trains it",
    "n-shot": "nearest class mean by cosine after centring (SimpleShot, CL2N) with n labelled images a class, "
    "mean ± standard deviation of 20 draws",
}
BATCH = 64  # images in a forward pass of KnnProbe
KEPT_BYTES = 10**9  # of decoded images that KnnProbe keeps in memory


def evaluate(
    checkpoint: str,
    input_path: str,
    labels: str | None = None,
    test_path: str | None = None,
    test_pct: float = 0.2,
    seed: int = 0,
    k: int = 20,
    pool: str | None = None,
    encoder: str = "student",
    batch_size: int = 64,
    workers: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    floors: bool = True,
    json: str | None = None,
    picture: str | None = None,
) -> dict[str, Any]:
    """Judge the encoder in `checkpoint` by labelled images, print the findings and write them to files.

    The labels of the images below `input_path` are their class folders, or the csv `labels`; the test images are
    those below `test_path`, or a stratified share `test_pct` of the others. Returns what the file `json` holds;
    `picture` is the confusion matrix; both are written beside the checkpoint by default. Without `floors` the
    untrained encoder and raw pixels are left out. Other processes than the main one return nothing. Raises InputError,
    RunFailed, and Stopped after a signal.
    """
    where = find_device(device)

    def checked() -> tuple[Path, Path]:
        files = output_files(checkpoint, encoder, json, picture)
        for option, target in zip(("--json", "--picture"), files):
            refuse_overwriting(option, target, checkpoint, labels, input_path, test_path)
        return files

    with joined():
        files = from_main(checked)  # other machines write nothing
        return evaluate_all(
            checkpoint,
            input_path,
            labels,
            test_path,
            test_pct,
            seed,
            k,
            pool,
            encoder,
            batch_size,
            workers,
            where,
            precision,
            floors,
            files,
        )


def evaluate_all(
    checkpoint: str,
    input_path: str,
    labels: str | None,
    test_path: str | None,
    test_pct: float,
    seed: int,
    k: int,
    pool: str | None,
    encoder: str,
    batch_size: int,
    workers: int | None,
    where: torch.device,
    precision: str,
    floors: bool,
    files: tuple[Path, Path],
) -> dict[str, Any]:
    """`evaluate`, this process's share of it; the main process does everything that is done with the features."""
    model, content = load_encoder(checkpoint, "cpu", encoder)
    model.check_pool(pool or model.pool)
    refuse_broken(model, checkpoint)
    images = labelled_images(input_path, labels, test_path, test_pct, seed)
    refuse_few(images.train, k, input_path)
    of_images = [part.images.fingerprint() for part in images.parts]
    refuse_unlike([fingerprint(model, content["encoder"]), *of_images], "images and weights")
    protocol = {"split": images.split, **PROTOCOL, "kNN": PROTOCOL["kNN"].format(k=k)}
    encoders = {TRAINED: model}
    if floors:
        twin, protocol[UNTRAINED] = untrained_twin(model, content, seed)
        channels, height, width = pixel_shape(model.transform.image_size, model.transform.channels)
        protocol[PIXELS] = f"the images at {height} x {width} pixels, {channels * height * width:,} numbers"
        encoders = {UNTRAINED: twin, TRAINED: model}
    compute: dict[str, Callable[[Tensor], Tensor]] = {PIXELS: raw_pixels} if floors else {}
    compute |= {name: feature_function(e.to(where), where, pool, None, precision) for name, e in encoders.items()}
    from_main(lambda: check_room(sum(len(part.images) for part in images.parts), model, floors))
    with said_with(batch_size, reading_processes(workers), where), caught_signals() as signals:
        tick = partial(stop_if, signals)
        loaders = [
            image_loader(part.images, model.transform, batch_size, workers, where.type == "cuda", share=True)
            for part in images.parts
        ]
        (features, bad), (test_features, bad_test) = (
            one_pass(loader, compute, shared(signals, tick)) for loader in loaders
        )
        if not is_main():
            return {}
        train, test = images.train.without(bad), images.test.without(bad_test)
        refuse_not_finite(features[TRAINED], test_features[TRAINED], checkpoint)
        refuse_few(train, k, input_path)
        numbers = torch.from_numpy(train.numbers), torch.from_numpy(test.numbers)
        results, predicted = probe_all(features, test_features, *numbers, k, seed, where, tick)
    unreadable = images.train.reasons(bad) | images.test.reasons(bad_test)
    report = {
        "checkpoint": checkpoint,
        **{name: content.get(name) for name in ("method", "epoch", "step")},
        **dict(encoder=encoder, pool=pool or model.pool, precision=precision, device=device_name(where)),
        **dict(input_path=input_path, test_path=test_path, labels=labels, seed=seed, k=k),
        "images": {"train": len(train.images), "test": len(test.images), "unreadable": unreadable},
        "protocol": protocol,
        "notes": images.notes + later_notes(unreadable, train.numbers, results[TRAINED]),
        **findings(results, predicted, train.numbers, test.numbers, images.classes),
        "versions": versions(),
    }
    write(report, *files)
    say(text(report))
    say(f"\nWrote {files[0]} and {files[1]}.")
    return report


def stop_if(signals: list[int]) -> None:
    """Raises Stopped once there are signals."""
    if signals:
        raise Stopped(signals[0], STOPPED)


def write(report: Mapping[str, Any], json_file: Path, picture_file: Path) -> None:
    """Write the report as JSON and the confusion matrix as PNG. Raises RunFailed when the disk does not take them."""
    title = (
        f"{printable(Path(report['checkpoint']).name)}: linear probe on {report['images']['test']:,} test images, "
        f"{report['results'][TRAINED]['linear']:.1f} % right"
    )
    try:
        with atomic_write(picture_file) as file:
            confusion_picture(np.array(report["confusion"]), [printable(c) for c in report["classes"]], title).save(
                file, "PNG"
            )
        with atomic_write(json_file) as file:
            file.write((json_format.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise RunFailed(
            f"cannot write {json_file} and {picture_file}: {one_line(error)}; make room"
            " or write elsewhere with --json and --picture"
        ) from error


def output_files(checkpoint: str, encoder: str, json: str | None, picture: str | None) -> tuple[Path, Path]:
    """Where to write, by default beside the checkpoint. Raises InputError where that is not possible."""
    stem = Path(checkpoint).with_suffix("" if encoder == "student" else f".{encoder}")
    files = []
    for option, given, ending in (("--json", json, ".evaluation.json"), ("--picture", picture, ".confusion.png")):
        target = Path(given or f"{stem}{ending}")
        check_place(option, target, remedy="" if given else "; say where to write with --json and --picture")
        files.append(target)
    if files[0].resolve() == files[1].resolve():
        raise InputError(f"--json and --picture are both {files[0]}; give two files")
    if files[0].suffix.lower() != ".json":
        raise InputError(f"--json {files[0]} must end in .json")
    if files[1].suffix.lower() != ".png":
        raise InputError(f"--picture {files[1]} must end in .png")
    return files[0], files[1]


def probe_all(
    train: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    labels: Tensor,
    test_labels: Tensor,
    k: int,
    seed: int,
    device: torch.device,
    tick: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """All probes of all features, by name [N, D] and [Q, D]: figures, and predictions [Q] of kNN and linear probe."""
    results: dict[str, Any] = {}
    predicted: dict[str, dict[str, np.ndarray]] = {}
    shots = [n for n in SHOTS if n <= int(labels.bincount()[labels.unique()].min())]
    stages = tqdm(total=len(train) * (2 + len(shots)), unit="probe", disable=not sys.stderr.isatty(), leave=False)
    with stages:
        for name, features in train.items():
            queries = test[name]
            near, _ = knn_classify(features, labels, queries, k, device=device, tick=tick)
            stages.update()
            classifier, tried = linear_probe(features, labels, seed, device, tick)
            straight = classifier.predict(queries, device, tick)
            stages.update()
            few = {}
            for n in shots:
                draws = torch.tensor(
                    few_shot(features, labels, queries, test_labels, n, seed, device=device, tick=tick)
                )
                few[str(n)] = {"mean": draws.mean().item(), "sd": draws.std().item()}
                stages.update()
            results[name] = {
                "knn": accuracy(near, test_labels),
                "linear": accuracy(straight, test_labels),
                "few_shot": few,
                "penalty": classifier.strength,
                "held_out_accuracy": {f"{strength:g}": value for strength, value in tried.items()},
            }
            predicted[name] = {"knn": near.numpy(), "linear": straight.numpy()}
    return results, predicted


class KnnProbe:
    """kNN accuracy of an encoder that is being trained, on the same labelled images every time.

    Of at most `max_images` images below `path`, drawn under `seed`, a stratified fifth is classified by the others.
    They are decoded once and kept where that takes less than KEPT_BYTES. Raises InputError for a folder
    without labels, with one class only, or without two readable images of a class.
    """

    def __init__(
        self,
        path: str,
        transform: ImageTransform,
        labels_file: str | None = None,
        k: int = 20,
        max_images: int = 10_000,
        seed: int = 0,
        workers: int | None = None,
    ):
        source = open_source(path)
        found = labels_of(source, labels_file)
        labelled = np.flatnonzero(found.numbers >= 0)
        order = torch.randperm(len(labelled), generator=generator(seed, "images")).numpy()
        chosen = Selected(source, np.sort(labelled[order[:max_images]]))
        self.transform = transform
        loader = image_loader(chosen, transform, BATCH, workers)
        of_pixel = 3 if transform.channels == 3 else 4 * transform.channels  # bytes
        keep = of_pixel * len(chosen) * math.prod(transform.image_size) <= KEPT_BYTES
        batches, bad = [], set()
        for pixels, unreadable in loader:
            bad |= set(unreadable)
            if keep and pixels is not None:
                batches.append(pixels)
        self._batches: list[Tensor] | ImageBatches = batches if keep else loader
        numbers = np.delete(found.numbers[np.asarray(chosen.indices)], sorted(bad))
        self.labels, present = torch.from_numpy(numbers), len(np.unique(numbers))
        if present < 2:
            raise InputError(
                f"{path} has readable images of {present} class{'es' * (present == 0)}; it takes two or more"
            )
        self.train, self.test = map(torch.from_numpy, stratified_split(numbers, 0.2, seed))
        if len(self.test) == 0:
            raise InputError(f"{path} has no class with two images; one is needed to classify the other")
        self.k = min(k, len(self.train))
        if bad:
            say(f"{len(bad):,} of the labelled images in {path} could not be read and are left out.")
        if self.k < k:
            say(f"kNN on {path}: k = {self.k}, for there are no more training images.")

    def probe(
        self,
        encoder: MaskedVisionTransformer,
        device: torch.device,
        precision: str = "fp32",
        pool: str | None = None,
    ) -> float:
        """The accuracy of `encoder` on `device` in per cent, nan when its features are not finite or images have gone.

        It is evaluated in eval mode and left in the mode it was in; no random state is touched.
        """
        modes = [(module, module.training) for module in encoder.modules()]
        fused = [(module, module.fused_attn) for module in encoder.modules() if hasattr(module, "fused_attn")]
        compute = feature_function(encoder.eval(), device, pool, None, precision)
        try:
            batches = self._batches if isinstance(self._batches, list) else (pixels for pixels, _ in self._batches)
            features = torch.cat([compute(pixels) for pixels in batches if pixels is not None])
        finally:
            for module, mode in modes:
                module.training = mode
            for attention, was in fused:
                attention.fused_attn = was
        if len(features) != len(self.labels):
            say("Some images of the kNN's can no longer be read: there is no accuracy this time.")
            return math.nan
        if not features.isfinite().all():
            return math.nan
        predicted, _ = knn_classify(
            features[self.train], self.labels[self.train], features[self.test], self.k, device=device
        )
        return accuracy(predicted, self.labels[self.test])
