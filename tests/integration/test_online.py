"""What a run shows while it trains: kNN on labelled images, a verdict, TensorBoard, Weights & Biases. It changes no run."""

import json
import sys
import types
from pathlib import Path

import pytest
from conftest import TINY, metrics, same_state

QUIET = TINY
LOUD = [option for option in TINY if option not in ("--no-report", "--no-tensorboard")]


def readings(folder, name="feature_std"):
    return [line for line in metrics(folder) if name in line]


def test_watching_changes_nothing(cli, images):
    cli(
        "train", images, *QUIET, "--epochs", 3, "--method", "msn", "--set", "n_focal=0", "--checkpoint-out-dir", "quiet"
    )
    code, _, err = cli("train", images, *LOUD, "--epochs", 3, "--method", "msn", "--set", "n_focal=0",
                         "--checkpoint-out-dir", "loud", "--eval-path", images, "--eval-every", 1)  # fmt: skip
    assert code == 0, err
    assert same_state("quiet/checkpoint_2.pt", "loud/checkpoint_2.pt")
    assert Path("loud/report.html").exists() and not Path("quiet/report.html").exists()


def test_drawing_leaves_dropout_on(cli, images):
    """TensorBoard's pictures are made in eval mode, after epoch 0; the epochs that follow need their noise."""
    noisy = ["--epochs", 2, "--save-every", 1, "--dropout", 0.5, "--no-report", "--checkpoint-out-dir"]
    cli("train", images, *QUIET, *noisy, "quiet")
    assert cli("train", images, *LOUD, *noisy, "loud")[0] == 0
    assert same_state("quiet/checkpoint_1.pt", "loud/checkpoint_1.pt")


def test_knn_is_logged_before_training_and_every_so_many_epochs(cli, images):
    code, out, err = cli("train", images, *QUIET, "--epochs", 5, "--checkpoint-out-dir", "run", "--eval-path", images,
                         "--eval-every", 2)  # fmt: skip
    assert code == 0, err
    lines = readings("run", "knn")
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (12, 1), (24, 3), (30, 4)]
    assert all(0 <= line["knn"] <= 100 for line in lines)
    assert f"Before training: kNN accuracy {lines[0]['knn']:.1f} %" in out
    assert f"After epoch 4: kNN accuracy {lines[-1]['knn']:.1f} %" in out and "before training" in out


def test_knn_is_that_of_the_student_as_it_is_saved(cli, images, monkeypatch):
    import torch

    import data2vec_vision as d2v
    from data2vec_vision.evaluate import KnnProbe

    name, seen, probe = "blocks.0.attn.qkv.weight", [], KnnProbe.probe

    def spy(self, encoder, *args):
        seen.append(encoder.vit.state_dict()[name].clone())
        return probe(self, encoder, *args)

    monkeypatch.setattr(KnnProbe, "probe", spy)
    cli("train", images, *QUIET, "--epochs", 2, "--checkpoint-out-dir", "run", "--eval-path", images)
    student, teacher = (d2v.load(f"run/{which}_1.pt") for which in ("student", "teacher"))
    assert torch.equal(seen[-1], student.vit.state_dict()[name])
    assert not torch.equal(seen[-1], teacher.vit.state_dict()[name])
    expected = probe(KnnProbe(str(images), student.transform, workers=0), student, torch.device("cpu"))
    assert readings("run", "knn")[-1]["knn"] == pytest.approx(expected)


def test_a_tenth_of_the_run_lies_between_evaluations_by_default(cli, images):
    cli("train", images, *QUIET, "--epochs", 20, "--checkpoint-out-dir", "run", "--eval-path", images)
    assert [line["epoch"] for line in readings("run", "knn")] == [0, *range(1, 20, 2)]


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "there is no folder nowhere"), ("flat", "class"), ("empty", "no image")]
)
def test_an_eval_path_without_classes_is_refused_before_training(refused, images, folder, message):
    Path("flat").mkdir()
    Path("empty").mkdir()
    for path in list(images.glob("*/*"))[:4]:
        (Path("flat") / path.name).write_bytes(path.read_bytes())
    assert message in refused("train", images, *QUIET, "--eval-path", folder, "--checkpoint-out-dir", "run")
    assert not list(Path("run").glob("*.pt"))


