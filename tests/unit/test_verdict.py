"""What the judge makes of lines of metrics.jsonl. That real runs lead to such lines: tests/integration/test_verdicts.py."""

import math
from dataclasses import replace

import pytest

from data2vec_vision.verdict import Facts, Judge

FACTS = Facts(total_steps=1000, warmup=0.1, max_lr=0.01, tau=(0.99, 0.999), n_prototypes=None)
CLUSTERING = replace(FACTS, n_prototypes=1024, knobs=("n_prototypes", "epsilon"))
HEALTHY = {"feature_std": 0.6, "rankme": 40.0, "target_variance_tokens": 0.9, "target_variance_images": 0.8,
           "r2_constant": 0.3, "r2_position": 0.2}  # fmt: skip
CLUSTERS = {"feature_std": 0.6, "rankme": 40.0, "entropy": 0.99, "prototypes_used": 60.0, "loss": 6.3}


def judged(lines, facts=FACTS):
    """All that is said of readings at equal distances, each a change of the first: [(step, verdict)]."""
    judge = Judge(facts)
    said = []
    for n, line in enumerate(lines):
        step = (n + 1) * facts.total_steps // len(lines)
        counted = {"skipped": line["skipped"] * n} if "skipped" in line else {}
        if verdict := judge.add({"step": step, **line, **counted}):
            said.append((step, verdict))
    return said, judge.now


def after(first, later, count=9):
    return [first] + [first | later] * count


def test_a_healthy_run_is_early_then_learning_and_nothing_else():
    for line, facts in ((HEALTHY, FACTS), (CLUSTERS, CLUSTERING)):
        said, now = judged([line] * 10, facts)
        assert [v.verdict for _, v in said] == ["early", "learning"] and now.level == "good"
    assert "30 %" in judged([HEALTHY] * 10)[1].text and "20 %" in judged([HEALTHY] * 10)[1].text


@pytest.mark.parametrize(
    ("later", "facts", "name", "remedy"),
    [
        ({"target_variance_images": 0.001}, FACTS, "targets", "--tau-initial and --tau-end (now 0.99 and 0.999)"),
        ({"target_variance_images": 0.1, "r2_position": -0.1}, FACTS, "targets", "Lower --max-lr (now 0.01)"),
        ({"feature_std": 0.001}, FACTS, "features", "Lower --max-lr (now 0.01)"),
        ({"feature_std": 0.01}, FACTS, "features", "Lower --max-lr (now 0.01)"),
        ({"rankme": 1.5}, FACTS, "rank", "Lower --max-lr (now 0.01)"),
        ({"r2_constant": 0.001, "r2_position": -0.1}, FACTS, "constant", "--max-lr 0.001 or 0.1"),
        ({"r2_position": 0.001}, FACTS, "place", "Train for longer"),
        ({"skipped": 50}, FACTS, "numbers", "--precision fp32"),
        ({"target_variance_images": 0.001}, replace(FACTS, tau=None), "plain", "at what `scan` says"),
    ],
)
def test_each_problem_has_its_words_and_its_remedy(later, facts, name, remedy):
    said, now = judged(after(HEALTHY, later), facts)
    assert now.verdict == name and now.level == "bad" and remedy in now.text
    assert said[-1][1].verdict == name


def test_what_was_seen_of_pixels_is_no_measure_of_the_teachers_targets():
    later = {"target_variance_images": 0.1, "r2_position": None, "r2_constant": None}
    assert "targets" in [v.verdict for _, v in judged(after(HEALTHY, later))[0]]
    said, _ = judged(after(HEALTHY | {"phase": "pixels"}, later | {"phase": None}))
    assert [v.verdict for _, v in said if v.level == "bad"] == []


def test_prototypes_crowded_and_unused():
    now = judged(after(CLUSTERS, {"entropy": 0.2}), CLUSTERING)[1]
    assert now.verdict == "crowded" and "n_prototypes=256" in now.text and "mean_entropy_weight" not in now.text
    now = judged(after(CLUSTERS, {"loss": math.log(1024)}), CLUSTERING)[1]
    assert now.verdict == "unused" and "ln(1024) = 6.93" in now.text and "epsilon" in now.text
    msn = replace(CLUSTERING, knobs=("n_prototypes", "mean_entropy_weight"))
    assert "mean_entropy_weight" in judged(after(CLUSTERS, {"entropy": 0.2}), msn)[1].text
    # The loss of MSN has a second term; what counts is the cross entropy.
    assert judged(after(CLUSTERS, {"loss": 6.95, "cross_entropy": 6.2}), msn)[1].verdict == "learning"


def test_one_odd_reading_says_nothing_and_two_do():
    lines = [HEALTHY] * 10
    lines[5] = HEALTHY | {"feature_std": 0.01}
    assert [v.verdict for _, v in judged(lines)[0]] == ["early", "learning"]
    lines[6] = lines[5]
    said, now = judged(lines)
    assert [(s, v.verdict) for s, v in said] == [
        (100, "early"),
        (300, "learning"),
        (700, "features"),
        (800, "learning"),
    ]
    assert now.verdict == "learning"


def test_the_last_reading_counts_alone():
    assert judged([HEALTHY] * 9 + [HEALTHY | {"rankme": 1.0}])[1].verdict == "rank"


