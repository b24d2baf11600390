"""Which checkpoint `--resume-checkpoint auto` takes, and that all processes see it."""

import shutil
from pathlib import Path

import pytest
import torch

from data2vec_vision import checkpoint, contents, resume
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError


def write(name, step):
    """A training checkpoint as far as it is looked into here."""
    encoder = {"encoder": {}, "state_dict": {}, "mask_token": None, "transform": {}, "pool": "mean"}
    empty = {part: {} for part in ("config", "optimizer", "scaler", "environment")}
    content = {"format": contents.TRAINING, "version": contents.VERSION, "method": "mae", "step": step, "skipped": 0,
               "segments": ((0, 100),), "window": {"in_a_row": 0.0, "used": 0.0, "sums": {}}, "n_images": 9,
               "fingerprint": "", "encoders": {"student": encoder}, **empty}  # fmt: skip
    checkpoint.save(name, content | {"method_state": {"weight": torch.full((1000,), 0.1234567)}})
    return Path(name)


def spoil(path):
    """Change one bit of the weights, which a file that is torn elsewhere would not show."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(0.1234567).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)


def test_the_most_steps_count_and_not_names_or_times():
    assert resume.newest(Path("nowhere")) == (None, 0)
    assert resume.newest(Path()) == (None, 0)
    write("checkpoint_10.pt", 60)
    write("checkpoint_2.pt", 18)
    write("checkpoint_last.pt", 12)  # copied back from somewhere, perhaps
    for other in ("checkpoint_best.pt", "student_99.pt", ".checkpoint_last.pt.1.tmp"):
        write(other, 99)
    assert resume.newest(Path()) == (Path("checkpoint_10.pt"), 60)
    write("checkpoint_last.pt", 60)
    assert resume.newest(Path()) == (Path("checkpoint_last.pt"), 60)


def test_damaged_files_are_passed_over_with_a_line_each(capsys):
    write("checkpoint_1.pt", 12)
    torn = write("checkpoint_2.pt", 18)
    torn.write_bytes(torn.read_bytes()[:-100])
    spoil(write("checkpoint_3.pt", 24))
    Path("checkpoint_4.pt").write_bytes(b"")
    write("checkpoint_5.pt", "many")
    Path("checkpoint_6.pt").mkdir()
    shutil.copy("checkpoint_1.pt", "checkpoint_last.pt")
    assert resume.newest(Path()) == (Path("checkpoint_last.pt"), 12)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("note: passed over: checkpoint_") for line in lines)
    assert sorted(line[len("note: passed over: checkpoint_")] for line in lines) == list("23456")
    assert not list(Path().glob("*.damaged"))


def test_where_none_can_be_read_nothing_is_replaced(monkeypatch):
    """They may be of a newer version, or on a disk that does not answer now."""
    spoil(write("checkpoint_last.pt", 24))
    with monkeypatch.context() as newer:
        newer.setattr(contents, "VERSION", 2)
        write("checkpoint_3.pt", 24)
    before = {path: path.read_bytes() for path in Path().glob("*.*") if path.is_file()}
    with pytest.raises(InputError, match="none of the checkpoints in . can be read: .*move them away") as refused:
        resume.newest(Path())
    assert "newer version" in str(refused.value) and "checksum" in str(refused.value)
    assert {path: path.read_bytes() for path in Path().glob("*.*") if path.is_file()} == before


def test_a_folder_must_follow_from_what_is_given():
    with pytest.raises(InputError, match="give INPUT_PATH or --checkpoint-out-dir"):
        resume.found(TrainConfig(resume_checkpoint="auto"), {})
