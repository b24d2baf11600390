"""Damages files at random and gives them to everything that reads files: each is read, or refused in one clear line.

    python tests/stress/fuzz.py --seconds 60            every reader in turn; `--only zip` one; `--seed 1` other damage
    python tests/stress/fuzz.py --atheris --only zip    the same by coverage, where atheris is installed; Ctrl-C ends it

Prints how many files each reader was given. A file that made it fail otherwise is written to the current folder and
ends this with exit code 1. tests/unit/test_fuzz.py runs the same readers under hypothesis.
"""

import argparse
import inspect
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data2vec_vision import archives, checkpoint, labels, methods
from data2vec_vision.config import TrainConfig, check, from_json, read_config
from data2vec_vision.errors import InputError, Unreadable
from data2vec_vision.folders import ImageList
from data2vec_vision.images import Picture
from data2vec_vision.index import Index
from data2vec_vision.report import contents, read_run
from data2vec_vision.shards import Archives
from data2vec_vision.sources import ImageFolder, read_image

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "files_of_0.1.0"
PIXELS = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)


def saved(format: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


PNG = saved("PNG")


# ---- what is given to be read: whole files, small


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "a/2.png", "notes.txt"):
            archive.writestr(name, PNG)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a/1.png", "a/" + "ü" * 120 + ".png", "notes.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PNG)
            archive.addfile(entry, io.BytesIO(PNG))
    return file.getvalue()


def table(suffix: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table(
        {"image": [{"bytes": PNG, "path": "a.png"}, {"bytes": None, "path": "b.jpg"}], "label": [0, 1]}
    )
    file = io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(rows, file)
    else:
        with pyarrow.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, PIXELS)
    return file.getvalue()


def tiffs() -> list[bytes]:
    files = [saved("TIFF"), saved("TIFF", compression="tiff_lzw"), saved("TIFF", PIXELS[:, :, 0].astype(np.uint16))]
    with suppress(ImportError):
        import tifffile

        for options in (
            {"tile": (16, 16), "compression": "zlib"},
            {"photometric": "minisblack", "planarconfig": "separate"},
        ):
            file = io.BytesIO()
            tifffile.imwrite(file, PIXELS.transpose(2, 0, 1) if "planarconfig" in options else PIXELS, **options)
            files.append(file.getvalue())
    return files


def dicom() -> list[bytes]:
    try:
        import pydicom
    except ImportError:
        return [b"\0" * 128 + b"DICM"]
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 12, 10, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth, data.RescaleSlope, data.RescaleIntercept = 40, 400, 1, -1024
    data.PixelData = PIXELS[:, :, 0].astype(np.uint16).tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return [file.getvalue()]


def indexed() -> bytes:
    file = io.BytesIO()
    names = [b"a/1.png", b"a/2.png"]
    Index.of(names, np.zeros(2, archives.np.dtype(Index.of([]).members.dtype))).write(file, {"version": 1})
    return file.getvalue()


def pickled(name: str) -> bytes:
    """The weights of the golden file without the many numbers, so that damage meets structure more often."""
    return (GOLDEN / name).read_bytes()


METRICS = "".join(json.dumps({"step": n, "steps": 9, "epoch": 0, "loss": 0.1, "verdict": "good", "level": "good",
                              "headline": "It is learning", "text": "x"}) + "\n" for n in (1, 2, 3)).encode()  # fmt: skip


# ---- the readers: a file in a folder of its own -> nothing, InputError, Unreadable, or OSError of a member


def picture(path: Path) -> None:
    data = path.read_bytes()
    for channels in (1, 4, 3):
        with suppress(Unreadable) if channels != 3 else nullcontext():
            found = Picture.of(io.BytesIO(data), channels)
            if max(found.size) < 3000:
                found.crops([(0, 0, 1, 1)], [(4, 4)])
                found.image()


def source(path: Path) -> None:
    opened = Archives([str(path)])
    for index in range(min(len(opened), 20)):
        opened.name(index)
        read_image(opened, index)


def cache(path: Path) -> None:
    with suppress(OSError, ValueError):  # whatever it raises, the cache is made anew; it must not lie
        index, about = Index.read(str(path))
        assert len(list(index)) == len(index) and isinstance(about, dict)


def listed(path: Path) -> None:
    (path.parent / "1.png").write_bytes(PNG)
    found = ImageList(path)
    for index in range(min(len(found), 20)):
        read_image(found, index)


def csv_of_labels(path: Path) -> None:
    (path.parent / "1.png").write_bytes(PNG)
    labels.labels_of(ImageFolder(path.parent), str(path))


def settings(path: Path) -> None:
    check(TrainConfig(**read_config(str(path), {})))


