"""The pictures of a run's page, drawn anew from its encoders and its images."""

import base64
import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data2vec_vision import checkpoint, methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.device import find_device
from data2vec_vision.distributed import processes
from data2vec_vision.errors import InputError, Unreadable
from data2vec_vision.extract import feature_function
from data2vec_vision.figures import (
    EXAMPLES,
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
from data2vec_vision.pictures import shown
from data2vec_vision.plan import Job, device_to_go_on, prepare
from data2vec_vision.sources import opened_picture
from data2vec_vision.transforms import ImageTransform

MOST_IMAGES, FEWEST_IMAGES = 1000, 100  # whose features are computed
SECONDS = 20  # that this may take, roughly
EPOCHS = 4  # columns of the maps beside the untrained encoder

VIEWS = "A row an image: the image, its views, and what of the first view the student gets. Every epoch draws others."
MAPS = (
    "A row an image, a column a saved encoder. The first three principal components of the patch features, less what "
    "their place has in several dozen images, as red, green and blue: what has one colour is alike to the encoder."
)
ATTENTION = "How much the last block attends to each patch, the mean over heads; bright is much."
NEIGHBOURS = "Left: an image of the training set. Right: those nearest to it by cosine of their features."
CONFUSION = "By a linear probe: a row a true class, a column what its images were taken for."
PLACES = "{count:,} images, placed by their features in two dimensions; of those that would overlap the first is shown."


def draw_pictures(
    folder: Path, config: TrainConfig, lines: Sequence[Mapping[str, Any]], device: str | None, maps: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The pictures of the page, and a sentence for each that cannot be made."""
    # Without --init and --pretrained: their files may be gone, and only the views and the masks are needed.
    plain = replace(
        config, init=None, pretrained=False, resume_checkpoint=None, workers=0, checkpoint_out_dir=str(folder)
    )
    try:
        where = find_device(device or device_to_go_on(config.device))
        files = encoder_files(folder)
        # Before anything is saved only views and masks are drawn, for which no mean matters.
        usual = ImageTransform.of_channels((1, 1), config.channels)
        transform = checkpoint.load(files[-1][1]).transform if files else usual
        kind = where.type if processes() > 1 else str(where)  # each process has its own
        job = prepare(replace(plain, device=kind), transform=transform)
    except InputError as error:
        return [], [f"The pictures are left out: {error}."]
    pictures = [picture("What the model saw", VIEWS, draw_views(job))]
    if not files:
        return pictures, ["Pictures of features come with the first saved encoder."]
    encoders = [(f"epoch {epoch}", checkpoint.load(path)) for epoch, path in files]
    if not (config.init or config.pretrained):
        encoders.insert(0, ("untrained", job.method.student.eval()))
    images = examples(job.source, config.channels)
    for _, encoder in encoders:
        encoder.to(where)
    pictures += reconstruction(folder, job, images[:EXAMPLES])
    pictures += patch_maps(encoders, images)
    rate = next((line["images_per_second"] for line in reversed(lines) if line.get("images_per_second")), 0.0)
    count = int(min(MOST_IMAGES, max(FEWEST_IMAGES, SECONDS * rate)))
    return [*pictures, *neighbourhoods(job, encoders[-1][1], where, count, maps)], []


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


def patch_maps(encoders: Encoders, images: Sequence[Image.Image | Tensor]) -> Iterator[dict[str, Any]]:
    if images:
        yield picture("What the patch features tell apart", MAPS, draw_patch_features(encoders, images))
        if attention := draw_attention(encoders, images):
            yield picture("Where it looks", ATTENTION, attention)


def reconstruction(folder: Path, job: Job, images: Sequence[Image.Image | Tensor]) -> Iterator[dict[str, Any]]:
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
            with (
                contextlib.suppress(Unreadable),
                opened_picture(job.source, index, encoder.transform.channels) as opened,
            ):
                pixels.append(encoder.transform.resized(opened))
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
    image = shown(pixels)
    image.thumbnail((96, 96))
    return image


def picture(title: str, caption: str, image: Image.Image) -> dict[str, Any]:
    """An image inside the page itself."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"title": title, "caption": caption, "source": source, "width": image.width}


def confusions(folder: Path) -> Iterator[dict[str, Any]]:
    """The confusion matrices that `evaluate` has drawn."""
    for path in sorted(folder.glob("*.confusion.png"), key=lambda path: path.stat().st_mtime):
        image = open_picture(path)
        if image is not None:
            yield picture(f"Confusions of {path.name.removesuffix('.confusion.png')}", CONFUSION, image)


def open_picture(path: Path) -> Image.Image | None:
    """None for a file that is no picture: its evaluation is on the page anyway."""
    try:
        return Image.open(path).convert("RGB")
    except OSError:
        return None
