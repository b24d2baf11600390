"""How fast images become views, and whether that keeps up with training.

    python benchmarks/input.py views photos/                    # one core: decode, random resized crop, flip
    python benchmarks/input.py views photos/ --size 96
    python benchmarks/input.py loader cifar10/train             # the loader of `train` beside the step it feeds
    python benchmarks/input.py extract photos/                  # `extract` beside the model's forward pass alone

`views`, in processor time of one thread, rounds taking turns: torchvision's classic PIL transforms as its ImageFolder
runs them, its v2 transforms of tensors, and the views of this package; all open the file, decode it, take a random crop of
20 to 100 % of the area, resize it by bicubic interpolation and flip it at times. The first two also make floats and
normalise them, as they are used; ours are bytes, normalised on the device. Below, what the views of each method take.
`loader` compares processor time of one thread too; `extract` compares the clock, with as many threads as torch takes.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from step_speed import spread
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from data2vec_vision import methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.cpu import keep_freed_memory
from data2vec_vision.data import Stream, collate
from data2vec_vision.device import find_device, free_memory, multiplies_bf16
from data2vec_vision.extract import feature_function, image_loader
from data2vec_vision.figures import example_dataset
from data2vec_vision.plan import prepare
from data2vec_vision.ramcache import RamCache, fill
from data2vec_vision.sources import ImageFolder, open_source, opened_picture
from data2vec_vision.split import Selected
from data2vec_vision.train import optimizer_and_scaler, training_steps
from data2vec_vision.transforms import IMAGENET_MEAN, IMAGENET_STD, Views, augmentation
from data2vec_vision.vit import build_vit

STEPS, BATCH = 8, 50
CROP = (0.2, 1.0)


def in_turns(jobs: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of processor time of each job, which takes an image's number, in each round."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for round in range(rounds + 1):
        for name, job in jobs.items():
            torch.manual_seed(round)
            start = time.process_time()
            for index in range(count):
                job(index)
            if round:  # the first warms up
                rates[name].append(count / (time.process_time() - start))
    return rates


def views(source: ImageFolder, size: int, rounds: int, count: int) -> None:
    count = min(count, len(source))
    paths = [str(Path(source.root) / source.name(i)) for i in range(count)]
    bicubic = v2.InterpolationMode.BICUBIC
    normal = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    classic = transforms.Compose([
        transforms.RandomResizedCrop(size, CROP, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(**normal),
    ])  # fmt: skip
    tensors = v2.Compose([
        v2.RandomResizedCrop(size, CROP, interpolation=bicubic), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(**normal),
    ])  # fmt: skip
    ours = Views(augmentation((size, size), CROP))

    def of(views: Views) -> Callable[[int], object]:
        def make(index: int) -> object:
            with opened_picture(source, index) as picture:
                return views(picture)

        return make

    rates = in_turns({
        "classic PIL transforms": lambda i: classic(default_loader(paths[i])),
        "v2 transforms of tensors": lambda i: tensors(decode_image(read_file(paths[i]), ImageReadMode.RGB)),
        "ours": of(ours),
    }, count, rounds)  # fmt: skip
    first = rates["classic PIL transforms"]
    print(
        f"{count} images, views of {size} px, {rounds} rounds\n\n| | images/s of a core | times classic |\n|---|---|---|"
    )
    for name, values in rates.items():
        print(f"| {name} | {spread(values, 0)} | {spread([a / b for a, b in zip(values, first)], 2)} |")
    vit = build_vit(img_size=size, patch_size=16 if size >= 96 else 4, embed_dim=192, depth=1, num_heads=3)
    for name in ("data2vec", "ijepa", "msn", "swav"):
        found = in_turns({name: of(methods.find(name)(vit).views())}, count, rounds)[name]
        print(f"| all views of {name} | {spread(found, 0)} | |")


def loader(folder: str, rounds: int) -> None:
    """Images a second of processor time, one thread: the training step alone, and what makes its batches."""
    rates: dict[str, list[float]] = {"the step of data2vec": [], "the loader": [], "the loader, --cache ram": []}
    config = TrainConfig(input_path=folder, image_size=32, patch_size=4, hidden_dim=192, n_encoders=6, workers=0)
    job = prepare(config)
    job.method.skip_beginning()
    dataset = example_dataset(job)
    G, stream = job.config.images_a_step, Stream(len(job.source), 0)
    before = time.perf_counter()
    cache = fill(job.source, 1, free_memory() / 2)
    assert isinstance(cache, RamCache), "the images do not fit into memory"
    print(
        f"--cache ram: {cache.nbytes / 1e6:.0f} MB, filled in {time.perf_counter() - before:.1f} s with a worker beside"
    )
    steps = training_steps(job, *optimizer_and_scaler(job))
    next(steps)
    for round in range(rounds):
        waited, start = 0.0, time.process_time()
        for _ in range(STEPS):
            waited += next(steps).waited
        rates["the step of data2vec"].append(STEPS * G / (time.process_time() - start - waited))
        for name, opened in (
            ("the loader", partial(opened_picture, job.source)),
            ("the loader, --cache ram", cache.opened),
        ):
            dataset.opened = opened
            start = time.process_time()
            for first in range(round * STEPS * G, (round + 1) * STEPS * G, G):
                collate([dataset[position, stream.image(position)] for position in range(first, first + G)])
            rates[name].append(STEPS * G / (time.process_time() - start))
    print(
        f"{len(job.source):,} images, ViT 192 x 6 on 32 px, {job.config.precision}, {rounds} rounds\n\n| | images/s of a core | times the step |"
    )
    print("|---|---|---|")
    for name, values in rates.items():
        print(
            f"| {name} | {spread(values, 0)} | {spread([a / b for a, b in zip(values, rates['the step of data2vec'])], 1)} |"
        )


def extraction(folder: str, model: str, rounds: int, count: int, workers: int) -> None:
    """Images a second of the clock: the forward pass over batches in memory, and `extract` of as many files, in turns."""
    source, (forward, whole) = open_source(folder), ([], [])
    method = methods.find("mae")(model)
    encoder = method.student.eval()
    device = find_device(None)
    precision = "bf16" if multiplies_bf16(device) else "fp32"
    compute = feature_function(encoder.to(device), device, None, None, precision)
    images = range(min(count, len(source)))
    batch = next(iter(image_loader(source, encoder.transform, BATCH, 0)))[0]
    compute(batch)
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(-(-len(images) // BATCH)):
            compute(batch)
        forward.append(-(-len(images) // BATCH) * BATCH / (time.perf_counter() - start))
        start, seen = time.perf_counter(), 0
        for pixels, _ in image_loader(Selected(source, images), encoder.transform, BATCH, workers):
            seen += len(compute(pixels))
        whole.append(seen / (time.perf_counter() - start))
    print(
        f"{len(images)} photos, {model}, {precision}, {workers} workers, {rounds} rounds\n\n| | images/s | of the forward pass |\n|---|---|---|"
    )
    print(f"| forward pass alone | {spread(forward, 1)} | 1.00 |")
    print(
        f"| with reading, decoding, resizing | {spread(whole, 1)} | {spread([a / b for a, b in zip(whole, forward)], 2)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["views", "loader", "extract"])
    parser.add_argument("images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default="vit_small_patch16_224")
    args = parser.parse_args()
    keep_freed_memory()
    if args.what == "extract":
        extraction(args.images, args.model, args.rounds, args.count, args.workers)
        return
    torch.set_num_threads(1)
    if args.what == "views":
        views(open_source(args.images), args.size, args.rounds, args.count)
    else:
        loader(args.images, args.rounds)


if __name__ == "__main__":
    main()
