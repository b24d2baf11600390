"""What the demo's encoder makes of the 10,000 original test images of Fashion-MNIST, none of which are in the demo.

    python benchmarks/demo_figures.py FOLDER [--seed 0 1 2]

FOLDER holds the original t10k-*-idx?-ubyte.gz (Debian: package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist).
Trains with the demo's settings on the 1,600 images and one computing thread, and prints a JSON line a seed: kNN accuracy (k = 20)
of the untrained and the trained encoder on the demo's 400 held-out images and on those 10,000. Raw pixels likewise.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from data2vec_vision import demo
from data2vec_vision.checkpoint import load
from data2vec_vision.config import TrainConfig
from data2vec_vision.extract import feature_function
from data2vec_vision.plan import prepare
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.samples import write_samples
from data2vec_vision.samples.make import CLASSES, read_idx
from data2vec_vision.train import train
from data2vec_vision.vit import MaskedVisionTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.tensor(read_idx(args.folder / "t10k-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28))
    by_name = {name: number for number, name in enumerate(sorted(CLASSES))}
    original = torch.tensor(read_idx(args.folder / "t10k-labels-idx1-ubyte.gz", header=8)).tolist()
    labels = {"10,000": torch.tensor([by_name[CLASSES[label]] for label in original])}
    with tempfile.TemporaryDirectory() as home:
        train_folder, test_folder = Path(home, "train"), Path(home, "test")
        write_samples(str(train_folder), lambda name: demo.number(name) < demo.HELD_OUT)
        write_samples(str(test_folder), lambda name: demo.number(name) >= demo.HELD_OUT)
        labels |= {"train": demo.class_numbers(train_folder), "400": demo.class_numbers(test_folder)}

        def measure(features: dict[str, Tensor]) -> dict[str, float]:
            found = {
                name: knn_classify(features["train"], labels["train"], features[name])[0] for name in ("400", "10,000")
            }
            return {name: round(accuracy(predicted, labels[name]), 1) for name, predicted in found.items()}

        def of(encoder: MaskedVisionTransformer) -> dict[str, float]:
            compute = feature_function(encoder, torch.device("cpu"), pool=None, layer=None)
            other = torch.cat([compute(batch.expand(-1, 3, -1, -1)) for batch in images.split(500)])
            return measure(
                {
                    "train": demo.features(encoder, train_folder),
                    "400": demo.features(encoder, test_folder),
                    "10,000": other,
                }
            )

        pixels = {
            "train": demo.raw_pixels(train_folder),
            "400": demo.raw_pixels(test_folder),
            "10,000": images.flatten(1).float(),
        }
        print(json.dumps({"raw pixels": measure(pixels)}), flush=True)
        for seed in args.seed:
            config = TrainConfig(**demo.SETTINGS, input_path=str(train_folder), checkpoint_out_dir=str(Path(home, f"run{seed}")),
                                 seed=seed, workers=0)  # fmt: skip
            untrained = of(prepare(config).method.student.eval())
            train(config)
            trained = of(load(Path(config.checkpoint_out_dir, f"student_{config.epochs - 1}.pt")))
            print(json.dumps({"seed": seed, "untrained": untrained, "trained": trained}), flush=True)


if __name__ == "__main__":
    main()
