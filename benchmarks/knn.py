"""kNN accuracy of a trained encoder, of the same encoder untrained, and of raw pixels.

    python benchmarks/knn.py CHECKPOINT TRAIN_FOLDER TEST_FOLDER

The folders hold a folder for each class. The nearest neighbours are looked for among all images of the first,
k = 20, cosine similarity, temperature 0.07. The untrained encoder has the run's seed, so it is the one that the run
started from. Prints one JSON line.
"""

import argparse
import json

import numpy as np
import torch
from tqdm import tqdm

from data2vec_vision import methods
from data2vec_vision.checkpoint import load_encoder
from data2vec_vision.config import TrainConfig, from_json
from data2vec_vision.device import find_device
from data2vec_vision.extract import feature_function, image_loader
from data2vec_vision.plan import build_encoder
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.seeding import seeded
from data2vec_vision.sources import ImageFolder, open_source
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer


def labels(source: ImageFolder) -> torch.Tensor:
    """The class of each image by the name of its folder."""
    names = [source.name(i).split("/")[0] for i in range(len(source))]
    order = {name: n for n, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names])


def features(source: ImageFolder, encoder: MaskedVisionTransformer, device: torch.device) -> torch.Tensor:
    compute = feature_function(encoder.to(device), device, pool=None, layer=None)
    loader = image_loader(source, encoder.transform, 250, None)
    return torch.cat([compute(pixels) for pixels, _ in tqdm(loader, disable=None)])


def raw_pixels(source: ImageFolder, side: int) -> torch.Tensor:
    loader = image_loader(source, ImageTransform((side, side)), 250, None)
    return torch.cat([pixels.flatten(1).float() for pixels, _ in loader])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--device")
    parser.add_argument(
        "--side", type=int, default=32, help="pixels to which images are resized for the raw-pixel floor"
    )
    args = parser.parse_args()
    device = find_device(args.device)
    trained, content = load_encoder(args.checkpoint)
    config = TrainConfig(**from_json(content["config"], args.checkpoint))
    with seeded(config.seed, "weights"):
        untrained = MaskedVisionTransformer(build_encoder(config, methods.find(config.method))[0]).eval()
    untrained.transform, untrained.pool = trained.transform, trained.pool
    train, test = open_source(args.train), open_source(args.test)
    result = {"checkpoint": args.checkpoint, "step": content["step"], "images": [len(train), len(test)]}
    for name, compute in (
        ("raw pixels", lambda s: raw_pixels(s, args.side)),
        ("untrained", lambda s: features(s, untrained, device)),
        ("trained", lambda s: features(s, trained, device)),
    ):
        predicted, _ = knn_classify(compute(train), labels(train), compute(test))
        result[name] = round(accuracy(predicted, labels(test)), 2)
    print(json.dumps(result | {"torch": torch.__version__, "numpy": np.__version__}))


if __name__ == "__main__":
    main()
