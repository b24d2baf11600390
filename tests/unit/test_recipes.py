"""`--recipe paper`: each paper's settings exactly, unless something else was typed; and where it is said what they are."""

import json
import re
import shlex
from dataclasses import asdict, replace
from typing import get_type_hints

import pytest

from data2vec_vision import methods
from data2vec_vision.__main__ import cli
from data2vec_vision.config import OF_THE_CALL, TrainConfig, read_config, to_json
from data2vec_vision.errors import InputError
from data2vec_vision.knobs import knobs, knobs_from
from data2vec_vision.messages import describe
from data2vec_vision.methods.mae import MAE
from data2vec_vision.plan import prepare
from data2vec_vision.recipes import as_typed, command_options, packed, with_paper
from data2vec_vision.report import reproduce

NAMES = methods.names()
TINY = {"image_size": 32, "patch_size": 4, "hidden_dim": 32, "n_encoders": 2, "n_heads": 2}

# As the papers and their code have them: options, then knobs, then AdamW's betas.
PAPERS = {
    "data2vec": (
        {"epochs": 800, "batch_size": 2048, "max_lr": 0.002, "warmup_pct": 10 / 800, "weight_decay": 0.05, "clip_grad": 3},
        {"top_k_blocks": 6, "mask_ratio": 0.61, "beta": 2, "tau_initial": 0.9998, "tau_end": 0.9998, "tau_increase_pct": 0,
         "target_output": "block", "target_norm": "layer", "center": False, "pixel_pct": 0.0, "crop_min": 0.08, "color_jitter": 0.4, "flip": 0.5},
        (0.9, 0.999),
    ),
    "data2vec2": (
        {"epochs": 75, "batch_size": 256, "max_lr": 0.001, "warmup_pct": 10 / 75, "weight_decay": 0.05, "clip_grad": 4},
        {"top_k_blocks": 10, "mask_ratio": 0.8, "n_masks": 16, "mask_adjust": 0.07, "block_size": 3, "decoder_dim": 768,
         "decoder_depth": 6, "decoder_kernel": 3, "center": False, "pixel_pct": 0.0, "class_token_weight": 0.01 * 16 * 16, "tau_initial": 0.9998,
         "tau_end": 0.99999, "tau_increase_pct": 100_000 / 375_300, "crop_min": 0.2, "flip": 0.5},
        (0.9, 0.95),
    ),
    "ijepa": (
        {"epochs": 600, "batch_size": 2048, "max_lr": 0.001, "warmup_pct": 15 / 600, "weight_decay": 0.04, "clip_grad": 0},
        {"targets": "blocks", "target_output": "last", "center": False, "pixel_pct": 0.0, "n_targets": 4, "context_ratio": 0.25, "official_sampler": True, "predictor_dim": 384, "predictor_depth": 6,
         "beta": 1, "tau_initial": 0.996, "tau_end": 1, "tau_increase_pct": 1, "weight_decay_end": 0.4,
         "crop_min": 0.3, "flip": 0},
        (0.9, 0.999),
    ),
    "mae": (
        {"epochs": 1600, "batch_size": 4096, "max_lr": 1.5e-4 * 4096 / 256, "warmup_pct": 40 / 1600, "weight_decay": 0.05,
         "clip_grad": 0},
        {"mask_ratio": 0.75, "norm_pix": True, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16, "crop_min": 0.2,
         "flip": 0.5},
        (0.9, 0.95),
    ),
    "msn": (
        {"epochs": 600, "batch_size": 1024, "max_lr": 0.001, "warmup_pct": 15 / 600, "weight_decay": 0.04, "clip_grad": 3},
        {"mask_ratio": 0.3, "n_focal": 10, "n_prototypes": 1024, "temperature": 0.1, "sharpening": 0.25, "sinkhorn": True,
         "mean_entropy_weight": 1, "head_dim": 2048, "projection_dim": 256, "tau_initial": 0.996, "tau_end": 0.9992,
         "tau_increase_pct": 1, "weight_decay_end": 0.366, "crop_min": 0.3, "focal_min": 0.05, "color_jitter": 0.5,
         "blur": 0.5, "flip": 0.5},
        (0.9, 0.999),
    ),
    "swav": (
        {"epochs": 400, "batch_size": 256, "max_lr": 5e-4, "warmup_pct": 10 / 400, "weight_decay": 0.05, "clip_grad": 0},
        {"n_local": 6, "n_prototypes": 3000, "temperature": 0.1, "epsilon": 0.05, "queue_length": 3840,
         "queue_start": 15 / 400, "freeze_prototypes": 1 / 400, "head_dim": 2048, "projection_dim": 128, "crop_min": 0.14,
         "local_min": 0.05, "color_jitter": 1, "blur": 0.5, "flip": 0.5},
        (0.9, 0.999),
    ),
}  # fmt: skip


