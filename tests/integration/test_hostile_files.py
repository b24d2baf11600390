"""Files made to do harm: code in pickles, sizes beyond any memory, names that are programs. One line, and nothing else.

Every command that reads weights is given every file; the address space of this process is bounded meanwhile, so that
a command that asked for the memory that a file claims would fail.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import data2vec_vision as d2v
from data2vec_vision.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "files_of_0.1.0"
ROOM = 4 * 2**30  # bytes of address space that a command may take beyond what this process has


class Bomb:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.system, (f"touch {os.getcwd()}/exploded",)


def changed(name, **changes):
    """The golden file with parts of it replaced; "a.b" is the part b of a."""
    content = torch.load(GOLDEN / name, weights_only=True)
    for where, value in changes.items():
        *path, last = where.split("__")
        part = content
        for key in path:
            part = part[key]
        part[last] = value
    return content


def student(**changes):
    return lambda file: torch.save(changed("student_1.pt", **changes), file)


def training(**changes):
    return lambda file: torch.save(changed("checkpoint_0.pt", **changes), file)


def deflated(file):
    """A small zip whose parts become 8 GB, were they unpacked."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(GOLDEN / "student_1.pt") as whole:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
        with bomb.open("archive/data/99", "w", force_zip64=True) as part:
            for _ in range(8):
                part.write(bytes(2**24))


def lying(number, instead):
    """The golden student with a number in its pickle replaced: how many values a storage has."""

    def write(file):
        with zipfile.ZipFile(file, "w") as copy, zipfile.ZipFile(GOLDEN / "student_1.pt") as whole:
            for entry in whole.infolist():
                data = whole.read(entry)
                if entry.filename.endswith("data.pkl"):
                    assert number in data
                    data = data.replace(number, instead)
                copy.writestr(entry.filename, data)

    return write


def flipped(file):
    """A bit of a weight is not as it was written; torch.load does not notice."""
    data = bytearray((GOLDEN / "student_1.pt").read_bytes())
    weights = torch.load(GOLDEN / "student_1.pt", weights_only=True)["state_dict"]["blocks.0.mlp.fc1.weight"]
    data[data.index(weights.numpy().tobytes()) + 5] ^= 1
    file.write(data)


