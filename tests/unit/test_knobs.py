"""A method's own knobs: typed, checked, and set in one way only."""

from dataclasses import dataclass
from typing import Literal

import pytest

from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError
from data2vec_vision.knobs import check_knobs, knob, knobs_from, option_defaults


@dataclass(frozen=True)
class Config:
    share: float = knob(0.5, "a share", "(0, 1)", option="mask_erase_pct")
    count: int = knob(3, "a count", "[1, inf)")
    last: int | None = knob(None, "perhaps a count", "[1, inf)")
    deep: bool = knob(False, "a switch")
    kind: Literal["a", "b"] = knob("a", "a choice", paper="b")


def test_values_come_from_options_and_from_set():
    config = TrainConfig(mask_erase_pct=0.25, set=("count=7", "last=2", "deep=true", "kind=b"))
    values = knobs_from(Config, config, "x")
    assert values == {"share": 0.25, "count": 7, "last": 2, "deep": True, "kind": "b"}
    assert knobs_from(Config, TrainConfig(set=("last=none",)), "x") == {"last": None}
    assert knobs_from(Config, TrainConfig(), "x") == {}
    assert option_defaults(Config) == {"mask_erase_pct": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"set": ("count",)}, "--set count must be NAME=VALUE"),
        ({"set": ("cuont=3",)}, "the method x has no knob 'cuont'; did you mean count?"),
        ({"set": ("zzz=3",)}, "`methods x` lists them"),
        ({"set": ("share=0.3",)}, "--set share: this knob has an option of its own, --mask-erase-pct"),
        ({"set": ("count=three",)}, "--set count=three: it must be a whole number"),
        ({"set": ("count=1.5",)}, "it must be a whole number"),
        ({"set": ("deep=maybe",)}, "it must be true or false"),
        ({"set": ("kind=c",)}, "--set kind=c: it must be a or b"),
        ({"beta": 2.0}, "the method x does not use --beta; leave it out"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(settings, message):
    with pytest.raises(InputError) as error:
        knobs_from(Config, TrainConfig(**settings), "x")
    assert message in str(error.value)


def test_ranges_and_choices_are_checked():
    check_knobs(Config())
    for values, message in (({"count": 0}, "count must be at least 1"), ({"share": 1.0}, "--mask-erase-pct must be"),
                            ({"kind": "z"}, "kind must be a or b")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            check_knobs(Config(**values))
