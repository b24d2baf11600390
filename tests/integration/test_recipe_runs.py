"""`train --recipe paper` from the command line: a look at each method's, a run, its continuation, a method without."""

import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics, same_state
from test_resume import signal_after, untimed

from data2vec_vision import methods
from data2vec_vision.config import TrainConfig
from data2vec_vision.methods.data2vec2 import Data2Vec2
from data2vec_vision.train import train

# So that a step takes milliseconds; all that is not typed here is the paper's.
SMALL = {
    "data2vec": ["--k", 2],
    "data2vec2": ["--k", 2, "--set", "decoder_dim=32"],
    "ijepa": ["--image-size", 32, "--set", "predictor_dim=32"],
    "mae": ["--set", "decoder_dim=32", "--set", "decoder_heads=2"],
    "msn": ["--set", "n_prototypes=16"],
    "swav": ["--set", "n_prototypes=16"],
}


def test_the_table_is_of_all_methods():
    assert sorted(SMALL) == methods.names()


@pytest.mark.parametrize("name", SMALL)
def test_a_dry_run_names_the_paper_and_takes_steps(cli, images, name):
    code, out, err = cli(
        "train", images, *TINY, "--method", name, "--recipe", "paper", "--grad-accum", 1, *SMALL[name], "--dry-run"
    )
    paper = methods.find(name).paper
    assert code == 0 and f"Recipe   paper: {paper.source}\n" in out, err
    assert f"{paper.options['epochs']:,} epochs of 6 steps" in out and "Nothing was trained." in out


def test_a_run_with_it_continues_exactly_and_does_not_ask_for_the_recipe_again(cli, images, monkeypatch):
    run = ["train", images, *TINY, "--method", "data2vec2", "--recipe", "paper", "--grad-accum", 1, *SMALL["data2vec2"],
           "--set", "n_masks=2", "--epochs", 4]  # fmt: skip
    assert cli(*run, "--checkpoint-out-dir", "whole")[0] == 0
    with signal_after(9, signal.SIGTERM):
        assert cli(*run, "--checkpoint-out-dir", "stopped")[0] == 143
    stored = torch.load("stopped/checkpoint_last.pt", weights_only=True)
    assert stored["config"]["max_lr"] == 1e-3 and "mask_adjust=0.07" in stored["config"]["set"]
    assert [group["betas"] for group in stored["optimizer"]["param_groups"]] == [(0.9, 0.95)] * 2
    monkeypatch.setattr(Data2Vec2, "paper", None)
    code, _, err = cli("train", "--resume-checkpoint", "stopped/checkpoint_last.pt", "--recipe", "paper")
    assert code == 0, err
    assert same_state("whole/checkpoint_3.pt", "stopped/checkpoint_3.pt")
    assert untimed(metrics("stopped")) == untimed(metrics("whole"))


def test_a_library_call_takes_it_too(images):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_heads": 2, "n_encoders": 2}
    train(TrainConfig(input_path=str(images), **sizes, method="mae", recipe="paper", epochs=1, batch_size=12, grad_accum=1,
                      set=("decoder_dim=32", "decoder_heads=2"), workers=0, no_report=True, no_tensorboard=True,
                      log_every=1, checkpoint_out_dir="run"))  # fmt: skip
    lines = metrics(
        "run"
    )  # warm-up ends at a fortieth of the run, so the first step has a 25th of the peak, the next less than it
    assert lines[0]["lr"] == pytest.approx(2.4e-3 / 25) and 0 < lines[1]["lr"] < 2.4e-3


def test_it_does_not_change_a_run_without_it(refused, cli, images):
    assert cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "run")[0] == 0
    assert cli("train", "--resume-checkpoint", "run/checkpoint_0.pt", "--epochs", 2, "--recipe", "auto")[0] == 0
    line = refused("train", "--resume-checkpoint", "run/checkpoint_last.pt", "--epochs", 3, "--recipe", "paper")
    assert "--recipe paper contradicts" in line


def test_a_method_of_ones_own_without_a_paper_is_refused(refused, images):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    Path("mean_colour.py").write_text(text.split("```python\n")[1].split("```")[0])
    line = refused("train", images, *TINY, "--method", "mean_colour.py", "--recipe", "paper")
    assert "the method mean_colour.py names no paper's recipe; leave the option out" in line