def weights(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(path)


def training(path: Path) -> None:
    content = checkpoint.read_training(path)
    check(TrainConfig(**from_json(content["config"], str(path))))
    methods.load_method(path)


def init(path: Path) -> None:
    vit = checkpoint.load(GOLDEN / "student_1.pt").vit
    checkpoint.load_weights(vit, path)


def run(path: Path) -> None:
    (path.parent / "config.json").write_text(
        json.dumps(torch.load(GOLDEN / "checkpoint_0.pt", weights_only=True)["config"])
    )
    path.replace(path.parent / "metrics.jsonl")
    contents(path.parent, *read_run(path.parent))


def safetensors() -> bytes:
    from safetensors.torch import save

    return save(torch.load(GOLDEN / "student_1.pt", weights_only=True)["state_dict"])


CONFIG = json.dumps(torch.load(GOLDEN / "checkpoint_0.pt", weights_only=True)["config"]).encode()
READERS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], None]]] = {
    "zip": (".zip", lambda: [zipped()], source),
    "tar": (".tar", lambda: [tarred()], source),
    "parquet": (".parquet", lambda: [table(".parquet")], source),
    "arrow": (".arrow", lambda: [table(".arrow")], source),
    "cache": (".index", lambda: [indexed()], cache),
    "list": (".txt", lambda: [b"1.png\n./2.png\n", b"\xef\xbb\xbf1.png\r\n/dev/null\r\n"], listed),
    "csv": (".csv", lambda: [b'path,label\n1.png,cat\n"2.png",dog\n'], listed),
    "labels": (".csv", lambda: [b'path,label\n1.png,cat\n"2.png",dog\n'], csv_of_labels),
    "tiff": (".tif", tiffs, picture),
    "npy": (".npy", lambda: [array()], picture),
    "dicom": (".dcm", dicom, picture),
    "jpeg": (".jpg", lambda: [saved("JPEG"), saved("JPEG", progressive=True)], picture),
    "png": (".png", lambda: [PNG], picture),
    "others": (".gif", lambda: [saved("GIF"), saved("BMP"), saved("WEBP"), saved("PPM"), saved("TGA")], picture),
    "config": (".json", lambda: [CONFIG], settings),
    "student": (".pt", lambda: [pickled("student_1.pt")], weights),
    "checkpoint": (".pt", lambda: [pickled("checkpoint_0.pt")], training),
    "init": (".pt", lambda: [pickled("student_1.pt")], init),
    "safetensors": (".safetensors", lambda: [safetensors()], init),
    "metrics": (".jsonl", lambda: [METRICS], run),
}  # fmt: skip
# What is watched for new paths; all modules there are would take minutes.
INSTRUMENTED = ("data2vec_vision", "zipfile", "tarfile", "json", "csv", "PIL.Tiff", "tifffile", "pydicom")
WORDS = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"-1", b"99999999999", b"NaN", b"null",
         b"[" * 40, b'"', b"\n", b"\0", b"../", b"PK\x01\x02", b"ustar", b"IDAT"]  # fmt: skip


def damaged(data: bytes, random: random.Random) -> bytes:
    """A few bytes changed, taken away, put in or repeated; more of them at the beginning, where headers are."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        end = random.choice((len(found), min(len(found), 64), min(len(found), 512)))
        at = random.randrange(end + 1)
        what = random.randrange(6)
        if what == 0 and at < len(found):
            found[at] = random.randrange(256)
        elif what == 1 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif what == 2:
            word = random.choice(WORDS)
            found[at : at + len(word)] = word
        elif what == 3:
            found[at:at] = random.choice(WORDS)
        elif what == 4:
            del found[at : at + random.choice((1, 4, 100))]
        elif random.random() < 0.3:
            del found[at:]
    return bytes(found)


def give(name: str, data: bytes, folder: Path) -> bool:
    """Has a reader read a file in an empty folder; whether it could. Raises AssertionError for what is not one line."""
    suffix, _, read = READERS[name]
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    path = folder / f"file{suffix}"
    path.write_bytes(data)
    try:
        read(path)
    except (InputError, Unreadable) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"not one line: {error}"
        return False
    return True


def by_chance(name: str, seconds: float, seed: int) -> tuple[int, int]:
    """How many files were given, and how many could be read."""
    seeds, chance, given, could = READERS[name][1](), random.Random(f"{name} {seed}"), 0, 0
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            data = damaged(chance.choice(seeds), chance)
            try:
                could += give(name, data, Path(folder))
            except Exception:
                Path(f"crash-{name}").write_bytes(data)
                traceback.print_exc()
                print(f"{name}: file {given + 1} of seed {seed} is crash-{name}", flush=True)
                return given + 1, -1
            given += 1
    return given, could


def by_coverage(name: str) -> None:
    import atheris

    for module in [found for name, found in sys.modules.items() if name.startswith(INSTRUMENTED)]:
        for owner in (module, *(part for part in vars(module).values() if inspect.isclass(part))):
            for part in list(vars(owner).values()):
                if inspect.isfunction(part) and getattr(part, "__module__", "") == module.__name__:
                    atheris.instrument_func(part)
    folder = Path(tempfile.mkdtemp())
    corpus = Path(tempfile.mkdtemp())
    for n, data in enumerate(READERS[name][1]()):
        (corpus / str(n)).write_bytes(data)
    atheris.Setup([sys.argv[0], str(corpus)], lambda data: give(name, data, folder) and None)
    atheris.Fuzz()


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=10.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", choices=READERS, action="append")
    arguments.add_argument("--atheris", action="store_true")
    chosen = arguments.parse_args()
    os.environ["D2V_CACHE"] = tempfile.mkdtemp()
    warnings.simplefilter("ignore")
    failed = 0
    for name in chosen.only or READERS:
        if chosen.atheris:
            by_coverage(name)
        given, could = by_chance(name, chosen.seconds, chosen.seed)
        failed += could < 0
        print(f"{name:12} {given:8,} files, {max(could, 0):8,} could be read", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