def legacy(file):
    """The format before zip, of a storage of 16 GB in a file of some bytes."""
    torch.save({"norm.weight": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    data = file.read().replace(b"M\xe8\x03", b"J" + struct.pack("<i", 2_000_000_000))
    file.seek(0)
    file.write(data)


def raw_pickle(depth):
    """Lists in one another: what walks them by recursion falls over."""
    return lambda file: file.write(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")


def laughs():
    """A thousand billion elements by ten lists that hold one another ten times."""
    part = ["ha"]
    for _ in range(12):
        part = [part] * 10
    return part


LAUGHS = laughs()
STUDENTS = {  # name: what writes it, what the line says
    "code": (lambda f: torch.save(changed("student_1.pt", config=Bomb()), f), "would run code when loaded"),
    "code without zip": (lambda f: pickle.dump(Bomb(), f), "would run code when loaded"),
    "a numpy array": (lambda f: pickle.dump(np.zeros(3), f), "would run code when loaded"),
    "lists in lists": (raw_pickle(100_000), "cannot be read|is not a file of weights|holds no checkpoint"),
    "laughs": (student(encoder=LAUGHS), "its encoder is a list"),
    "laughs for a name": (student(version=LAUGHS), "its version is a list"),
    "a part that is inflated": (deflated, "and would become .* in memory"),
    "a storage that is not there": (lying(b"M\x00\x03", b"J\x00\x00\x00\x70"), "record size"),
    "a storage of 16 GB without zip": (legacy, "wrong byte size|no file of this tool|cannot be read"),
    "strides of 0": (
        student(**{"state_dict__norm.weight": torch.zeros(1).expand(10**6, 10**6)}),
        "a tensor of the shape .1000000, 1000000. has only 4 bytes",
    ),
    "sparse": (
        student(mask_token=torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**9, 10**9))),
        "no plain tensor",
    ),
    "no memory": (student(mask_token=torch.empty(10**6, 10**6, device="meta")), "no plain tensor"),
    "a flipped bit": (flipped, "the checksum of .* differs"),
    "blocks": (student(encoder__arguments__depth=10**6), "it has 1000000 blocks, of"),
    "width": (student(encoder__arguments__embed_dim=10**6), "should be|cannot build"),
    "image size": (student(encoder__arguments__img_size=[10**9, 10**9]), "should be|cannot build|cut into patches"),
    "registers": (student(encoder__arguments__reg_tokens=10**12), "should be|does not belong|missing"),
    "depth of 400 digits": (student(encoder__arguments__depth=10**400), "blocks|damaged"),
    "depth as a text": (student(encoder__arguments__depth="many"), "do not fit|damaged"),
    "an argument that reads a file": (student(encoder__arguments__checkpoint_path="x.pt"), "by checkpoint_path"),
    "an argument that goes to the network": (student(encoder__arguments__pretrained=True), "by pretrained"),
    "another model": (student(encoder__model="vit_giant_patch14_224"), "do not fit|damaged"),
    "a model that is none": (student(encoder__model="hf-hub:somebody/something"), "no model named"),
    "a model that is a number": (student(encoder__model=7), "damaged"),
    "images of another size": (student(transform__image_size=[10**9, 10**9]), "and the encoder takes"),
    "a mean of texts": (student(transform__mean=["a", "b", "c"]), "damaged"),
    "a deviation of nan": (student(transform__std=[float("nan")] * 3), "not those of its channels"),
    "a deviation of 0": (student(transform__std=[0.0] * 3), "deviation is 0"),
    "no pool": (student(pool="nothing"), "damaged"),
    "weights that are a list": (student(state_dict=[1, 2]), "its state_dict is a list"),
    "weights that are texts": (student(**{"state_dict__norm.weight": "x"}), "no tensors"),
    "weights of other types": (student(**{"state_dict__norm.weight": torch.zeros(16, dtype=torch.bool)}), None),
    "a mask token of another shape": (student(mask_token=torch.zeros(7)), "do not fit"),
    "a version to come": (student(version=2), "written by a newer version of this tool .format 2.; update it"),
    "a version of 400 digits": (student(version=10**400), "newer version"),
    "a method that is a number": (student(method=3), "its method is a int"),
    "a format that is a list": (student(format=[]), "no file of this tool"),
}  # fmt: skip


def write(path, writer):
    with open(path, "w+b") as file:
        writer(file)
    return path


@pytest.fixture
def three_images(tmp_path):
    for n in range(4):
        (tmp_path / "images" / f"class{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * n, 0, 0)).save(tmp_path / "images" / f"class{n % 2}" / f"{n}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("name", STUDENTS)
def test_a_hostile_student_is_one_line(refused, tmp_path, three_images, bounded_memory, name):
    writer, message = STUDENTS[name]
    path = write(tmp_path / "student.pt", writer)
    if message is None:  # harmless: other numbers are converted
        return d2v.load(path)
    with pytest.raises(InputError, match=message) as caught:
        d2v.Data2Vec.from_pretrained(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    said = refused("export", path, "--format", "timm", "--output", tmp_path / "out")
    assert re.search(message, said) and len(said) < 600
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["code", "a part that is inflated", "strides of 0", "blocks"])
def test_every_command_refuses_them_in_the_same_line(refused, tmp_path, three_images, bounded_memory, name):
    writer, message = STUDENTS[name]
    path = write(tmp_path / "student.pt", writer)
    for arguments in (
        ("extract", path, three_images, "--output", tmp_path / "f.npz"),
        ("evaluate", path, three_images),
        ("train", "--resume-checkpoint", path),
        ("train", three_images, *TINY, "--init", path),
    ):
        said = refused(*arguments)
        # Weights alone count for --init, and for a run to go on it has to be one.
        assert re.search(f"{message}|cannot continue a run|another size|lacks", said), said
    assert not (tmp_path / "exploded").exists()


BIG = 10**400
CHECKPOINTS = {
    "code": (training(window=Bomb()), "would run code when loaded"),
    "width": (training(config__hidden_dim=16_384, config__n_heads=2), "of another shape"),
    "width beyond all": (training(config__hidden_dim=10**6), "must be at most 65,536"),
    "blocks": (training(config__n_encoders=1000), "of another shape"),
    "blocks beyond all": (training(config__n_encoders=10**6), "must be at most 1,000"),
    "image size": (training(config__image_size=10**9), "must be at most 65,536"),
    "image size that is allowed": (training(config__image_size=65_536), "of another shape"),
    "epochs of 400 digits": (training(config__epochs=BIG), "must be less than 1e"),
    "rate that is not a number": (training(config__max_lr=float("nan")), "must be a finite number"),
    "laughs": (training(config__epochs=LAUGHS), "epochs must be of type int"),
    "settings that are unknown": (training(config={7: 8}), "unknown setting 7"),
    "nothing but defaults": (training(config={}), "its config lacks image_size"),
    "segments": (training(segments=((0, 0),)), "its segments are"),
    "segments of texts": (training(segments="ab"), "its segments is a str"),
    "step": (training(step=-1), "its step is -1"),
    "window": (training(window={"in_a_row": "x"}), "its window is"),
    "no student": (training(encoders={}), "lacks the student"),
    "a student that is none": (training(encoders={"student": 3}), "the student lacks|student"),
    "weights of another shape": (training(**{"method_state__student.vit.norm.weight": torch.zeros(3)}), "another shape"),
    "weights that are texts": (training(**{"method_state__student.vit.norm.weight": "x"}), "another shape|damaged"),
    "moments of another shape": (training(optimizer__state={0: {"exp_avg": torch.zeros(7)}}), "its optimizer"),
    "an optimizer that is none": (training(optimizer={"a": 1}), "its optimizer"),
    "a version to come": (training(version=2), "newer version"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_does_not_resume(cli, tmp_path, bounded_memory, monkeypatch, name):
    writer, message = CHECKPOINTS[name]
    (tmp_path / "images").mkdir()
    for n in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{n}.png")
    (tmp_path / "run").mkdir()
    path = write(tmp_path / "run" / "checkpoint_0.pt", writer)
    code, _, err = cli("train", "--resume-checkpoint", path, tmp_path / "images")
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]) and len(lines[0]) < 600, err
    assert not (tmp_path / "exploded").exists()
    with contextlib.suppress(InputError):  # it takes the sizes from the weights
        d2v.load_method(path)


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda file: file.write(struct.pack("<Q", len(text)) + text + data)


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("header, data", [
    ({"a": TENSOR}, b""),
    ({"a": TENSOR | {"shape": [2**40, 2**40]}}, bytes(16)),
    ({"a": TENSOR | {"data_offsets": [0, 2**62]}}, bytes(16)),
    ({"a": TENSOR | {"data_offsets": [16, 0]}}, bytes(16)),
    ({"a": TENSOR, "b": TENSOR}, bytes(16)),
    ({"a": TENSOR | {"dtype": "PICKLE"}}, bytes(16)),
    (b"{" * 100_000, b""),
    (b"\xff\xfe" * 50, b""),
    ({}, b""),
    ({"a": TENSOR}, bytes(16)),
])  # fmt: skip
def test_headers_of_safetensors_that_lie(refused, tmp_path, three_images, bounded_memory, header, data):
    path = write(tmp_path / "a.safetensors", safetensors(header, data))
    assert re.search("cannot be read as safetensors|lacks", refused("train", three_images, *TINY, "--init", path))
    path.write_bytes(struct.pack("<Q", 2**63))
    assert "cannot be read as safetensors" in refused("train", three_images, *TINY, "--init", path)


def test_weights_that_are_not_finite_are_said(refused, tmp_path, three_images):
    broken = {"state_dict__norm.weight": torch.full((16,), float("nan"))}
    path = write(tmp_path / "student.pt", student(**broken))
    with pytest.warns(UserWarning, match="norm.weight has values that are not finite"):
        d2v.load(path)
    with pytest.warns(UserWarning, match="norm.weight has values that are not finite"):
        d2v.Data2Vec.from_pretrained(path)
    sizes = ["--image-size", "8", "--patch-size", "4", "--hidden-dim", "16", "--n-heads", "2", "--n-encoders", "1"]
    said = refused("train", three_images, *sizes, "--batch-size", "2", "--init", path)
    assert "norm.weight has values that are not finite; give an earlier file" in said


def test_to_judge_weights_runs_no_method_that_they_name(cli, tmp_path, three_images):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    path = write(tmp_path / "student.pt", student(method=str(tmp_path / "mine.py"), config={}))
    code, out, err = cli("evaluate", path, three_images, "--k", 1, "--test-pct", 0.5)
    assert not (tmp_path / "exploded").exists()
    assert code == 0 and "is no part of this package" in " ".join(out.split()), err


@pytest.mark.parametrize("text, message", [
    ("[" * 200_000, "cannot be read as JSON"),
    ('{"epochs": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
    ('{"epochs": 1' + "0" * 400 + "}", "must be less than 1e"),
    ('{"max_lr": NaN}', "must be a finite number"),
    ('{"max_lr": 1e999}', "must be a finite number"),
    ('{"max_lr": -Infinity}', "must be a finite number"),
    ('{"max_lr": 1' + "0" * 400 + "}", "max_lr must be of type float"),
    ('{"epochs": 1, "epochs": 2}', "'epochs' comes twice"),
    ('{"hidden_dim": 65536, "n_encoders": 1000, "n_heads": 1}', "GB, and this machine has"),
    ('{"image_size": 65536, "patch_size": 1}', "GB, and this machine has"),
    (json.dumps({"set": ["a=1"] * 100_000}), "no knob 'a'"),
    (json.dumps({"seed": "x" * 10**7}), "seed must be of type int"),
    (json.dumps({"x" * 10**6: 1}), "unknown setting"),
])  # fmt: skip
def test_a_hostile_configuration_is_one_line(refused, tmp_path, three_images, bounded_memory, text, message):
    (tmp_path / "config.json").write_text(text)
    said = refused("train", three_images, "--config", tmp_path / "config.json")
    assert re.search(message, said) and len(said) < 600


def test_devices_and_pipes_are_not_read(refused, tmp_path, three_images):
    os.mkfifo(tmp_path / "pipe.txt")
    for arguments in (
        ("train", three_images, "--config", "/dev/zero"),
        ("train", three_images, *TINY, "--init", tmp_path / "pipe.txt"),
        ("train", "--resume-checkpoint", "/dev/zero"),
        ("train", tmp_path / "pipe.txt"),
        ("extract", "/dev/zero", three_images, "--output", "f.npz"),
        ("evaluate", GOLDEN / "student_1.pt", three_images, "--labels", tmp_path / "pipe.txt"),
    ):
        assert re.search("device or a pipe|folder, a device|there is no file", refused(*arguments))


def test_long_lines_of_lists_and_labels_are_one_line(refused, tmp_path, three_images, bounded_memory):
    with open(tmp_path / "list.txt", "wb") as file:
        for _ in range(100):
            file.write(b"x" * 10**6)
    assert "line 1 has 65,536 bytes or more" in refused("train", tmp_path / "list.txt")
    shutil.copy(tmp_path / "list.txt", tmp_path / "list.csv")
    for arguments in (
        ("train", tmp_path / "list.csv"),
        ("evaluate", GOLDEN / "student_1.pt", three_images, "--labels", tmp_path / "list.csv"),
    ):
        said = refused(*arguments)
        assert "cannot be read as csv" in said and len(said) < 600


NAMED = "<script>document.title='run'</script>&<img src=x onerror=document.title='run'>"


def test_names_are_no_programs_in_the_report(cli, tmp_path):
    """Names of images, of bad files, of folders and figures, as a browser has read them."""
    run = tmp_path / NAMED.replace("/", "_")
    run.mkdir()
    config = torch.load(GOLDEN / "checkpoint_0.pt", weights_only=True)["config"] | {"input_path": NAMED}
    (run / "config.json").write_text(json.dumps(config))
    words = {"verdict": NAMED, "level": NAMED, "headline": NAMED, "text": NAMED}
    lines = [{"step": n, "steps": 4, "epoch": 0, "loss": 1 / n, NAMED: n, **words} for n in (1, 2, 3, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "[" * 10**5 + "\n")
    (run / "bad_files.txt").write_text(f"{NAMED}.jpg\t{NAMED}\n")
    for n, text in enumerate(("[" * 10**5, '{"results": [[]]}', '{"results": {"a": {"few_shot": {"x": 1}}}}')):
        (run / f"student_{n}.evaluation.json").write_text(text)
    code, _, err = cli("report", run)
    assert code == 0, err
    page = (run / "report.html").read_text()
    assert NAMED not in page and "&lt;script&gt;document.title" in page
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    shutil.copy(run / "report.html", tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    dom = subprocess.run(
        [browser, *options, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    ).stdout
    assert "</html>" in dom
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]
    assert title != "run" and "onerror=document" not in re.sub(r"&lt;.*?&gt;", "", dom)
