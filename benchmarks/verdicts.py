"""What the verdict says of healthy runs and of collapses that are provoked: the last figures of each run.

    python benchmarks/verdicts.py IMAGE_FOLDER --out results

Every run is a ViT of 128 x 3 at 28 px in patches of 7 px on the CPU, 20 epochs with 64 images a step, each method with its
defaults but for the settings in the table. Prints a row a run: the last figures, when the verdict
first said that something is wrong, and the last verdict.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from data2vec_vision.config import TrainConfig
from data2vec_vision.train import train

FROZEN = {"tau_initial": 0.0, "tau_end": 0.0}
RUNS = [
    ("data2vec", {}),
    ("data2vec2", {}),
    ("ijepa", {}),
    ("mae", {}),
    ("msn", {}),
    ("swav", {}),
    ("data2vec", {"max_lr": 0.02, **FROZEN, "set": ("target_output=block", "target_norm=layer")}),
    ("data2vec", {"max_lr": 0.05}),
    ("data2vec2", {"max_lr": 0.05, **FROZEN}),
    ("ijepa", {"max_lr": 0.01, **FROZEN}),
    ("mae", {"max_lr": 0.1}),
    ("mae", {"max_lr": 1e-7}),
    ("msn", {"set": ("mean_entropy_weight=0", "sinkhorn=false")}),
    ("msn", {"max_lr": 0.05}),
    ("swav", {"set": ("epsilon=1",)}),
    ("swav", {"set": ("epsilon=0.05", "crop_min=0.14", "color_jitter=1")}),
]
FIGURES = ("feature_std", "rankme", "target_variance_images", "r2_constant", "r2_position", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--out", default="verdicts")
    args = parser.parse_args()
    print("| method | settings | " + " | ".join(FIGURES) + " | first trouble at | verdict |")
    print("|" + "---|" * (len(FIGURES) + 4))
    for number, (method, settings) in enumerate(RUNS):
        folder = Path(args.out) / f"{number:02}-{method}"
        config = TrainConfig(
            input_path=args.images, method=method, image_size=28, patch_size=7, hidden_dim=128, n_encoders=3,
            epochs=20, workers=0, device="cpu", no_report=True, no_tensorboard=True,
            checkpoint_out_dir=str(folder), **settings,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            train(config)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        trouble = next((line["step"] for line in lines if line.get("level") == "bad"), None)
        typed = " ".join(f"{name}={value}" for name, value in settings.items() if name != "set")
        typed = " ".join([typed, *settings.get("set", ())]).strip() or "defaults"
        cells = [f"{lines[-1][name]:.2f}" if lines[-1].get(name) is not None else "" for name in FIGURES]
        when = "" if trouble is None else f"{trouble} of {lines[-1]['step']}"
        print(f"| {method} | {typed} | " + " | ".join(cells) + f" | {when} | {lines[-1]['headline']} |", flush=True)


if __name__ == "__main__":
    main()
