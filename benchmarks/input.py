"""How fast images become views, and whether that keeps up with training.

    python benchmarks/input.py views photos/                    # one core: decode, random resized crop, flip
    python benchmarks/input.py views photos/ --size 96
    python benchmarks/input.py loader cifar10/train             # the loader of `train` beside the step it feeds
    python benchmarks/input.py extract photos/                  # `extract` beside the model's forward pass alone

`views`, in processor time of one thread, rounds taking turns: torchvision's classic PIL transforms as its ImageFolder
runs them, its v2 transforms of tensors, and the views of this package; all open the file, decode it, take a random crop of
20 to 100 % of the area, resize it by bicubic interpolation and flip it at times. The first two also make floats and
normalise them, as they are used; ours are bytes, normalised on the device. Below, what the views of each method take.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_speed import spread
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from data2vec_vision import methods
from data2vec_vision.cpu import keep_freed_memory
from data2vec_vision.sources import ImageFolder, open_source, opened_picture
from data2vec_vision.transforms import IMAGENET_MEAN, IMAGENET_STD, Views, augmentation

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
    patch = 16 if size >= 96 else 4
    for name in ("data2vec", "ijepa", "msn", "swav"):
        method = methods.find(name)("vit_tiny_patch16_224", img_size=size, patch_size=patch)
        found = in_turns({name: of(method.views())}, count, rounds)[name]
        print(f"| all views of {name} | {spread(found, 0)} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["views", "loader", "extract"])
    parser.add_argument("images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if args.what == "views":
        views(open_source(args.images), args.size, args.rounds, args.count)


if __name__ == "__main__":
    main()
