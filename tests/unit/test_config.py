"""The settings: in range or refused in words, resolved by one pure function, kept in JSON."""

import json
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import click
import pytest

from data2vec_vision.__main__ import cli
from data2vec_vision.config import (
    GROUPS,
    Facts,
    TrainConfig,
    check,
    default_epochs,
    default_prototypes,
    fields,
    flag,
    from_json,
    read_config,
    resolve,
    steps_per_epoch,
    to_json,
)
from data2vec_vision.errors import InputError

FACTS = Facts(
    n_images=10_000,
    image_size=224,
    depth=12,
    recipe={
        "k": None,
        "tau_initial": 0.9,
        "tau_end": 0.9,
        "max_lr_at_256": 1e-3,
        "weight_decay": 0.05,
        "beta": 2.0,
        "tau_memory": 0.02,
    },
    device="cuda:0",
    native_bf16=True,
    cores=16,
)


def test_options_of_train_are_the_fields_of_trainconfig():
    params = {p.name: p for p in cli.commands["train"].params}
    assert set(params) == {f.name for f in dataclass_fields(TrainConfig)}
    for name, field in fields().items():
        assert flag(name) in params[name].opts and params[name].help.startswith(field.metadata["help"])
        assert field.metadata["group"] in GROUPS


def test_the_options_of_the_original_command_line_are_there():
    original = """image-size patch-size epochs batch-size n-encoders dropout hidden-dim mask-erase-pct max-lr k grad-accum beta
        tau-initial tau-end tau-increase-pct checkpoint-out-dir resume-checkpoint"""
    opts = {opt for p in cli.commands["train"].params for opt in p.opts}
    assert {f"--{name}" for name in original.split()} <= opts


def test_help_is_short_grouped_and_begins_with_an_example():
    ctx = click.Context(cli.commands["train"], info_name="train")
    text = cli.commands["train"].get_help(ctx)
    assert len(text.splitlines()) < 100
    assert [text.index(f"\n{group}:") for group in GROUPS] == sorted(text.index(f"\n{group}:") for group in GROUPS)
    assert text.index("train photos/") < text.index("Images:")


@pytest.mark.parametrize("memory", [{}, {"tau_memory": 0.02}])
def test_every_typed_tau_end_has_an_initial_below_it(memory):
    """Whether the method lets tau follow from the length of the run, or has its own."""
    own = {"tau_initial": 0.996, "tau_end": 0.9992}
    for n_images in (300, 10_000, 1_300_000):
        for last in (0.5, 0.9, 1 - 1 / 300, 0.99999, 1.0):
            config, _ = resolve(
                TrainConfig(input_path="x", tau_end=last), replace(FACTS, n_images=n_images, recipe=own | memory)
            )
            check(config)
            config, _ = resolve(
                TrainConfig(input_path="x", tau_initial=last), replace(FACTS, n_images=n_images, recipe=own | memory)
            )
            check(config)


def test_without_a_memory_tau_is_the_methods_own():
    own = {"tau_initial": 0.996, "tau_end": 0.9992}
    config, reasons = resolve(TrainConfig(input_path="x", method="msn"), replace(FACTS, recipe=own))
    assert (config.tau_initial, config.tau_end) == (0.996, 0.9992) and reasons["tau_end"] == "default of msn"
    for typed, other, why in (("tau_initial", "tau_end", "more than"), ("tau_end", "tau_initial", "less than")):
        value = 0.9999 if typed == "tau_initial" else 0.9
        config, reasons = resolve(
            TrainConfig(input_path="x", method="msn", **{typed: value}), replace(FACTS, recipe=own)
        )
        assert getattr(config, other) == value and f"{why} the method's default" in reasons[other]


def test_defaults_suit_10000_images_and_one_gpu():
    config, reasons = resolve(TrainConfig(input_path="some/photos"), FACTS)
    check(config)
    assert (config.epochs, config.image_size, config.patch_size, config.hidden_dim) == (200, 224, 16, 384)
    assert (config.n_encoders, config.n_heads, config.k) == (12, 6, 12)
    assert (config.batch_size, config.grad_accum, config.images_a_step) == (64, 1, 64)
    assert config.checkpoint_out_dir == "runs/photos-data2vec"
    assert config.precision == "bf16" and config.device == "cuda:0" and config.workers == 8
    assert steps_per_epoch(config, 10_000) == 157
    assert config.tau_end == pytest.approx(1 - 1 / (0.02 * 31_400), abs=1e-6)
    assert config.tau_initial == pytest.approx(1 - 1 / (0.002 * 31_400), abs=1e-6)
    assert config.max_lr == pytest.approx(5e-4) and config.weight_decay == 0.05
    assert "2 % of the run" in reasons["tau_end"] and "root of 64 / 256" in reasons["max_lr"]


def test_resolve_keeps_what_was_typed_and_leaves_nothing_on_auto():
    typed = TrainConfig(
        input_path="x", tau_end=0.5, max_lr=0.3, k=2, workers=0, precision="fp32", image_size=32, patch_size=8
    )
    config, reasons = resolve(typed, FACTS)
    for name in ("tau_end", "max_lr", "k", "workers", "precision", "image_size", "patch_size"):
        assert getattr(config, name) == getattr(typed, name) and name not in reasons
    assert config.tau_initial <= config.tau_end
    unresolved = {n for n in fields() if getattr(config, n) in (None, "auto")}
    assert unresolved == {"recipe", "normalize", "model", "init", "mask_erase_pct", "tau_increase_pct", "resume_checkpoint", "config",
                          "warmup_pct", "clip_grad", "eval_path", "wandb"} - set(FACTS.recipe)  # fmt: skip


