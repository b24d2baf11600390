"""Pictures of a run: what the model saw, what its features tell apart, what it finds alike.

Shapes: N images, B images of a picture, S patches, D width.
"""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from data2vec_vision.arrays import within
from data2vec_vision.data import Stream, StreamDataset
from data2vec_vision.pictures import BACKGROUND, Tile, grid, masked, shown
from data2vec_vision.plan import Job
from data2vec_vision.resampling import resized
from data2vec_vision.sources import ImageFolder, read_image
from data2vec_vision.vit import MaskedVisionTransformer

EXAMPLES = 6  # images in a picture
KEPT_SIDE = 512  # pixels, at most, of an example that is kept
CROWD = 48  # images whose patch features are compared
SIDE = 112  # pixels of a tile
MAP_SIDE, THUMBNAIL = 960, 44  # pixels of the map of embeddings and of an image on it


def example_dataset(job: Job) -> StreamDataset:
    config = job.config
    views, masks = job.method.views(), job.method.masks()
    return StreamDataset(job.source, views, masks, config.seed, config.images_a_step, config.channels)


def draw_views(job: Job) -> Image.Image:
    """A row an image: the image, its views, and for a method with masks the first view as the student sees it."""
    dataset = example_dataset(job)
    stream = Stream(len(job.source), job.config.seed)
    rows: list[list[Tile]] = []
    for position in range(min(EXAMPLES, len(job.source))):
        index = stream.image(position)
        image = read_image(job.source, index, job.config.channels, KEPT_SIDE)
        if isinstance(image, str):
            continue
        sample = dataset[position, index]
        row: list[Tile] = [(shown(image), job.source.name(index)[-16:], None)]
        first = sample.views[0].shape
        for n, view in enumerate(sample.views):
            row.append((shown(view), f"view {n + 1}" if view.shape == first else f"small crop {n + 1}", None))
        if sample.masks:
            row.append(
                (masked(sample.views[0], job.method.student.patch_size, sample.masks), "what the student sees", None)
            )
        rows.append(row)
    return grid(rows, side=144)


