"""All methods with the same encoder and the same CPU time: kNN before and after, the loss curve, images/s.

    python benchmarks/methods.py TRAIN_FOLDER TEST_FOLDER --minutes 20 --out results

The folders hold a folder for each class, whose names only the kNN sees. Each method trains the same ViT (192 wide, 6 blocks,
patch 4, 32 px) on one thread with its own defaults: a few steps are timed, then the number of epochs is
chosen that fits into `--minutes` of CPU time (of this process, so other load on the machine does not count).
kNN as in knn.py, with the method's own pool and with the mean of the patches. Prints one JSON line a method.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from data2vec_vision import methods
from data2vec_vision.checkpoint import load_encoder
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import set_fused_attention
from data2vec_vision.extract import image_loader
from data2vec_vision.plan import build_encoder, prepare
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.seeding import seeded
from data2vec_vision.sources import ImageFolder, open_source
from data2vec_vision.train import optimizer_and_scaler, train, training_steps
from data2vec_vision.vit import MaskedVisionTransformer, pooled

POINTS = 20  # of the loss curve


def labels(source: ImageFolder) -> torch.Tensor:
    names = [source.name(i).split("/")[0] for i in range(len(source))]
    order = {name: n for n, name in enumerate(sorted(set(names)))}
    return torch.tensor([order[name] for name in names])


@torch.inference_mode()
def knn(
    encoder: MaskedVisionTransformer, pools: list[str], train_source: ImageFolder, test_source: ImageFolder
) -> list[float]:
    """kNN accuracy with each pool, features in bf16 as in training."""
    set_fused_attention(encoder.eval(), False)

    def features(source: ImageFolder) -> list[torch.Tensor]:
        parts = []
        for pixels, _ in image_loader(source, encoder.transform, 250, 0):
            with torch.autocast("cpu", torch.bfloat16):
                encoded = encoder.encode(encoder.transform.normalized(pixels))
            parts.append([pooled(encoded, pool).float() for pool in pools])
        return [torch.cat(part) for part in zip(*parts)]

    result = []
    for bank, queries in zip(features(train_source), features(test_source)):
        predicted, _ = knn_classify(bank, labels(train_source), queries)
        result.append(round(accuracy(predicted, labels(test_source)), 2))
    return result


def seconds_a_step(config: TrainConfig, count: int = 12, warm_up: int = 3) -> float:
    """CPU seconds of a step, loading included."""
    job = prepare(config)
    start = 0.0
    for step in training_steps(job, *optimizer_and_scaler(job)):
        if step.number == warm_up:
            start = time.process_time()
        if step.number == warm_up + count:
            break
    return (time.process_time() - start) / count


def measure(method: str, args: argparse.Namespace) -> dict[str, object]:
    train_source, test_source = open_source(args.train), open_source(args.test)
    settings = dict(
        image_size=32, patch_size=4, hidden_dim=192, n_encoders=6, workers=0, log_every=1, save_every=10**6,
        batch_size=args.batch_size, grad_accum=1, seed=args.seed, device="cpu",
    )  # fmt: skip
    options = {name: float(value) for name, value in (option.split("=") for option in args.option)}
    out = Path(args.out) / (method + args.tag)
    config = TrainConfig(
        args.train, method=method, set=tuple(args.set), checkpoint_out_dir=str(out), **settings | options
    )
    steps = -(-len(train_source) // config.images_a_step)
    epochs = max(1, round(60 * args.minutes / (steps * seconds_a_step(config))))
    config = TrainConfig(**{**vars(config), "epochs": epochs})
    start, clock = time.process_time(), time.perf_counter()
    train(config)
    minutes, wall = (time.process_time() - start) / 60, time.perf_counter() - clock
    losses = [json.loads(line)["loss"] for line in open(out / "metrics.jsonl")]
    chunk = max(1, len(losses) // POINTS)
    curve = [round(sum(part) / len(part), 4) for i in range(0, len(losses), chunk) if (part := losses[i : i + chunk])]
    trained, _ = load_encoder(out / f"student_{epochs - 1}.pt")
    with seeded(config.seed, "weights"):
        method_class = methods.find(method)
        untrained = MaskedVisionTransformer(build_encoder(config, method_class)[0]).eval()
    untrained.transform = trained.transform
    result: dict[str, object] = {
        "method": method, "knobs": args.set + args.option, "epochs": epochs, "cpu_minutes": round(minutes, 1),
        "images_per_cpu_second": round(epochs * steps * config.images_a_step / minutes / 60, 1),
        "wall_minutes": round(wall / 60, 1), "pool": trained.pool,
    }  # fmt: skip
    encoders = {"untrained": untrained, "trained": trained}
    if (teacher := out / f"teacher_{epochs - 1}.pt").exists():
        encoders["teacher"] = load_encoder(teacher)[0]
    pools = list(dict.fromkeys((trained.pool, "mean")))
    for name, encoder in encoders.items():
        for pool, value in zip(pools, knn(encoder, pools, train_source, test_source)):
            result[f"{name} {pool}"] = value
    last = json.loads(open(out / "metrics.jsonl").readlines()[-1])
    keys = ("target_std", "prediction_std", "prototypes_used", "entropy", "target_max", "class_loss", "cross_entropy")
    return result | {"health": {k: round(last[k], 3) for k in keys if k in last}, "loss": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--methods", nargs="+", default=methods.names())
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--option", nargs="*", default=[], help="numbers for options of train: max_lr=0.001 tau_initial=0.999"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--tag", default="")
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for method in args.methods:
        print(json.dumps(measure(method, args)), flush=True)


if __name__ == "__main__":
    main()
