"""Real runs: each collapse, provoked on purpose, leads to its verdict, and healthy runs of every method stay quiet."""

import pytest
from conftest import metrics

from data2vec_vision import train as train_module
from data2vec_vision import verdict as verdict_module
from data2vec_vision.config import TrainConfig
from data2vec_vision.samples import write_samples

CLUSTERS = {"msn": ("n_focal=0", "n_prototypes=64"), "swav": ("n_local=0", "n_prototypes=64")}
# I-JEPA's own target: that of the default, which loses what the place tells, is not brought to a collapse so soon.
PAPER = ("targets=blocks", "target_output=last", "center=false", "pixel_pct=0")
FAST = {"max_lr": 2e-3, "batch_size": 32}  # a rate at which something is learned in 144 steps


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """260 photos of clothes: noise would do for a collapse, but nothing can be learned from it."""
    folder = tmp_path_factory.mktemp("clothes")
    write_samples(str(folder), lambda name: int(name.rpartition("/")[2].split(".")[0]) < 26)
    return folder


def trained(clothes, monkeypatch, method, epochs, **settings):
    """The lines that a run with verdicts has written, and its last line."""
    monkeypatch.setattr(train_module, "WINDOW", 512)
    config = TrainConfig(
        input_path=str(clothes), method=method, image_size=28, patch_size=7, hidden_dim=64, n_encoders=2, n_heads=2,
        epochs=epochs, workers=0, precision="fp32", device="cpu", log_every=8, checkpoint_out_dir="run",
        no_report=True, no_tensorboard=True, **settings,
    )  # fmt: skip
    train_module.train(config)
    lines = metrics("run")
    return [line for line in lines if "verdict" in line], lines[-1]


@pytest.mark.parametrize(
    ("method", "settings", "learns"),
    [
        ("data2vec", FAST, False),  # a centred target takes longer
        ("data2vec2", FAST, True),
        ("ijepa", FAST, False),  # takes longer
        ("mae", FAST, False),
        ("msn", FAST, True),
        ("swav", {"max_lr": 5e-4, "batch_size": 64}, False),
    ],
)
def test_healthy_runs_stay_quiet(clothes, monkeypatch, method, settings, learns):
    """Longer runs of all methods, on these and other images: benchmarks/RESULTS.md."""
    said, last = trained(clothes, monkeypatch, method, epochs=16, set=CLUSTERS.get(method, ()), **settings)
    assert {line["level"] for line in said} <= {"early", "good"}, [line["headline"] for line in said]
    assert last["verdict"] == "learning" or not learns


@pytest.mark.parametrize(
    ("method", "epochs", "settings", "verdicts", "remedy"),
    [
        (
            "ijepa",
            20,
            {"set": PAPER, "max_lr": 0.1, "tau_initial": 0.0, "tau_end": 0.0},
            {"targets"},
            "raise --tau-initial",
        ),
        ("mae", 16, {"max_lr": 0.3}, {"rank", "features"}, "Lower --max-lr (now 0.3)"),
        ("mae", 16, {"max_lr": 1e-7}, {"constant"}, "--max-lr 1e-08 or 1e-06"),
        (
            "msn",
            16,
            {"set": ("mean_entropy_weight=0", "sinkhorn=false"), "max_lr": 2e-3},
            {"crowded"},
            "mean_entropy_weight",
        ),
        ("msn", 16, {"max_lr": 0.2}, {"unused", "rank"}, "lower --max-lr"),
        ("swav", 16, {"set": ("epsilon=1",), "max_lr": 5e-4}, {"unused"}, "n_prototypes=16"),
    ],
)
def test_a_provoked_collapse_is_called_by_its_name(clothes, monkeypatch, method, epochs, settings, verdicts, remedy):
    monkeypatch.setattr(verdict_module, "LEARNED_BY", (60, 5000))
    settings = settings | {"set": settings.get("set", ()) + CLUSTERS.get(method, ())}
    said, last = trained(clothes, monkeypatch, method, epochs, batch_size=32, **settings)
    assert last["verdict"] in verdicts and last["level"] == "bad", [line["headline"] for line in said]
    assert remedy.lower() in last["text"].lower()
