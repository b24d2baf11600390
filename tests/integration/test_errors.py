"""Bad input ends with exit code 2 and one line that says what is wrong and what to do; bad images do not."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics, same_state, start

from data2vec_vision.__main__ import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask-erase-pct", 60], "use 0.6 for 60 %"),
        (["--mask-erase-pct", 0], "--mask-erase-pct must be between 0 and 1, both excluded"),
        (["--mask-erase-pct", 1], "--mask-erase-pct must be between 0 and 1, both excluded"),
        (["--image-size", 30], "--image-size 30 is not divisible by --patch-size 4; use --image-size 32"),
        (["--k", 5], "--k 5 is more than the 2 blocks of the encoder; use --k 2"),
        (["--n-heads", 5], "--n-heads 5 does not divide --hidden-dim 32"),
        (["--model", "vit_tiny_patch16_224"], "has sizes of its own; leave out --patch-size and --hidden-dim"),
        (["--epochs", 0], "--epochs must be at least 1"),
        (["--max-lr", "inf"], "--max-lr must be a finite number, got inf"),
        (["--max-lr", "nan"], "--max-lr must be a finite number, got nan"),
        (["--epochs", "many"], "'many' is not a valid integer"),
        (["--epoch", 3], "--epochs"),
        (["--method", "data3vec"], "there is no method 'data3vec'; did you mean data2vec?"),
        (["--method", "none.py"], "there is no such file"),
        (["--set", "crop=0.5"], "has no knob 'crop'; did you mean crop_min"),
        (["--set", "mask_ratio=0.5"], "has an option of its own, --mask-erase-pct"),
        (["--device", "cuda:9"], "there is no device 'cuda:9' here; there is cpu"),
        (["--init", "none.pt"], "there is no file none.pt"),
        (["--config", "none.json"], "cannot be read as JSON"),
        (["--resume-checkpoint", "none.pt"], "there is no file none.pt"),
        (["--precision", "int8"], "'int8' is not one of"),
    ],
)
def test_options_out_of_range(refused, images, options, message):
    assert message in refused("train", images, *TINY, *options)
    assert not Path("runs").exists()


def test_a_mistyped_model_gets_the_nearest_names(refused, images):
    line = refused("train", images, "--model", "vit_smal_patch16_224")
    assert "did you mean vit_small_patch16_224" in line
    assert "resnet18" not in line
    assert "Invalid pretrained tag" in refused("train", images, "--model", "vit_tiny_patch16_224.nonsense")
    assert "ResNet is not a plain timm VisionTransformer" in refused("train", images, "--model", "resnet18")


def test_input_paths(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "a.png").write_text("x")
    for path, message in (("empty", "it is empty"), ("texts", "none is an image"), ("a.png", "is a file, not a folder"),
                          ("nowhere", "there is no folder nowhere")):  # fmt: skip
        assert message in refused("train", path, *TINY)
    assert "say which images" in refused("train")


def test_an_output_folder_that_cannot_be_written(refused, images, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("train", images, *TINY, "--checkpoint-out-dir", "file")
    assert "cannot make file/run: Not a directory" in refused(
        "train", images, *TINY, "--checkpoint-out-dir", "file/run"
    )
    assert "cannot make /proc/run" in refused("train", images, *TINY, "--checkpoint-out-dir", "/proc/run")


def test_an_output_folder_among_the_images(refused, images):
    """Its pictures would be images of the next run."""
    line = refused("train", images, *TINY, "--checkpoint-out-dir", images / "runs" / "a")
    assert "inside the folder of the images; give a --checkpoint-out-dir outside" in line
    assert not (images / "runs").exists()


def test_a_folder_that_holds_a_run_is_refused_with_the_two_commands_that_help(cli, refused, images):
    cli("train", images, *TINY, "--epochs", 1)
    before = Path("runs/images-data2vec/student_0.pt").read_bytes()
    line = refused("train", images, *TINY, "--epochs", 1)
    assert "train --resume-checkpoint runs/images-data2vec/checkpoint_" in line
    assert "train ... --checkpoint-out-dir runs/images-data2vec-2" in line
    assert Path("runs/images-data2vec/student_0.pt").read_bytes() == before


def test_two_runs_do_not_share_a_folder(cli, images):
    """And a lock goes with its process, however that ends."""
    holder = start("train", images, *TINY, "--epochs", 5000, "--save-every", 5000, "--checkpoint-out-dir", "shared")
    try:
        from test_train import wait_for_steps

        wait_for_steps("shared", 1, holder)
        other = start("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "shared")
        out, _ = other.communicate(timeout=180)
        assert other.returncode == 2 and "another process is training in shared" in out
    finally:
        holder.kill()
        holder.communicate()
    assert Path("shared/.lock").exists()
    code, _, err = cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "shared")
    assert code == 0, err


def test_a_checkpoint_that_would_run_code_is_not_run(refused, images, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"format": Bomb()}, "bomb.pt")
    Path("plain.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for path in ("bomb.pt", "plain.pkl"):
        assert "it was not loaded" in refused("train", images, *TINY, "--resume-checkpoint", path)
        assert "it was not loaded" in refused("train", images, *TINY, "--init", path)
        assert "it was not loaded" in refused("extract", path, images, "--output", "f.npz")
    assert not Path("exploded").exists()


def test_unreadable_images_do_not_end_a_run(cli, images):
    bad = sorted(images.rglob("*.*"))[3:5]
    for path in bad:
        path.write_text("no image")
    code, out, err = cli("train", images, *TINY, "--epochs", 3, "--checkpoint-out-dir", "a")
    assert code == 0 and "2 images could not be read; a/bad_files.txt lists what" in out, err
    assert metrics("a")[-1]["bad_files"] == 2 and "bad files 2" in err
    listed = Path("a/bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [str(p.relative_to(images)) for p in bad]
    assert all("cannot identify image file" in line for line in listed)
    cli("train", images, *TINY, "--epochs", 3, "--checkpoint-out-dir", "b", "--workers", 2)
    assert same_state("a/checkpoint_2.pt", "b/checkpoint_2.pt")


def test_a_run_fails_when_more_than_a_tenth_of_the_images_is_unreadable(cli, images):
    for path in sorted(images.rglob("*.*"))[:3]:
        path.write_text("no image")
    code, _, err = cli("train", images, *TINY, "--epochs", 3)
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("Error: 3 of 24 images cannot be read, more than 10%") and "bad_files.txt" in line


def test_after_too_many_bad_files_mending_or_removing_them_helps(cli, images):
    paths = sorted(images.rglob("*.*"))
    kept = [path.read_bytes() for path in paths[:4]]
    for path in paths[:4]:
        path.write_text("no image")
    assert cli("train", images, *TINY, "--epochs", 3, "--checkpoint-out-dir", "a")[0] == 1
    for path, content in zip(paths[:3], kept):
        path.write_bytes(content)
    code, out, err = cli("train", images, *TINY, "--epochs", 3, "--checkpoint-out-dir", "a")
    assert code == 0 and "1 image could not be read" in out, err
    assert len(Path("a/bad_files.txt").read_text().splitlines()) == 1


def test_printed_commands_are_quoted_for_the_shell(cli, refused, images):
    shutil.move(images, "my photos")
    code, out, _ = cli("train", "my photos", *TINY, "--epochs", 1)
    assert code == 0
    assert "extract 'runs/my photos-data2vec/student_0.pt' 'my photos' --output features.npz" in out
    assert "--resume-checkpoint 'runs/my photos-data2vec/checkpoint_" in refused("train", "my photos", *TINY)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_earlier_files(cli, images, monkeypatch):
    from data2vec_vision import checkpoint

    original = checkpoint.save

    def save(path, content):
        if "checkpoint" in str(path) and content["step"] > 6:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(checkpoint, "save", save)
    code, _, err = cli("train", images, *TINY, "--epochs", 3, "--save-every", 1)
    assert code == 1
    line = err.splitlines()[-1]
    assert "No space left on device" in line and "--resume-checkpoint runs/images-data2vec/checkpoint_last.pt" in line
    assert torch.load("runs/images-data2vec/checkpoint_last.pt", weights_only=True)["step"] == 6
    monkeypatch.undo()


def test_a_method_in_a_file_of_its_own_has_knobs_and_works_in_workers(cli, refused, images, tmp_path):
    """With postponed annotations, and under spawn, where a worker imports the file by its name."""
    (tmp_path / "quiet_method.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from data2vec_vision import Data2Vec as Base, knob\n"
        "from data2vec_vision.transforms import Views, augmentation\n"
        "class MyViews(Views):\n"
        "    pass\n"
        "class Quiet(Base):\n"
        '    """data2vec without augmentation."""\n'
        "    @dataclass(frozen=True)\n"
        "    class Config(Base.Config):\n"
        "        loudness: float = knob(0.5, 'of nothing', '[0, 1]')\n"
        "    def views(self):\n"
        "        return MyViews(augmentation((16, 16), (1.0, 1.0), 0.0, 0.0))\n"
    )
    options = ["--method", "quiet_method.py", "--epochs", 1]
    code, out, err = cli("train", images, *TINY, *options, "--set", "loudness=0.7", "--checkpoint-out-dir", "a")
    assert code == 0 and "quiet_method.py: 1 view an image" in out, err
    script = (
        "import multiprocessing, sys\n"
        "from data2vec_vision.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "spawned.py").write_text(script)
    arguments = ["train", images, *TINY, *options, "--workers", 1, "--checkpoint-out-dir", "b"]
    run = subprocess.run([sys.executable, "spawned.py", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (tmp_path / "my.method.py").write_text("x = 1\n")
    assert "'my.method' cannot be the name of a module" in refused("train", images, *TINY, "--method", "my.method.py")
    (tmp_path / "json.py").write_text("x = 1\n")
    assert "there is a module named 'json' already; rename the file" in refused(
        "train", images, *TINY, "--method", "json.py"
    )


def test_an_error_nobody_foresaw_is_one_line_too_and_its_traceback_is_kept(cli, images, tmp_path):
    (tmp_path / "failing.py").write_text(
        "from data2vec_vision.methods.data2vec import Data2Vec\n"
        "class Failing(Data2Vec):\n"
        '    """Fails."""\n'
        "    def training_step(self, views, masks):\n"
        "        raise KeyError('what is this')\n"
    )
    code, _, err = cli("train", images, *TINY, "--method", "failing.py", "--checkpoint-out-dir", "a")
    assert code == 1 and err.startswith("Error: KeyError: 'what is this'") and "Traceback" not in err
    assert "training_step" in Path("a/error.txt").read_text()
    code, _, err = cli("train", images, *TINY, "--method", "failing.py", "--checkpoint-out-dir", "b", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("Error: KeyError")


def test_help_does_not_wait_for_torch():
    code = "import sys; from data2vec_vision.__main__ import main; main(['train', '--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Usage: python -m data2vec_vision train" in out and out.splitlines()[-1] == "False"


def test_the_commands_that_list_and_explain(cli):
    assert "data2vec" in cli("methods")[1]
    text = cli("methods", "data2vec")[1]
    assert "--mask-erase-pct" in text and "--set target_norm=VALUE" in text and "the paper's layer" in text
    assert "vit_small_patch16_224" in cli("models", "vit_small*")[1].splitlines()
    assert cli("models", "zzz*")[0] == 2
    code, out, _ = cli("sample", "samples")
    assert code == 0 and "2,000 images of 10 classes" in out
    assert len(list(Path("samples").rglob("*.png"))) == 2000 and "MIT" in Path("samples/LICENSE").read_text()
    assert main([]) == 2


def test_files_that_go_or_shrink_while_a_run_reads_them_are_listed(cli, images):
    """Two of 24, after the first step."""
    gone, shrunk = sorted(images.rglob("*.*"))[3:5]
    Path("thief.py").write_text(
        "import os\n"
        "from data2vec_vision.methods.data2vec import Data2Vec\n"
        "class Thief(Data2Vec):\n"
        '    """Takes a file away, and half of another."""\n'
        "    def after_step(self, progress):\n"
        "        super().after_step(progress)\n"
        f"        if os.path.exists({str(gone)!r}):\n"
        f"            os.remove({str(gone)!r})\n"
        f"            os.truncate({str(shrunk)!r}, os.path.getsize({str(shrunk)!r}) // 2)\n"
    )
    code, out, err = cli("train", images, *TINY, "--epochs", 3, "--method", "thief.py", "--checkpoint-out-dir", "a")
    assert code == 0 and "2 images could not be read" in out, err
    listed = Path("a/bad_files.txt").read_text()
    assert gone.name in listed and "no such file" in listed and shrunk.name in listed and "truncated" in listed
