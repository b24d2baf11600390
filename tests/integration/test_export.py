"""`export`: the last line it prints loads what it wrote, with our features; what is there is kept until that is sure."""

import dataclasses
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch import nn

import data2vec_vision as d2v
from data2vec_vision import formats
from data2vec_vision.export import staged
from data2vec_vision.formats import FORMATS

METHODS = {
    "data2vec": d2v.Data2Vec,
    "data2vec2": d2v.Data2Vec2,
    "ijepa": d2v.IJEPA,
    "mae": d2v.MAE,
    "msn": d2v.MSN,
    "swav": d2v.SwAV,
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(method="data2vec", path="student_3.pt"):
    """A student file of a method, with weights that all count."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        **METHODS[method].encoder_arguments(),
    )  # fmt: skip
    student = METHODS[method](vit).student
    for p in student.parameters():
        nn.init.normal_(p, std=0.2)
    d2v.save_encoder(student, path, method=method, epoch=3)
    return path


@pytest.fixture
def student():
    return build()


@pytest.fixture
def exported(cli, capfd):
    """exported(*arguments) -> what the last line printed has made, after an export that must succeed."""

    def run(*arguments):
        code, out, err = cli("export", *arguments)
        assert code == 0 and err == "", err
        loaded = {}
        exec(out.splitlines()[-1], loaded)
        capfd.readouterr()  # the progress bar of transformers
        return loaded

    return run


def by_hand(path, pool=None, which="student"):
    encoder = d2v.load(path, which=which)
    with torch.no_grad():
        return encoder(IMAGES).features, encoder.embed(IMAGES, pool)


def same(theirs, ours):
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-5, atol=1e-5)
    return True


@torch.no_grad()
def outputs(loaded, n_prefix):
    """Patch tokens and the embedding, where there is one, of what was loaded."""
    if "session" in loaded:
        return loaded["session"].run(None, {"images": IMAGES.numpy()})
    if "processor" in loaded:
        return [loaded["model"](IMAGES).last_hidden_state[:, n_prefix:]]
    return loaded["model"].forward_features(IMAGES)[:, n_prefix:], loaded["model"](IMAGES)


@pytest.mark.parametrize("format", ["timm", "safetensors", "huggingface"])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_line_loads_the_features_of_every_method(exported, method, format):
    path = build(method)
    loaded = exported(path, "--format", format, "--output", "out")
    assert same(outputs(loaded, 0 if method == "ijepa" else 1), by_hand(path))


def test_the_last_line_loads_onnx(exported, student):
    loaded = exported(student, "--format", "onnx", "--output", "out.onnx", "--pool", "cls")
    assert same(outputs(loaded, 1), by_hand(student, "cls"))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_gives_the_pool_asked_for(exported, student, pool):
    assert same(
        outputs(exported(student, "--format", "timm", "--output", "out", "--pool", pool), 1), by_hand(student, pool)
    )


def test_student_and_teacher_of_a_run(cli, exported, images):
    cli("train", images, *TINY, "--epochs", 1, "--tau-initial", 0.5, "--checkpoint-out-dir", "run")
    students = by_hand("run/student_0.pt"), by_hand("run/checkpoint_0.pt", which="teacher")
    assert not torch.allclose(students[0][0], students[1][0], atol=1e-4)
    for arguments, expected in (
        (["run/student_0.pt"], students[0]),
        (["run/checkpoint_0.pt"], students[0]),
        (["run/teacher_0.pt"], students[1]),
        (["run/checkpoint_0.pt", "--encoder", "teacher"], students[1]),
    ):
        assert same(outputs(exported(*arguments, "--format", "timm", "--output", "out"), 1), expected)
    about = json.loads(Path("out/config.json").read_text())["data2vec_vision"]
    assert about["method"] == "data2vec" and about["file"] == "checkpoint_0.pt" and about["encoder"] == "teacher"
    code, _, err = cli(
        "train", images, *TINY, "--epochs", 1, "--init", "out/model.safetensors", "--checkpoint-out-dir", "b"
    )
    assert code == 0, err


def test_timm_is_told_how_to_load_the_student_file_itself(cli, student):
    _, out, _ = cli("export", student, "--format", "timm", "--output", "out")
    line = next(line for line in out.splitlines() if line.startswith("the file itself, by timm: "))
    vit = eval(line.partition(": ")[2], {"timm": timm}).eval()
    assert same(outputs({"model": vit}, 1), by_hand(student))


@pytest.mark.parametrize(
    "format, name", [("timm", "ä {path} 'of\"\n mine"), ("safetensors", "it's"), ("huggingface", "{0} b")]
)
def test_any_name_is_written_so_that_python_reads_it(exported, student, format, name):
    Path("a folder").mkdir()
    assert same(outputs(exported(student, "--format", format, "--output", f"a folder/{name}"), 1), by_hand(student))
    assert [path.name for path in Path("a folder").iterdir()] == [name]


def test_an_earlier_export_is_replaced_and_nothing_else_ever(exported, refused, student):
    Path("out").mkdir()
    exported(student, "--format", "huggingface", "--output", "out")
    assert {p.name for p in Path("out").iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    exported(build("ijepa"), "--format", "timm", "--output", "out")
    assert {p.name for p in Path("out").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads(Path("out/config.json").read_text())["data2vec_vision"]["method"] == "ijepa"
    Path("out/notes.txt").write_text("precious")
    assert "holds files that are no export" in refused("export", student, "--format", "timm", "--output", "out")
    Path("out/notes.txt").unlink()
    Path("out/config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert "holds files that are no export" in refused("export", student, "--format", "timm", "--output", "out")
    assert not list(Path().glob(".*"))


def test_a_link_to_a_folder_stays_a_link(exported, student):
    Path("real").mkdir()
    Path("link").symlink_to("real")
    exported(student, "--format", "timm", "--output", "link")
    assert Path("link").is_symlink() and (Path("real") / "model.safetensors").is_file()


def test_what_does_not_give_our_features_back_is_not_kept(cli, exported, student, monkeypatch):
    exported(student, "--format", "timm", "--output", "out")
    before, original = Path("out/model.safetensors").read_bytes(), FORMATS["timm"]
    for change, message in (
        ({"outputs": lambda *a: (original.outputs(*a)[0], original.outputs(*a)[1] + 2e-2)}, "that differ by 2.0e-02"),
        ({"outputs": lambda *a: (original.outputs(*a)[0] * torch.nan, original.outputs(*a)[1])}, "that differ by nan"),
        ({"line": lambda *a: "import no_such_module"}, "cannot load the result: ModuleNotFoundError"),
    ):
        monkeypatch.setitem(FORMATS, "timm", dataclasses.replace(original, **change))
        code, _, err = cli("export", build("mae"), "--format", "timm", "--output", "out")
        assert code == 1 and message in err and err.count("\n") == 1, err
    assert Path("out/model.safetensors").read_bytes() == before and not list(Path().glob(".*"))


def test_a_file_that_onnxruntime_cannot_load_is_not_kept(cli, student, monkeypatch):
    Path("out.onnx").write_text("precious")
    rubbish = dataclasses.replace(FORMATS["onnx"], write=lambda source, path: path.write_bytes(b"rubbish"))
    monkeypatch.setitem(FORMATS, "onnx", rubbish)
    code, _, err = cli("export", student, "--format", "onnx", "--output", "out.onnx")
    assert code == 1 and "onnxruntime cannot load the result" in err and err.count("\n") == 1, err
    assert Path("out.onnx").read_text() == "precious" and not list(Path().glob(".*"))


def test_the_second_file_of_a_large_onnx_comes_along():
    """torch writes weights of more than 2 GB to a file of their own."""
    Path("out.onnx").write_text("earlier")
    with staged(Path("out.onnx").resolve()) as (written, _):
        written.write_text("graph")
        written.with_name("out.onnx.data").write_text("weights")
        assert Path("out.onnx").read_text() == "earlier"
    assert Path("out.onnx").read_text() == "graph" and Path("out.onnx.data").read_text() == "weights"
    assert not list(Path().glob(".*"))


def test_a_full_disk_leaves_the_earlier_export(cli, exported, student, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    exported(student, "--format", "timm", "--output", "out")
    before = Path("out/model.safetensors").read_bytes()
    monkeypatch.setattr(formats, "as_safetensors", fail)
    code, _, err = cli("export", build("mae"), "--format", "timm", "--output", "out")
    assert code == 1 and "No space left on device" in err and "make room" in err
    assert Path("out/model.safetensors").read_bytes() == before and not list(Path().glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_earlier_export(cli, exported, student, monkeypatch, number):
    exported(student, "--format", "timm", "--output", "out")
    original = FORMATS["timm"]

    def interrupted(source, path):
        os.kill(os.getpid(), number)
        original.write(source, path)

    monkeypatch.setitem(FORMATS, "timm", dataclasses.replace(original, write=interrupted))
    code, _, err = cli("export", build("ijepa"), "--format", "timm", "--output", "out")
    assert code == 128 + number and "nothing was written" in err
    assert json.loads(Path("out/config.json").read_text())["data2vec_vision"]["method"] == "data2vec"
    assert not list(Path().glob(".*"))


def test_without_the_library_that_loads_it(cli, refused, student, monkeypatch):
    original = importlib.util.find_spec
    missing = {"transformers", "onnxscript"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else original(name, *a))
    code, out, _ = cli("export", student, "--format", "huggingface", "--output", "out")
    assert code == 0 and "not loaded back, for transformers is not installed" in out
    assert "embeddings.cls_token" in load_file("out/model.safetensors")
    line = refused("export", student, "--format", "onnx", "--output", "out.onnx")
    assert "needs onnxscript: pip install onnx onnxscript onnxruntime" in line


def test_what_cannot_be_used_is_refused(refused, student):
    Path("other").mkdir()
    Path("other/photo.jpg").write_text("precious")
    Path("file").write_text("precious")
    Path("torn.pt").write_bytes(Path(student).read_bytes()[:5000])
    torch.save({"state_dict": {}}, "other.pt")
    spoilt = d2v.load(student)
    spoilt.vit.blocks[1].mlp.fc1.weight.data[3, 4] = torch.nan
    d2v.save_encoder(spoilt, "nan.pt", method="mae")
    registers = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, reg_tokens=1
    )
    d2v.save_encoder(d2v.MaskedVisionTransformer(registers), "registers.pt", method="mae")
    for path, format, output, options, message in (
        (student, "timm", "other", [], "holds files that are no export of this tool; give an empty or new folder"),
        (student, "timm", "file", [], "is a file, but --format timm writes a folder"),
        (student, "timm", "none/out", [], "there is no folder"),
        (student, "onnx", "out", [], "must end in .onnx"),
        ("nan.pt", "timm", "out", [], "blocks.1.mlp.fc1.weight in nan.pt has values that are not finite"),
        ("torn.pt", "timm", "out", [], "torn.pt cannot be read"),
        ("other.pt", "timm", "out", [], "other.pt is no file of this tool"),
        ("none.pt", "timm", "out", [], "there is no file none.pt"),
        ("other", "timm", "out", [], "other is a folder"),
        ("registers.pt", "huggingface", "out", [], "transformers' ViT has no register tokens; use --format timm"),
        (build("ijepa", "ijepa.pt"), "timm", "out", ["--pool", "cls"], "no class token"),
        (student, "timm", "out", ["--encoder", "teacher"], "student_3.pt holds one encoder"),
        (student, "torchscript", "out", [], "'torchscript' is not one of"),
    ):
        assert message in refused("export", path, "--format", format, "--output", output, *options)
    assert not Path("out").exists() and not list(Path().glob(".*"))
    assert Path("file").read_text() == Path("other/photo.jpg").read_text() == "precious"
