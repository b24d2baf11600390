"""The formats of `export`: how each is written, the line of Python that loads it, and what it then gives.

Shapes: N images, C channels, H x W pixels, S patches, D width.
"""

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_safetensors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data2vec_vision.checkpoint import atomic_write
from data2vec_vision.errors import InputError, RunFailed, one_line
from data2vec_vision.huggingface import as_huggingface
from data2vec_vision.vit import MaskedVisionTransformer, architecture, build_vit

MARK = "data2vec_vision"  # the key in config.json by which an export is known
FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}  # what an exported folder may hold


@dataclass(frozen=True)
class Encoder:
    """What is exported."""

    ours: MaskedVisionTransformer
    vit: VisionTransformer  # the same for timm: `forward_features` gives all tokens, `forward` the pooled vector
    name: str  # timm's, and its arguments
    arguments: dict[str, Any]
    pool: str  # "mean" or "cls"
    about: dict[str, Any]  # where it comes from

    def noise(self, count: int) -> Tensor:
        """Images to try it on, [count, C, H, W]."""
        shape = (count, self.vit.patch_embed.proj.in_channels, *self.ours.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def for_timm(ours: MaskedVisionTransformer, pool: str, about: dict[str, Any]) -> Encoder:
    """`ours` with a timm model that gives the same tokens, and by `model(images)` the same vector of an image."""
    described = architecture(ours.vit)
    arguments = {name: value for name, value in described["arguments"].items() if value is not None}
    # Our tokens are normalised and then pooled; timm's "avg" is the other way round unless told.
    arguments |= {"global_pool": "token" if pool == "cls" else "avg", "fc_norm": False}
    vit = build_vit(described["model"], **arguments).eval()
    vit.load_state_dict(ours.vit.state_dict())
    return Encoder(ours, vit, described["model"], arguments, pool, about | {"pool": pool})


def write_folder(folder: Path, source: Encoder, weights: dict[str, Tensor], configs: dict[str, dict[str, Any]]) -> None:
    """Write the weights as model.safetensors beside files of configuration, by their names."""
    folder.mkdir()
    configs["config.json"][MARK] = source.about
    with atomic_write(folder / "model.safetensors") as file:
        file.write(as_safetensors({name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"}))
    for name, config in configs.items():
        with atomic_write(folder / name) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())


def write_timm(source: Encoder, folder: Path) -> None:
    transform = source.ours.transform
    config = {
        "architecture": source.name,
        "num_classes": 0,
        "num_features": source.vit.num_features,
        "global_pool": source.arguments["global_pool"],
        "model_args": source.arguments,
        "pretrained_cfg": {
            "input_size": [source.vit.patch_embed.proj.in_channels, *transform.image_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_mode": "squash",  # the whole image
            "crop_pct": 1.0,
            "mean": list(transform.mean),
            "std": list(transform.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_folder(folder, source, source.vit.state_dict(), {"config.json": config})


def timm_line(source: Encoder, path: str) -> str:
    return f"import timm; model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()"


def timm_outputs(source: Encoder, loaded: dict[str, Any], images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = loaded["model"].forward_features(images)
    return tokens[:, source.vit.num_prefix_tokens :], loaded["model"](images)


def write_safetensors(source: Encoder, folder: Path) -> None:
    config = {"model": source.name, "arguments": source.arguments, "transform": source.ours.transform.to_dict()}
    write_folder(folder, source, source.vit.state_dict(), {"config.json": config})


def safetensors_line(source: Encoder, path: str) -> str:
    build = f"model = {timm_call(source)}.eval()"
    load = f"model.load_state_dict(load_file({str(Path(path, 'model.safetensors'))!r}))"
    return f"import timm; from safetensors.torch import load_file; {build}; {load}"


def timm_call(source: Encoder, **more: str) -> str:
    """The call of timm.create_model, in Python, with no more arguments than its model of that name needs."""
    usual: dict[str, Any] = {}
    with contextlib.suppress(InputError), torch.device("meta"):
        plain = build_vit(source.name)
        pool: dict[str, Any] = {"global_pool": plain.global_pool}
        if plain.global_pool == source.arguments["global_pool"] == "token":  # "avg" moves the norm unless told
            pool["fc_norm"] = not isinstance(plain.fc_norm, nn.Identity)
        usual = architecture(MaskedVisionTransformer(plain).vit)["arguments"] | pool
    needed = {key: value for key, value in source.arguments.items() if key not in usual or value != usual[key]}
    keywords = {"num_classes": 0} | needed | more
    return f"timm.create_model({source.name!r}, {', '.join(f'{key}={value!r}' for key, value in keywords.items())})"


def write_huggingface(source: Encoder, folder: Path) -> None:
    configs, weights = as_huggingface(source.vit, source.ours.transform)
    write_folder(folder, source, weights, configs)


def huggingface_line(source: Encoder, path: str) -> str:
    model = f"model = AutoModel.from_pretrained({path!r}, add_pooling_layer=False).eval()"
    processor = f"processor = AutoImageProcessor.from_pretrained({path!r})"
    return f"from transformers import AutoImageProcessor, AutoModel; {model}; {processor}"


def huggingface_outputs(source: Encoder, loaded: dict[str, Any], images: Tensor) -> tuple[Tensor, Tensor]:
    states = loaded["model"](images).last_hidden_state
    tokens = states[:, source.vit.num_prefix_tokens :]
    return tokens, states[:, 0] if source.pool == "cls" else tokens.mean(dim=1)


class TokensAndEmbedding(nn.Module):
    """Images [N, C, H, W] -> patch tokens [N, S, D] and one vector an image [N, D]."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit.forward_features(images)
        return tokens[:, self.vit.num_prefix_tokens :], self.vit.forward_head(tokens, pre_logits=True)


def write_onnx(source: Encoder, path: Path) -> None:
    """Images [N, C, H, W] -> features [N, S, D] and embedding [N, D], for any N.

    Weights beyond 2 GB, which an .onnx file cannot hold, go to a second file. Raises RunFailed when torch cannot.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of what other versions of torch will do
            program: Any = torch.onnx.export(
                TokensAndEmbedding(source.vit).eval(),
                (source.noise(2),),
                dynamic_shapes=({0: torch.export.Dim("N", min=1, max=2**31 - 1)},),
                dynamo=True,
                optimize=True,
                verbose=False,
                input_names=["images"],
                output_names=["features", "embedding"],
            )
    except Exception as error:  # the steps of the exporter raise errors of all kinds
        raise RunFailed(f"torch {torch.__version__} cannot write this as ONNX: {one_line(error)}") from error
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    about = source.ours.transform.to_dict() | source.about
    program.model.metadata_props.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    program.save(path)


def onnx_line(source: Encoder, path: str) -> str:
    session = f"onnxruntime.InferenceSession({path!r}, providers=['CPUExecutionProvider'])"
    return f"import onnxruntime; session = {session}"


def onnx_outputs(source: Encoder, loaded: dict[str, Any], images: Tensor) -> tuple[Tensor, Tensor]:
    features, embedding = loaded["session"].run(None, {"images": images.numpy()})
    return torch.from_numpy(features), torch.from_numpy(embedding)


@dataclass(frozen=True)
class Format:
    library: str  # what loads it
    write: Callable[[Encoder, Path], None]
    line: Callable[[Encoder, str], str]  # Python that loads it from a path, as `model` or `session`
    outputs: Callable[[Encoder, dict[str, Any], Tensor], tuple[Tensor, Tensor]]  # patch tokens and embedding


FORMATS = {
    "timm": Format("timm", write_timm, timm_line, timm_outputs),
    "safetensors": Format("timm", write_safetensors, safetensors_line, timm_outputs),
    "huggingface": Format("transformers", write_huggingface, huggingface_line, huggingface_outputs),
    "onnx": Format("onnxruntime", write_onnx, onnx_line, onnx_outputs),
}


def usage(source: Encoder, format: str) -> str:
    """What the result takes and gives, in a line for people."""
    transform, prefix = source.ours.transform, source.vit.num_prefix_tokens
    patches = f"[:, {prefix}:]" if prefix else ""
    height, width = transform.image_size
    values = "RGB in [0, 1]" if transform.channels == 3 else "values as d2v.open_image gives them"
    pixels = f"{values}, resized to {height} x {width}, minus {list(transform.mean)}, over {list(transform.std)}"
    first = f"images: float32 [N, {transform.channels}, {height}, {width}], {pixels}; "
    if format == "onnx":
        return first + 'patch tokens and embedding: features, embedding = session.run(None, {"images": images})'
    if format == "huggingface":
        embedding = "states[:, 0]" if source.pool == "cls" else f"states{patches}.mean(1)"
        return f"states = model(**processor(image, return_tensors='pt')).last_hidden_state; the embedding: {embedding}"
    return first + f"embedding: model(images); patch tokens: model.forward_features(images){patches}"