def test_what_was_never_there_cannot_be_lost():
    """Photos of one kind of thing: little spread and few directions from the start are no collapse."""
    alike = HEALTHY | {"feature_std": 0.02, "rankme": 2.0, "target_variance_images": 0.02}
    assert judged([alike] * 10)[1].verdict == "learning"


def test_what_collapsed_before_the_first_reading_is_seen_all_the_same():
    assert judged([HEALTHY | {"feature_std": 0.0005, "rankme": 1.05}] * 10)[1].verdict == "features"


def test_targets_that_never_differed_are_no_collapse():
    now = judged([HEALTHY | {"target_variance_images": 0.002}] * 10)[1]
    assert now.verdict == "plain" and "collaps" not in now.text + now.headline


def test_the_first_steps_of_fp16_may_be_skipped_and_later_ones_may_not():
    long = replace(FACTS, total_steps=10_000)
    judge = Judge(long)
    judge.add({"step": 20, "skipped": 4, **HEALTHY})
    judge.add({"step": 40, "skipped": 8, **HEALTHY})
    assert judge.now.level == "early"
    for step in (8000, 9000):
        judge.add({"step": step, "skipped": 8, **HEALTHY})
    assert judge.now.verdict == "learning"
    for step in (9100, 9200):
        judge.add({"step": step, "skipped": step // 2, **HEALTHY})
    assert judge.now.verdict == "numbers"


def test_without_anything_to_learn_by_it_does_not_say_that_it_learns():
    bare = {"feature_std": 0.6, "rankme": 40.0, "loss": 0.1}
    now = judged([bare] * 10)[1]
    assert now.verdict == "quiet" and now.level == "early" and "--eval-path" in now.text


def test_a_suspicion_at_the_last_reading_counts_at_the_end():
    judge = Judge(FACTS)
    for step in range(100, 1000, 100):
        judge.add({"step": step, **HEALTHY})
    judge.add({"step": 995, **HEALTHY, "rankme": 1.0})
    assert judge.now.verdict == "learning"
    assert judge.add({"step": 1000, "loss": 1.0}).verdict == "rank" and judge.now.level == "bad"


def test_accuracies_on_other_images_and_from_the_middle_of_a_run_are_no_baseline():
    judge = Judge(FACTS, labelled="mine")
    judge.add({"step": 0, "knn": 90.0, "knn_images": 2000, "knn_path": "others"})
    judge.add({"step": 100, "knn": 40.0, "knn_images": 2000, "knn_path": "mine"})
    for step in range(100, 1100, 100):
        judge.add({"step": step, **HEALTHY})
    assert judge.untrained is None and judge.now.verdict == "learning" and "untrained" not in judge.now.text


def test_short_runs_are_not_blamed_for_having_learned_nothing_yet():
    slow = HEALTHY | {"r2_constant": -0.1, "r2_position": -0.3}
    assert judged([slow] * 10)[1].verdict == "constant"
    assert judged([slow] * 10, replace(FACTS, total_steps=400))[1].verdict == "early"
    assert judged([slow] * 4 + [HEALTHY] * 6)[1].verdict == "learning"
    assert judged([slow] * 4 + [HEALTHY] * 6)[0][1][1].verdict == "learning", "before half of the run nothing is said"


def test_a_long_run_is_told_before_its_half():
    long = replace(FACTS, total_steps=100_000)
    said, _ = judged([HEALTHY | {"r2_constant": -0.1, "r2_position": -0.3}] * 20, long)
    assert [(step, v.verdict) for step, v in said] == [(5_000, "early"), (25_000, "constant")]


def test_labels_decide_where_there_are_some():
    def with_knn(*accuracies):
        lines = [HEALTHY] * 10
        judge = Judge(FACTS)
        judge.add({"step": 0, "knn": accuracies[0], "knn_images": 2000})
        for n, line in enumerate(lines):
            if n < len(accuracies) - 1:
                judge.add({"step": 100 * n + 50, "knn": accuracies[n + 1], "knn_images": 2000})
            judge.add({"step": 100 * (n + 1), **line})
        return judge.now

    assert with_knn(30.0, 40.0).verdict == "learning" and "40.0 %, untrained 30.0 %" in with_knn(30.0, 40.0).text
    assert with_knn(30.0, 31.0).verdict == "unproven" and with_knn(30.0, 31.0).level == "early"
    assert with_knn(30.0, 31.0, 32.0, 40.0, 31.0).verdict == "learning", "it does not waver with the noise of a kNN"
    assert with_knn(30.0, 20.0).verdict == "labels" and with_knn(30.0, 20.0).level == "bad"


def test_a_resumed_run_goes_on_judging_by_the_lines_it_finds():
    lines = [{"step": 100 * (n + 1), **line} for n, line in enumerate(after(HEALTHY, {"feature_std": 0.01}))]
    whole, resumed = Judge(FACTS), Judge(FACTS)
    said = [whole.add(line) for line in lines]
    for line in lines[:2]:
        resumed.add(line)
    assert [resumed.add(line) for line in lines[2:]] == said[2:] and resumed.now == whole.now


def test_lines_without_a_reading_say_nothing():
    judge = Judge(FACTS)
    assert judge.add({"step": 10, "loss": 1.0}) is None and judge.add({"step": 20, "feature_std": None}) is None
    assert judge.now.level == "early"