def test_another_method_takes_no_knobs_from_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(TrainConfig(input_path="x", method="data2vec2", set=("n_masks=2",))))
    assert read_config(str(path), {})["set"] == ("n_masks=2",)
    assert read_config(str(path), {"method": "data2vec2"})["set"] == ("n_masks=2",)
    assert "set" not in read_config(str(path), {"method": "data2vec"})
    assert read_config(str(path), {"method": "data2vec", "set": ("flip=0",)})["set"] == ("flip=0",)


@pytest.mark.parametrize(
    ("n_images", "epochs"),
    [(1, 800), (500, 800), (2_500, 800), (5_000, 400), (9_500, 211), (20_000, 100), (50_000, 100), (10**7, 100)],
)
def test_few_images_are_seen_more_often(n_images, epochs):
    """Two million images seen, between 100 and 800 epochs; the plan says why."""
    assert default_epochs(n_images) == epochs
    config, reasons = resolve(TrainConfig(input_path="x"), replace(FACTS, n_images=n_images))
    assert config.epochs == epochs
    assert reasons["epochs"] == ("the default" if epochs == 100 else f"{epochs * n_images:,} images seen")
    assert resolve(TrainConfig(input_path="x", epochs=7), replace(FACTS, n_images=n_images))[0].epochs == 7


@pytest.mark.parametrize(
    ("n_images", "most", "count"),
    [(1, 1024, 64), (600, 1024, 64), (2_000, 1024, 128), (10_000, 1024, 1024), (10**6, 1024, 1024), (9_000, 256, 256)],
)
def test_prototypes_are_fewer_than_images(n_images, most, count):
    """At most one for eight images, but 64 at least."""
    assert default_prototypes(n_images, most) == count


@pytest.mark.parametrize(("n_images", "epochs"), [(1, 1), (10, 3), (1_000, 100), (10**7, 300)])
def test_tau_is_sane_for_runs_of_any_length(n_images, epochs):
    config, _ = resolve(TrainConfig(input_path="x", epochs=epochs), replace(FACTS, n_images=n_images))
    assert 0 <= config.tau_initial <= config.tau_end < 1
    check(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_erase_pct": 0.0}, "--mask-erase-pct must be between 0 and 1, both excluded, got 0"),
        ({"mask_erase_pct": 1.0}, "--mask-erase-pct must be between 0 and 1, both excluded, got 1"),
        ({"mask_erase_pct": 60.0}, "got 60; use 0.6 for 60 %"),
        ({"tau_end": 1.5}, "--tau-end must be between 0 and 1, got 1.5"),
        ({"tau_initial": 0.9, "tau_end": 0.5}, "--tau-end 0.5 is below --tau-initial 0.9"),
        ({"dropout": 1.0}, "--dropout must be between 0 and 1, 1 excluded"),
        ({"max_lr": 0.0}, "--max-lr must be more than 0"),
        ({"max_lr": float("nan")}, "--max-lr must be a finite number"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": -4}, "--batch-size must be at least 1"),
        ({"image_size": 30}, "--image-size 30 is not divisible by --patch-size 16; use --image-size 32"),
        ({"image_size": 16}, "--image-size 16 is a single patch; use --image-size 32"),
        ({"hidden_dim": 100}, "--hidden-dim 100 is not a multiple of 64; use --hidden-dim 128, or give --n-heads"),
        ({"hidden_dim": 384, "n_heads": 5}, "--n-heads 5 does not divide --hidden-dim 384; use --n-heads 4"),
        (
            {"model": "vit_tiny_patch16_224", "hidden_dim": 64},
            "has sizes of its own; leave out --hidden-dim, or --model",
        ),
        ({"pretrained": True}, "--pretrained needs --model"),
        ({"model": "x", "pretrained": True, "init": "y"}, "--pretrained and --init both"),
        ({"precision": "int8"}, "--precision must be one of auto, bf16, fp16, fp32, got 'int8'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_words(settings, message):
    with pytest.raises(InputError) as error:
        check(TrainConfig(**settings))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_json_gives_back_the_same_settings():
    config = TrainConfig(input_path="x", set=("target_norm=layer",), max_lr=1.0, epochs=3)
    assert TrainConfig(**from_json(json.loads(to_json(config)), "test")) == config


def test_a_config_file_yields_to_typed_options_and_keeps_out_of_what_belongs_to_a_call(tmp_path):
    path = tmp_path / "config.json"
    stored = TrainConfig(input_path="a", epochs=7, hidden_dim=64, n_heads=1, checkpoint_out_dir="old", dry_run=True)
    path.write_text(to_json(stored))
    values = read_config(str(path), {"epochs": 9})
    assert (values["epochs"], values["hidden_dim"], values["input_path"]) == (9, 64, "a")
    assert not {"checkpoint_out_dir", "dry_run", "resume_checkpoint"} & set(values)
    assert "hidden_dim" not in read_config(str(path), {"model": "vit_tiny_patch16_224"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no settings"),
        ('{"epoch": 3}', "unknown setting 'epoch'; did you mean 'epochs'?"),
        ('{"epochs": "3"}', "epochs must be of type int, got '3'"),
        ('{"epochs": true}', "epochs must be of type int, got True"),
        ('{"set": "x=1"}', "set must be of type"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_words(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_config(str(path), {})
    assert message in str(error.value)


@pytest.mark.parametrize(("n_images", "expected"), [(1, 1), (63, 1), (64, 1), (65, 2), (640, 10)])
def test_every_epoch_has_a_step_and_sees_every_image(n_images, expected):
    assert steps_per_epoch(TrainConfig(batch_size=16, grad_accum=4), n_images) == expected
