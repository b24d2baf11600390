"""What an evaluation says: figures, verdict, table."""

import math

import numpy as np
import pytest

from data2vec_vision.findings import (
    class_lines,
    class_table,
    confused_pairs,
    findings,
    gain,
    printable,
    table,
    verdict,
)


def test_gain_has_the_error_of_paired_differences():
    after, before = np.array([1, 1, 1, 0, 1, 0], bool), np.array([1, 0, 0, 0, 1, 1], bool)
    found = gain(after, before)
    difference = np.array([0, 1, 1, 0, 0, -1])
    assert found["points"] == pytest.approx(100 / 6)
    assert found["standard_error"] == pytest.approx(100 * math.sqrt((np.var(difference, ddof=1) + 1 / 6) / 6))
    assert gain(after[:1], before[:1])["standard_error"] > 100  # one image tells nothing
    assert gain(np.ones(3, bool), np.zeros(3, bool))["standard_error"] > 30, "three that agree are not certainty"
    many = np.arange(10_000) % 3 == 0
    plain = 100 * np.std(many - 0.0, ddof=1) / 100
    assert gain(many, np.zeros(10_000, bool))["standard_error"] == pytest.approx(plain, rel=1e-3)


def said(knn, linear, error=1.0):
    return verdict(
        {"knn": {"points": knn, "standard_error": error}, "linear": {"points": linear, "standard_error": error}}
    )


def test_the_verdict_says_whether_it_has_learned():
    assert said(12.3, 10.2) == (
        "The trained encoder is 12.3 points above the untrained one by kNN and 10.2 by a linear probe "
        "(chance explains 2.0 and 2.0): it has learned."
    )
    assert said(12.3, 1.9).endswith(
        "1.9 by a linear probe (chance explains 2.0 and 2.0): it has learned, as far as kNN can tell."
    )
    assert said(1.9, 2.1).endswith("it has learned, as far as a linear probe can tell.")
    assert "0.5 points above the untrained one by kNN and 1.0 points below the untrained one by a linear" in said(
        0.5, -1.0
    )
    assert said(0.5, -1.0).endswith(
        "it is not better than the untrained encoder, as far as these test images can tell."
    )
    assert said(1.0, -3.0).endswith("worse than the untrained encoder; see whether the run collapsed, or train longer.")
    assert said(-5.0, 9.0).endswith("a linear probe says that it has learned, kNN that it has lost.")
    assert said(5.0, 5.0, error=2.5).endswith("as far as these test images can tell.")  # at the limit, not beyond


def test_the_table_has_a_row_an_encoder_and_a_column_a_probe():
    few = {"1": {"mean": 18.24, "sd": 2.06}}
    rows = {
        "raw pixels": {"knn": 36.34, "linear": 100.0, "few_shot": few},
        "x": {"knn": 1.0, "linear": 2.0, "few_shot": few},
    }
    assert table(rows).splitlines() == [
        "               kNN  linear      1-shot",
        "  raw pixels  36.3   100.0  18.2 ± 2.1",
        "  x            1.0     2.0  18.2 ± 2.1",
    ]


def test_figures_of_classes_and_pairs():
    test, classes = np.array([0, 0, 0, 0, 1, 1, 2]), ["a", "b", "c", "d"]
    predicted = {"knn": np.array([0, 0, 0, 0, 0, 0, 0]), "linear": np.array([0, 1, 1, 2, 1, 0, 2])}
    rows = class_table(classes, np.array([0, 1, 1, 3]), test, predicted)
    assert rows[0] == {"class": "a", "train": 1, "test": 4, "knn": 100.0, "linear": 25.0}
    assert rows[3] == {"class": "d", "train": 1, "test": 0, "knn": None, "linear": None}
    before = {"knn": predicted["knn"], "linear": np.zeros(7, int)}
    found = findings({"trained encoder": {"linear": 100 * 3 / 7}}, {"trained encoder": predicted, "untrained encoder": before},
                     np.array([0, 1, 1, 3]), test, classes)  # fmt: skip
    assert found["confusion"] == [[1, 2, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found["chance"] == pytest.approx(400 / 7)
    assert found["standard_error"] == pytest.approx(100 * math.sqrt(4 / 9 * 5 / 9 / 7))
    assert found["gain"]["linear"]["points"] == pytest.approx(100 * (3 - 4) / 7)
    assert found["most_confused"][0] == {"class": "a", "taken_for": "b", "images": 2, "of": 4}
    assert len(found["most_confused"]) == 3 and len(confused_pairs(np.array(found["confusion"]), classes, 2)) == 2


def test_of_many_classes_the_worst_and_the_best_are_shown():
    rows = [{"class": f"c{n}", "test": 5, "linear": float(n)} for n in range(20)] + [
        {"class": "none", "test": 0, "linear": None}
    ]
    lines = class_lines(rows).splitlines()
    assert [line.split()[0] for line in lines[1:11]] == [f"c{n}" for n in range(10)]
    assert [line.split()[0] for line in lines[12:]] == ["c17", "c18", "c19"]
    assert len(class_lines(rows[:13]).splitlines()) == 14


def test_names_are_printable():
    assert printable("a\nb\x1b[31m") == "a?b?[31m" and printable("ü猫") == "ü猫" and len(printable("x" * 99)) == 40