def test_figures_are_logged_once_there_are_enough_images_and_at_the_end(cli, images, monkeypatch):
    from data2vec_vision import train as train_module

    monkeypatch.setattr(train_module, "WINDOW", 32)
    code, out, err = cli("train", images, *QUIET, "--epochs", 4, "--log-every", 4, "--set", "pixel_pct=0",
                         "--checkpoint-out-dir", "run")  # fmt: skip
    assert code == 0, err
    assert [line["step"] for line in readings("run")] == [8, 16, 24]
    for name in ("rankme", "target_variance_tokens", "target_variance_images", "r2_constant", "r2_position"):
        assert all(isinstance(line[name], float) for line in readings("run"))
    verdicts = readings("run", "verdict")
    assert [line["step"] for line in verdicts] == [8, 16, 24] and verdicts[-1]["steps"] == 24
    assert f"Verdict: {verdicts[-1]['headline']}. {verdicts[-1]['text']}" in out


def test_the_last_figures_come_with_fewer_images_than_a_window(cli, images):
    cli("train", images, *QUIET, "--epochs", 2, "--log-every", 5, "--checkpoint-out-dir", "run")
    assert [line["step"] for line in readings("run")] == [12]


def test_a_resumed_run_writes_the_lines_that_it_would_have_written(cli, images, monkeypatch):
    """The sums of an open window, and what the judge has seen, survive a stop in the middle."""
    from data2vec_vision import train as train_module

    monkeypatch.setattr(train_module, "WINDOW", 48)  # two epochs
    options = [*QUIET, "--epochs", 6, "--save-every", 1, "--keep", 9, "--set", "pixel_pct=0", "--checkpoint-out-dir"]
    cli("train", images, *options, "whole")
    cli("train", images, *options, "part")
    for path in Path("part").glob("*_[3-5].pt"):
        path.unlink()
    code, _, err = cli("train", "--resume-checkpoint", "part/checkpoint_2.pt", "--no-report", "--no-tensorboard")
    assert code == 0, err

    def timeless(folder):
        return [
            {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in metrics(folder)
        ]

    assert [line["step"] for line in readings("whole")] == [12, 24, 36]
    assert timeless("part") == timeless("whole")


def test_tensorboard_has_every_number_and_the_pictures(cli, images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = cli("train", images, *LOUD, "--no-report", "--epochs", 3, "--save-every", 1, "--eval-path", images,
                       "--checkpoint-out-dir", "run")  # fmt: skip
    assert code == 0, err
    events = EventAccumulator("run")
    events.Reload()
    assert {"train/loss", "train/lr", "train/tau", "speed/images_per_second", "monitors/knn", "monitors/rankme"} <= set(
        events.Tags()["scalars"]
    )
    lines = [line for line in metrics("run") if "loss" in line]
    assert [e.step for e in events.Scalars("train/loss")] == [line["step"] for line in lines]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    assert [e.step for e in events.Images("views")] == [0] and len(events.Images("patch features")) == 3
    assert not list(Path("run").glob("report.html"))


def test_tensorboard_forgets_what_a_resumed_run_does_again(cli, images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cli("train", images, *LOUD, "--no-report", "--epochs", 4, "--save-every", 1, "--checkpoint-out-dir", "run")
    Path("run/checkpoint_3.pt").unlink()
    assert cli("train", "--resume-checkpoint", "run/checkpoint_1.pt", "--no-report")[0] == 0
    events = EventAccumulator("run")
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [line["step"] for line in metrics("run") if "loss" in line]


def test_without_tensorboard_or_against_it_there_are_no_events(cli, images, monkeypatch):
    assert cli("train", images, *QUIET, "--epochs", 1, "--checkpoint-out-dir", "against")[0] == 0
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    assert cli("train", images, *LOUD, "--no-report", "--epochs", 1, "--checkpoint-out-dir", "without")[0] == 0
    assert not [*Path("against").glob("events*"), *Path("without").glob("events*")]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is given, as the real one needs an account."""
    module = types.ModuleType("wandb")
    module.logged, module.started, module.summary = [], [], {}

    class Run:
        summary = module.summary

        def log(self, values, step):
            module.logged.append((step, values))

        def finish(self):
            module.finished = True

    module.init = lambda **settings: module.started.append(settings) or Run()
    module.Image = lambda image: image
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_line_and_a_resumed_run_continues_it(cli, images, wandb):
    code, _, err = cli("train", images, *QUIET, "--epochs", 2, "--save-every", 1, "--wandb", "photos",
                       "--checkpoint-out-dir", "run")  # fmt: skip
    assert code == 0, err
    settings = wandb.started[0]
    assert settings["project"] == "photos" and settings["name"] == "run" and settings["config"]["epochs"] == 2
    losses = [(step, values["train/loss"]) for step, values in wandb.logged if "train/loss" in values]
    assert losses == [(line["step"], line["loss"]) for line in metrics("run")] and wandb.finished
    assert wandb.summary["verdict"].startswith("Verdict: Too short")
    Path("run/checkpoint_1.pt").unlink()
    cli("train", "--resume-checkpoint", "run/checkpoint_0.pt", "--wandb", "photos", "--no-report", "--no-tensorboard")
    assert wandb.started[1]["id"] == settings["id"] and wandb.started[1]["resume"] == "allow"


def test_wandb_that_is_missing_or_refuses_is_one_line(refused, images, wandb, monkeypatch):
    options = ["train", images, *QUIET, "--checkpoint-out-dir", "run", "--wandb", "photos"]

    def no_account(**settings):
        raise RuntimeError("api_key not configured\n (no-tty)")

    monkeypatch.setattr(wandb, "init", no_account)
    assert "--wandb photos: RuntimeError: api_key not configured (no-tty); try `wandb login`" in refused(*options)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(*options)


def test_looking_on_cannot_end_a_run_and_comes_after_saving(cli, images, monkeypatch):
    from data2vec_vision import online

    def broken(*args):
        assert Path("run/checkpoint_0.pt").exists()
        raise RuntimeError("no picture today")

    monkeypatch.setattr(online, "draw_patch_features", broken)
    monkeypatch.setattr(online, "draw_views", lambda job: 1 / 0)
    monkeypatch.setattr(online.KnnProbe, "probe", lambda *args: 1 / 0)
    code, out, err = cli("train", images, *LOUD, "--no-report", "--epochs", 3, "--save-every", 1, "--eval-path", images,
                         "--checkpoint-out-dir", "run")  # fmt: skip
    assert code == 0, err
    for what in ("the picture of the patch features", "the picture of the views", "kNN"):
        assert out.count(f"note: {what} is left out from here on") == 1
    assert "no picture today" in out and len(metrics("run")) == 18


def test_a_method_whose_masks_have_other_names_is_drawn_too(cli, images):
    example = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    Path("own.py").write_text(example.replace('{"keep"', '{"context"').replace('masks["keep"]', 'masks["context"]'))
    options = [*LOUD, "--method", "own.py", "--epochs", 40, "--log-every", 20, "--checkpoint-out-dir", "run"]
    code, out, err = cli("train", images, *options)
    assert code == 0 and "left out" not in out and "report.html" in out, out + err


def test_metrics_are_json_whatever_happens(cli, images):
    """NaN is no JSON: other readers would stumble over it."""
    cli("train", images, *QUIET, "--epochs", 1, "--max-lr", "1e15", "--clip-grad", 0, "--checkpoint-out-dir", "run")

    def refuse(name):
        raise AssertionError(name)

    for line in Path("run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
