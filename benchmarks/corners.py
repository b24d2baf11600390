"""Do the defaults collapse? Every method for 300 steps on four very different sets of images.

    python benchmarks/corners.py --photos photos --small cifar10/train --threads 1

| images | batch | size | from |
|---|---|---|---|
| 500 | 16 | 224 px | two crops of each of 250 photos |
| 2,000 | 64 | 96 px | eight crops of each |
| 10,000 | 256 | 32 px | --small, evenly spread |
| 50,000 | 512 | 32 px | --small |

A small encoder, so that it ends: 64 wide, 3 blocks, patches of a fourteenth, a twelfth and an eighth of the side; on the last set,
for the same reason, of a quarter. All else is what `train` takes by default for a run of 300 steps: a whole one, its warm-up, the
teacher's rise and two masks of data2vec 2.0 included. Prints a row a run: the verdict, RankMe of the embeddings at the first reading and the last, and how much of the targets
differs between images at one place.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from learning import train
from PIL import Image

from data2vec_vision import methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.sources import open_source

STEPS = 300
# Images, batch, size, patch, crops of a photo or none.
CORNERS = ((500, 16, 224, 16, 2), (2000, 64, 96, 8, 8), (10_000, 256, 32, 4, 0), (50_000, 512, 32, 8, 0))


def crops(photos: str, count: int, out: Path) -> None:
    """`count` square crops of each photo, spread from its one end to the other, as files."""
    out.mkdir()
    for path in sorted(p for p in Path(photos).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        with Image.open(path) as file:
            image = file.convert("RGB")
        side = min(image.size) * 2 // 3
        for n in range(count):
            left, top = (round((length - side) * n / (count - 1)) for length in image.size)
            image.crop((left, top, left + side, top + side)).resize((256, 256)).save(out / f"{path.stem}_{n}.jpg")


def subset(folder: str, count: int, out: Path) -> None:
    """Links to `count` images of a folder, evenly spread."""
    out.mkdir()
    source = open_source(folder)
    for n in range(count):
        name = source.name(n * len(source) // count)
        (out / f"{n}_{Path(name).name}").symlink_to((Path(folder) / name).resolve())


def runs(args: argparse.Namespace, work: Path) -> Iterator[str]:
    """A Markdown row for each method and corner."""
    for n_images, batch, size, patch, per_photo in CORNERS:
        images = work / str(n_images)
        if per_photo:
            crops(args.photos, per_photo, images)
        else:
            subset(args.small, n_images, images)
        for method in args.methods:
            out = work / f"{method}-{n_images}"
            config = TrainConfig(
                str(images), method=method, image_size=size, patch_size=patch, hidden_dim=64, n_encoders=3, n_heads=1,
                batch_size=batch, checkpoint_out_dir=str(out), save_every=10**6, no_report=True,
                no_tensorboard=True, workers=0, seed=args.seed, compile=False, log_every=5,
            )  # fmt: skip
            trained, _ = train(config, STEPS)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            ranks = [line["rankme"] for line in lines if line.get("rankme")]
            last = trained.record
            left = [line["target_variance_images"] for line in lines if line.get("target_variance_images") is not None]
            between = f"{left[-1]:.2f}" if left else ""
            yield (
                f"| {method} | {len(open_source(str(images))):,} | {batch} | {size} | {last['verdict']} ({last['level']}) | {ranks[0]:.0f} | "
                f"{ranks[-1]:.0f} | {between} | {trained.cpu_seconds / 60:.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a folder of photos")
    parser.add_argument("--small", required=True, help="a folder of at least 50,000 small images")
    parser.add_argument("--methods", nargs="+", default=methods.names())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        "| method | images | batch | px | verdict | RankMe first | last | targets between images | CPU min |",
        "|" + "---|" * 9,
    ]
    with tempfile.TemporaryDirectory() as work:
        for row in runs(args, Path(work)):
            rows.append(row)
            print(row, flush=True)
    print("\n".join(["", *rows]))


if __name__ == "__main__":
    main()
