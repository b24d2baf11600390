"""An encoder for other libraries, loaded back before it counts: timm, transformers, ONNX, plain safetensors.

Every format holds the encoder alone. The mask token of data2vec, and what else a method has beside the encoder, stay
in the files of the run. The line that is printed last is the one by which the result was loaded back and compared.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from data2vec_vision import __version__
from data2vec_vision.checkpoint import STUDENT, check_place, load_encoder, sync_folder
from data2vec_vision.errors import InputError, RunFailed, Stopped, one_line
from data2vec_vision.formats import FILES, FORMATS, MARK, Encoder, for_timm, timm_call, usage
from data2vec_vision.run import caught_signals, say, size

# Of the features, as a share of the largest one, or of 1 where that is less; ONNX runtimes have kernels of their own.
TOLERANCE = {"timm": 1e-5, "safetensors": 1e-5, "huggingface": 1e-5, "onnx": 1e-4}


def export(checkpoint: str, output: str, format: str, encoder: str = "student", pool: str | None = None) -> None:
    """Write the encoder in a student, teacher or training file to `output`, for another library.

    timm, safetensors and huggingface are folders, onnx is one file. `pool`, by default the method's, is what timm's
    `model(images)` and the `embedding` of ONNX give. Raises InputError for what cannot be exported, RunFailed when
    the disk does not take it or when the features that come back are not ours, and Stopped after a signal; then
    `output` stays what it was.
    """
    target = check_output(output, format)
    source = read_encoder(checkpoint, encoder, pool)
    with staged(target) as (written, signals):
        FORMATS[format].write(source, written)
        difference = difference_when_loaded(source, format, written)
        sizes = {path.name: path.stat().st_size for path in written.parent.rglob("*") if path.is_file()}
        if signals:
            raise Stopped(signals[0], "Stopped; nothing was written")
    report(source, format, target, sizes, difference)
    if format == "timm" and "encoder" not in source.about:
        say(f"the file itself, by timm: {timm_call(source, checkpoint_path=os.path.realpath(checkpoint))}")
    say(usage(source, format))
    say(FORMATS[format].line(source, str(target)))


def check_output(output: str, format: str) -> Path:
    """Raises InputError unless an export can be written to `output`."""
    target = Path(os.path.realpath(output))
    check_place("--output", target, folder=format != "onnx")
    if format == "timm" and timm.models.parse_model_name(f"local-dir:{target}")[1] != str(target):
        raise InputError(f"--output {output}: timm {timm.__version__} takes no path with # ? or line ends in it")
    if format == "onnx":
        if target.suffix != ".onnx":
            raise InputError(f"--output {output} must end in .onnx")
        if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
            raise InputError(f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
    elif target.exists() and not target.is_dir():
        raise InputError(f"--output {output} is a file, but --format {format} writes a folder; give another name")
    elif target.is_dir() and not may_be_replaced(target):
        raise InputError(f"--output {output} holds files that are no export of this tool; give an empty or new folder")
    return target


def may_be_replaced(folder: Path) -> bool:
    """Whether nothing is lost with this folder: it is empty, or holds an earlier export and nothing else."""
    names = {path.name for path in folder.iterdir()}
    try:
        return not names or (names <= FILES and MARK in json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


def read_encoder(checkpoint: str, which: str, pool: str | None) -> Encoder:
    """The encoder in a file of ours. Raises InputError for one that cannot be exported."""
    ours, content = load_encoder(checkpoint, "cpu", which)
    about: dict[str, Any] = {"version": __version__, "method": content["method"], "file": os.path.basename(checkpoint)}
    about |= {key: content[key] for key in ("epoch", "step") if content.get(key) is not None}
    if content["format"] != STUDENT:
        about["encoder"] = which
    ours.check_pool(pool or ours.pool)
    for name, tensor in ours.vit.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} in {checkpoint} has values that are not finite; export an earlier file")
    return for_timm(ours, pool or ours.pool, about)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[tuple[Path, list[int]]]:
    """A path that takes the name `target` at the end, when all went well, and the signals that came meanwhile.

    Raises RunFailed when the disk does not take what is written.
    """
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with caught_signals() as signals:
            work.mkdir()
            yield work / target.name, signals
            put_in_place(work / target.name, target)
    except OSError as error:
        raise RunFailed(f"cannot write {target}: {one_line(error)}; make room or choose another --output") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(written: Path, target: Path) -> None:
    """Give what was written its final name; an earlier export of that name goes."""
    if target.is_dir():
        earlier = written.with_name(f"{target.name}.earlier")
        os.rename(target, earlier)
        try:
            os.rename(written, target)
        except OSError:
            os.rename(earlier, target)
            raise
    else:
        for part in sorted(written.parent.iterdir(), reverse=True):  # of ONNX's two files, the weights first
            os.replace(part, target.with_name(part.name))
    sync_folder(target.parent)


def difference_when_loaded(source: Encoder, format: str, path: Path) -> float | None:
    """Load an export as a user would: the largest difference between its features and ours.

    None where the library that loads it is not installed. Raises RunFailed when it does not give our features.
    """
    library = FORMATS[format].library
    if importlib.util.find_spec(library) is None:
        return None
    images = source.noise(3)  # another number than ONNX was traced with
    loaded: dict[str, Any] = {}
    with torch.no_grad():
        ours = source.ours.encode(images).tokens, source.ours.embed(images, source.pool)
        try:
            importlib.import_module(library)  # first, so that its log does not go where its progress bar goes
            with contextlib.redirect_stderr(io.StringIO()):
                exec(FORMATS[format].line(source, str(path)), loaded)
            theirs = FORMATS[format].outputs(source, loaded, images)
        except Exception as error:  # whatever another library raises
            raise RunFailed(f"nothing was written: {library} cannot load the result: {one_line(error)}") from error
    if not all(features.isfinite().all() for features in ours):
        raise RunFailed("nothing was written: the features of this encoder overflow; export an earlier file")
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs)]
    if not all(d <= TOLERANCE[format] * max(1.0, float(a.abs().max())) for d, a in zip(differences, ours)):
        raise RunFailed(f"nothing was written: {library} computes features that differ by {max(differences):.1e}")
    return max(differences)


def report(source: Encoder, format: str, target: Path, sizes: dict[str, int], difference: float | None) -> None:
    """Say what was written, its files with their bytes, and how near its features are."""
    library, about = FORMATS[format].library, source.about
    checked = f"not loaded back, for {library} is not installed"
    if difference is not None:
        version = importlib.metadata.version(library)
        checked = f"loaded back by {library} {version}, its features differ from ours by {difference:.0e} at most"
    say(f"Wrote {target} ({size(sum(sizes.values()))}): the encoder of {about['method']} in {about['file']}; {checked}")
    if f"{target.name}.data" in sizes:
        say(f"{target.name}.data beside it holds the weights, which one .onnx file cannot: keep the two together")