def resolved(images, **settings):
    return prepare(TrainConfig(input_path=str(images), recipe="paper", device="cpu", **settings))


def test_every_method_has_a_recipe_and_the_table_is_of_all_methods():
    assert sorted(PAPERS) == NAMES and all(methods.find(name).paper is not None for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_exactly_the_papers_settings_and_says_them(name, images):
    options, knob_values, betas = PAPERS[name]
    job = resolved(images, method=name)
    config, method = job.config, job.method
    assert (config.model, config.image_size, config.grad_accum) == ("vit_base_patch16_224", 224, 1)
    assert {option: getattr(config, option) for option in options} == pytest.approx(options, rel=1e-12)
    assert asdict(method.config) == {k: pytest.approx(v) if type(v) is float else v for k, v in knob_values.items()}
    assert method.betas == betas and method.student.embed_dim == 768 and method.student.depth == 12
    assert (job.schedule.max_lr, job.schedule.warmup) == (config.max_lr, config.warmup_pct)
    # The configuration says it all: nothing is left for the recipe when it comes back from a file.
    assert with_paper(config, method.paper) == config and knobs_from(method.Config, config, name) == asdict(
        method.config
    )
    plan = describe(job)
    text = " ".join(plan.split())
    assert f"Recipe paper: {method.paper.source}" in text and "(the paper's" not in text
    assert " ".join(method.paper.notes.split()) in text
    for item in command_options(method.paper):
        assert item in text
    recipe = plan[plan.index("Recipe ") : plan.index("Files ")].splitlines()[1:]
    assert max(map(len, recipe)) <= 110


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_speaks_of_every_knob_and_agrees_with_what_methods_prints(name):
    """Where the text of a knob is a number or a word, and not an account of several."""
    method = methods.find(name)
    hints = get_type_hints(method.Config)
    for knob, field in knobs(method.Config).items():
        option, said = field.metadata["option"], field.metadata["paper"]
        value = method.paper.options[option] if option else method.paper.knobs[knob]
        if re.fullmatch(r"[0-9.]+", said):
            assert value == float(said), knob
        elif said in ("true", "false", "block", "ffn", "layer", "instance"):
            assert as_typed(value) == said, knob
        assert type(value) is not int or hints[knob] is not float, knob
    text = methods.explain(name)
    assert f"--recipe paper: {method.paper.source}" in text
    assert all(item in text for item in command_options(method.paper))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_can_be_typed_and_is_the_same_to_the_last_digit(name):
    paper = methods.find(name).paper
    words = shlex.split(" ".join(command_options(paper)))
    typed = TrainConfig(**cli.commands["train"].make_context("train", ["x", "--method", name, *words]).params)
    ours = with_paper(TrainConfig(input_path="x", method=name, recipe="paper"), paper)
    assert ours == replace(typed, recipe="paper", grad_accum=1)


def test_what_is_typed_wins_and_is_marked(images):
    job = resolved(images, method="mae", **TINY, epochs=3, batch_size=4, grad_accum=2, max_lr=1e-3, clip_grad=1.0,
                   set=("flip=0",))  # fmt: skip
    config = job.config
    assert (config.model, config.hidden_dim, config.epochs, config.images_a_step) == (None, 32, 3, 8)
    assert (config.max_lr, config.clip_grad, job.method.config.flip) == (1e-3, 1.0, 0.0)
    assert (config.weight_decay, config.warmup_pct, job.method.config.decoder_dim) == (0.05, 0.025, 512)
    text = " ".join(describe(job).split())
    for marked in ("--epochs 3 (the paper's: 1600)", "--max-lr 0.001 (the paper's: 0.0024)", "--set flip=0 (the paper's: 0.5)",
                   "--batch-size 4 --grad-accum 2 (the paper's: 4096 images a step)", "--clip-grad 1 (the paper's: 0)",
                   "--patch-size 4 --hidden-dim 32 --n-encoders 2 --n-heads 2 (the paper's: --model vit_base_patch16_224)",
                   "--image-size 32 (the paper's: 224)"):  # fmt: skip
        assert marked in text
    assert "--weight-decay 0.05 --" in text and "--set crop_min=0.2 --" in text


def test_a_typed_value_that_counts_as_false_wins_too():
    config = with_paper(
        TrainConfig(recipe="paper", method="data2vec", clip_grad=0.0, weight_decay=0.0, tau_increase_pct=0.5),
        methods.find("data2vec").paper,
    )
    assert (config.clip_grad, config.weight_decay, config.tau_increase_pct) == (0.0, 0.0, 0.5)


def test_another_model_or_one_typed_size_is_another_encoder():
    paper = MAE.paper
    assert (
        with_paper(TrainConfig(recipe="paper", model="vit_large_patch16_224"), paper).model == "vit_large_patch16_224"
    )
    for name in ("patch_size", "hidden_dim", "n_encoders", "n_heads"):
        config = with_paper(TrainConfig(recipe="paper", **{name: 8}), paper)
        assert config.model is None and config.image_size == 224


def test_without_it_nothing_changes():
    config = TrainConfig(input_path="x", method="mae")
    assert config.recipe == "auto" and with_paper(config, MAE.paper) is config


@pytest.mark.parametrize(
    ("typed", "slices"),
    [
        ({}, (4096, 1)),
        ({"batch_size": 64}, (64, 64)),
        ({"grad_accum": 16}, (256, 16)),
        ({"batch_size": 4096}, (4096, 1)),
        ({"batch_size": 7, "grad_accum": 3}, (7, 3)),
    ],
)
def test_one_of_batch_size_and_accumulation_gives_the_other(typed, slices):
    config = with_paper(TrainConfig(recipe="paper", **typed), MAE.paper)
    assert (config.batch_size, config.grad_accum) == slices


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"batch_size": 48}, "--batch-size 48 does not divide the 4096 images a step of the paper's recipe; "
                             "use --batch-size 32 or 64, or give --grad-accum too"),
        ({"batch_size": 10_000}, "use --batch-size 2048 or 4096, or give"),
        ({"grad_accum": 3}, "--grad-accum 3 does not divide the 4096 images a step of the paper's recipe; "
                            "use --grad-accum 2 or 4, or give --batch-size too"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_the_papers_is_refused_with_two_that_do(images, typed, message):
    with pytest.raises(InputError) as error:
        resolved(images, method="mae", **typed)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_method_without_a_paper_is_refused_in_a_line():
    with pytest.raises(InputError) as error:
        with_paper(TrainConfig(recipe="paper", method="mine.py"), None)
    assert str(error.value) == "--recipe paper: the method mine.py names no paper's recipe; leave the option out"
    with pytest.raises(InputError, match="--recipe must be one of auto, paper, got 'papre'"):
        prepare(TrainConfig(input_path="x", recipe="papre"))


def test_a_config_file_repeats_the_run_and_is_refused_beside_another_recipe_or_method(images, tmp_path):
    path = tmp_path / "config.json"
    job = resolved(images, method="mae", **TINY, batch_size=4, grad_accum=2, set=("flip=0",))
    path.write_text(to_json(job.config))
    again = prepare(TrainConfig(**read_config(str(path), {})))
    calls = dict.fromkeys(OF_THE_CALL)
    assert asdict(again.config) | calls == asdict(job.config) | calls
    assert again.method.config == job.method.config
    for given, message in (
        ({"recipe": "auto"}, "--recipe auto contradicts"),
        ({"method": "swav"}, "--method swav contradicts"),
    ):
        with pytest.raises(InputError, match=message):
            read_config(str(path), given)
    assert read_config(str(path), {"recipe": "paper", "method": "mae"})["recipe"] == "paper"
    values = json.loads(path.read_text())
    del values["recipe"]  # as a run of an earlier version, or one without the recipe
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="--recipe paper contradicts --config .*, which has auto"):
        read_config(str(path), {"recipe": "paper"})
    assert read_config(str(path), {"method": "swav"})["method"] == "swav"


def test_the_command_in_the_report_repeats_the_run(images):
    job = resolved(
        images, method="data2vec2", **TINY, batch_size=4, grad_accum=2, k=2, set=("flip=0", "decoder_dim=32")
    )
    words = shlex.split(reproduce(job.config, job.folder).splitlines()[0])
    typed = cli.commands["train"].make_context("train", words[words.index("train") + 1 :]).params
    again = prepare(TrainConfig(**typed))
    calls = dict.fromkeys(OF_THE_CALL)
    assert asdict(again.config) | calls == asdict(job.config) | calls


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (3, "3"),
        (0.5, "0.5"),
        (2e-3, "0.002"),
        (10 / 75, "0.13333333333333333"),
        ("a", "a"),
    ],
)
def test_values_are_typed_with_all_their_digits(value, text):
    assert as_typed(value) == text


def test_items_are_packed_and_not_broken():
    assert packed(["aa", "bb", "cc"], 6) == ["aa  bb", "cc"]
    assert packed(["a long one", "b"], 4) == ["a long one", "b"]
