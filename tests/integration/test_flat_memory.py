"""The memory of a run: nothing is kept from step to step, and computing activations again changes nothing else."""

import gc
import signal
import weakref

import pytest
from conftest import TINY, metrics, same_state
from test_all_methods import OPTIONS
from test_resume import signal_after

from data2vec_vision import methods, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.live_bytes import LiveBytes
from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.plan import prepare


@pytest.mark.parametrize("name", methods.names())
def test_memory_stays_flat(cli, images, name, monkeypatch):
    """The bytes of all tensors are the same after every later step, whatever a step has in hand then."""
    alive, add = {}, train.Window.add

    def note(self, step):
        add(self, step)
        gc.collect()
        alive[step.number] = live.now

    monkeypatch.setattr(train.Window, "add", note)
    arguments = ["--method", name, *OPTIONS[name], "--epochs", 4, "--log-every", 1]
    with LiveBytes() as live:
        code, _, err = cli("train", images, *TINY, *arguments, "--checkpoint-out-dir", "a")
    assert code == 0, err
    assert len(alive) == 24 and alive[20] == alive[10] > 10_000, alive
    assert max(alive[step] for step in range(18, 24)) <= max(alive[step] for step in range(6, 12)), alive


def test_views_and_predictions_are_gone_when_they_are_used(cli, images, monkeypatch):
    """The views before the backward pass, the predictions before the next forward pass."""
    views_alive, predictions_alive, predictions = [], [], []
    training_step, add = Data2Vec.training_step, train.Window.add

    def noted(self, views, masks):
        out, view = training_step(self, views, masks), weakref.ref(views[0])
        out.loss.register_hook(lambda gradient: views_alive.append(view() is not None))
        predictions.append(weakref.ref(out.extras["prediction"]))
        return out

    def note(self, step):
        add(self, step)
        predictions_alive.append(predictions[-1]() is not None)

    monkeypatch.setattr(Data2Vec, "training_step", noted)
    monkeypatch.setattr(train.Window, "add", note)
    assert cli("train", images, *TINY, "--epochs", 1)[0] == 0
    assert views_alive == predictions_alive == [False] * 6


@pytest.mark.parametrize("name", methods.names())
def test_a_run_that_computes_again_is_the_same_run(cli, images, name):
    """Bit for bit, with dropout, and a resumed run may begin with it or leave off."""
    options = [images, *TINY, "--epochs", 2, "--method", name, *OPTIONS[name], "--dropout", 0.1]
    assert cli("train", *options, "--checkpoint-out-dir", "whole")[0] == 0
    with signal_after(7, signal.SIGTERM):
        assert cli("train", *options, "--grad-checkpointing", "--checkpoint-out-dir", "b")[0] == 143
    code, _, err = cli("train", "--resume-checkpoint", "b/checkpoint_last.pt", "--no-grad-checkpointing")
    assert code == 0, err
    assert same_state("whole/checkpoint_1.pt", "b/checkpoint_1.pt")
    assert [line["loss"] for line in metrics("b")] == [line["loss"] for line in metrics("whole")]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_option_reaches_encoder_and_decoder(images, recompute):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_dim": 32, "n_encoders": 1, "n_heads": 2}
    job = prepare(TrainConfig(str(images), method="mae", grad_checkpointing=recompute, device="cpu", **sizes))
    assert job.method.student.vit.grad_checkpointing is job.method.decoder.grad_checkpointing is recompute