def examples(source: ImageFolder, channels: int = 3) -> list[Image.Image | Tensor]:
    """Up to CROWD readable images, always the same ones; the first EXAMPLES, too, are from all over the source."""
    found: list[Image.Image | Tensor] = []
    N = len(source)
    for index in torch.linspace(0, N - 1, min(CROWD, N)).long().tolist():
        image = read_image(source, index, channels, KEPT_SIDE)
        if isinstance(image, Image.Image):
            image.thumbnail((KEPT_SIDE, KEPT_SIDE))  # dozens of large photos would take gigabytes
        elif isinstance(image, Tensor):
            image = resized(image, within(image.shape[1], image.shape[2], KEPT_SIDE), cubic=False)
        if not isinstance(image, str):
            found.append(image)
    spread = range(0, len(found), max(1, len(found) // EXAMPLES))[:EXAMPLES]
    return [found[i] for i in spread] + [image for i, image in enumerate(found) if i not in spread]


Encoders = Sequence[tuple[str, MaskedVisionTransformer]]  # with what to call each


@torch.inference_mode()
def draw_patch_features(encoders: Encoders, images: Sequence[Image.Image | Tensor]) -> Image.Image:
    """A row an image, a column an encoder: three principal components of its patch features as red, green and blue.

    The components are those of all patches of all `images`, of which the first EXAMPLES are drawn. What a place has in
    all of them is taken off: it would cover the rest.
    """
    columns, before = [], None
    for _, encoder in encoders:
        tokens = encoder.encode(batch(encoder, images)).tokens
        before = principal_colours(tokens - tokens.mean(dim=0) if len(images) > EXAMPLES else tokens, before)
        columns.append(before)
    return draw_maps(encoders, images[:EXAMPLES], columns)


@torch.inference_mode()
def draw_attention(encoders: Encoders, images: Sequence[Image.Image | Tensor]) -> Image.Image | None:
    """A row an image, a column an encoder: how much its last block attends to each patch, the mean over heads.

    From the class token where that is the feature, else from all patches. None for blocks of another kind.
    """
    columns = []
    for _, encoder in encoders:
        attention = encoder.attention(batch(encoder, images[:EXAMPLES]))
        if attention is None:
            return None
        heat = attention.mean(dim=1)
        heat = heat / heat.amax(dim=1, keepdim=True)
        columns.append(torch.stack([heat, heat.square(), 0.25 * (1 - heat)], dim=2))
    return draw_maps(encoders, images[:EXAMPLES], columns)


def batch(encoder: MaskedVisionTransformer, images: Sequence[Image.Image | Tensor]) -> Tensor:
    device = next(encoder.parameters()).device
    return torch.stack([encoder.transform(image) for image in images]).to(device)


def principal_colours(tokens: Tensor, before: Tensor | None = None) -> Tensor:
    """Patch features [B, S, D] -> colours [B, S, 3] in [0, 1]: their first three principal components.

    A component has no sign of its own: it takes the one that agrees with the colours `before`.
    """
    flat = tokens.double().cpu().flatten(0, 1)
    components = principal_components(flat, 3)
    if components.shape[1] < 3:
        components = torch.nn.functional.pad(components, (0, 3 - components.shape[1]))
    if before is not None:
        agree = (components * (before.flatten(0, 1) - 0.5)).sum(dim=0)
        components = torch.where(agree < 0, -components, components)
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return colours.view(*tokens.shape[:2], 3)


def draw_maps(encoders: Encoders, images: Sequence[Image.Image | Tensor], columns: Sequence[Tensor]) -> Image.Image:
    """A row an image: the image, and for each encoder its colours [B, S, 3] of the patches."""
    rows: list[list[Tile]] = []
    for n, image in enumerate(images):
        row: list[Tile] = [(squashed(image, encoders[0][1]), "image", None)]
        for (name, encoder), colours in zip(encoders, columns):
            tile = to_pil_image(colours[n].view(*encoder.grid, 3).permute(2, 0, 1).float().cpu())
            row.append((tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), name, None))
        rows.append(row)
    return grid(rows, side=SIDE)


def squashed(image: Image.Image | Tensor, encoder: MaskedVisionTransformer) -> Image.Image:
    """The image as the encoder gets it, so that its patches lie where those of the maps do."""
    return shown(encoder.transform.resized(image))


def draw_neighbours(features: Tensor, image: Callable[[int], Image.Image], names: Sequence[str]) -> Image.Image:
    """A row an image: one of the N images, and those whose features [N, D] are nearest to its own by cosine."""
    N = len(features)
    bank = torch.nn.functional.normalize(features.float(), dim=1)
    rows: list[list[Tile]] = []
    for query in torch.linspace(0, N - 1, min(EXAMPLES + 2, N)).long().tolist():
        similarity = bank @ bank[query]
        similarity[query] = -2.0
        near, index = similarity.topk(min(7, N - 1))
        row: list[Tile] = [(image(query), names[query].rpartition("/")[2][-15:], (90, 90, 90))]
        row += [(image(i), f"cosine {s:.2f}", None) for s, i in zip(near.tolist(), index.tolist())]
        rows.append(row)
    return grid(rows, side=96, groups=(1,))


def draw_embedding_map(places: Tensor, image: Callable[[int], Image.Image]) -> Image.Image:
    """Thumbnails at places [N, 2]: as many as there is room for, so that none hides another."""
    low, high = places.quantile(0.01, dim=0), places.quantile(0.99, dim=0)
    unit = ((places - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    cells = MAP_SIDE // THUMBNAIL
    page = Image.new("RGB", (cells * THUMBNAIL, cells * THUMBNAIL), BACKGROUND)
    taken: set[tuple[int, int]] = set()
    for index, (x, y) in enumerate((unit * (cells - 1)).round().long().tolist()):
        if (x, y) not in taken:
            taken.add((x, y))
            tile = image(index).convert("RGB")
            tile.thumbnail((THUMBNAIL - 2, THUMBNAIL - 2))
            page.paste(tile, (x * THUMBNAIL + 1, y * THUMBNAIL + 1))
    return page


def embedding_places(features: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Features [N, D] -> places [N, 2] by PCA, and by UMAP or else t-SNE where one is installed and N suffices."""
    unit, places = torch.nn.functional.normalize(features.double(), dim=1), {"PCA": principal_places(features)}
    if len(features) < 50:
        return places
    if importlib.util.find_spec("umap"):
        import umap

        fitted = umap.UMAP(random_state=seed, n_jobs=1).fit_transform(unit.float().numpy())
        return places | {"UMAP": torch.from_numpy(fitted).double()}
    if importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE

        fitted = TSNE(random_state=seed, init="pca").fit_transform(unit.float().numpy())
        return places | {"t-SNE": torch.from_numpy(fitted).double()}
    return places


def principal_places(features: Tensor) -> Tensor:
    """Unit features [N, D] along their first two principal components: [N, 2]."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return principal_components(unit, 2)


def principal_components(x: Tensor, count: int) -> Tensor:
    """The first `count` principal components of the rows of x [N, D]: [N, count]."""
    centred = x - x.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return centred @ directions.flip(1)[:, :count]
