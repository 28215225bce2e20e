"""Selecting a rank, and the evidence for it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from helpers.evaluations import (
    NUM_CORRECT,
    RANKS,
    evaluation_of,
    new_evaluation,
    two_metrics,
)

from matryoshka_lora import MatryoshkaError, select
from matryoshka_lora.evaluation.results import Metric


@pytest.mark.parametrize(
    ("conditions", "rank"),
    [
        ({"within": "1%"}, 8),
        ({"within": "5%"}, 4),
        ({"within": 0.05}, 4),
        ({"within": "50%"}, 2),
        ({"within": "90%"}, 1),
        ({"max_bytes": 10_000}, 8),
        ({"max_bytes": 399}, 2),
        ({"max_bytes": 100}, 1),
        ({"within": "5%", "max_bytes": "0.5kB"}, 4),
    ],
)
def test_the_smallest_rank_that_meets_the_conditions(conditions: dict[str, Any], rank: int) -> None:
    selection = select(new_evaluation(num_correct={**NUM_CORRECT, 0: 5}), **conditions)
    assert (selection.rank, selection.best_rank, selection.task) == (rank, 8, "family")


def test_a_rank_at_the_bound_is_selected() -> None:
    num_correct = {0: 1, 1: 2, 2: 5, 4: 20, 8: 25}  # as floats, 20 / 60 < 0.8 * 25 / 60
    assert select(new_evaluation(num_correct=num_correct), within="20%").rank == 4


def test_the_smallest_of_equal_ranks_is_selected() -> None:
    num_correct = {**dict.fromkeys(RANKS, 30), 0: 10}
    assert select(new_evaluation(num_correct=num_correct), max_bytes="1MB").rank == 1


def test_a_metric_where_lower_is_better() -> None:
    evaluation = new_evaluation(num_correct={**NUM_CORRECT, 0: 60}, higher_is_better=False)
    selection = select(evaluation, within="99%")
    assert (selection.rank, selection.best_rank) == (1, 1)
    assert selection.bound == pytest.approx(1.99 / 3)
    assert select(evaluation, max_bytes=10_000).rank == 1


def test_the_aurac_of_a_metric() -> None:
    metric = Metric(True, {rank: 0.5 + rank / 16 for rank in RANKS}, {})
    # Trapezoids over log2(rank) of 9, 10, 12 and 16 sixteenths.
    assert metric.aurac("log2") == pytest.approx((9 / 2 + 10 + 12 + 16 / 2) / 3 / 16)
    # Over the rank, the trapezoids are 1, 2 and 4 wide.
    assert metric.aurac("linear") == pytest.approx((9.5 + 2 * 11 + 4 * 14) / 7 / 16)
    assert Metric(False, dict.fromkeys(RANKS, 1.0), {}).aurac("log2") is None


@pytest.mark.parametrize(
    ("within", "rank", "unresolved"), [("2%", 4, (8,)), ("25%", 4, ()), ("0.1%", 8, ())]
)
def test_significance_is_tested_against_larger_ranks(
    within: str, rank: int, unresolved: tuple[int, ...]
) -> None:
    """Rank 4 fails at one example of 60 more than rank 8: 1.7 % with an error as large."""
    selection = select(new_evaluation(), within=within)
    assert (selection.rank, selection.unresolved_ranks) == (rank, unresolved)
    assert selection.is_significant == (not unresolved)
    assert (selection.num_questions_needed is None) == (not unresolved)


def test_the_best_rank_is_tested_too() -> None:
    """All ranks answer 20 questions correctly, which is no evidence for rank 1."""
    selection = select(evaluation_of(np.ones((20, 4))), within="1%")
    assert (selection.rank, selection.best_rank) == (1, 1)
    assert selection.unresolved_ranks == (2, 4, 8)
    first, second, *_ = str(selection).splitlines()
    assert "Too few questions" in first
    assert "values alone: Rank 1" in second


def test_nothing_is_claimed_of_a_size() -> None:
    selection = select(new_evaluation(), max_bytes="1MB")
    assert (selection.is_significant, selection.within, selection.bound) == (None, None, None)


@pytest.mark.parametrize("num_different", [0, 1])
def test_the_number_of_questions_that_would_be_enough(num_different: int) -> None:
    values = np.ones((60, 4))
    values[:num_different, :3] = 0
    values[-3:] = 0
    number = select(evaluation_of(values), within="3%").num_questions_needed
    assert number is not None
    for factor, is_significant in ((1, True), (0.2, False)):
        more = np.tile(values, (int(number * factor) // 60 + 1, 1))
        assert select(evaluation_of(more), within="3%").is_significant == is_significant


def _draw(random: np.random.Generator, num: int, correlation: float) -> Any:
    """Return how hard each question is for each rank, from 0 to 1, shape (questions, ranks).

    At a correlation of 1, a rank answers all the questions that a worse rank answers.
    """
    shared, own = random.standard_normal((num, 1)), random.standard_normal((num, len(RANKS)))
    normal = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    return np.vectorize(NormalDist().cdf)(normal)


@pytest.mark.parametrize("correlation", [0, 0.8, 1])
@pytest.mark.parametrize(("num", "runs"), [(20, 300), (100, 200), (1000, 60)])
@pytest.mark.parametrize(
    ("accuracies", "within"),
    [
        ((0.80, 0.88, 0.92, 0.95), 0.01),
        ((0.94, 0.94, 0.94, 0.95), 0.01),
        ((0.895, 0.895, 0.895, 1.00), 0.10),  # just worse than a claim would say
    ],
)
def test_false_claims_are_rare(
    accuracies: tuple[float, ...], within: float, num: int, runs: int, correlation: float
) -> None:
    random = np.random.default_rng(0)
    false_claims = 0
    for _ in range(runs):
        answers = (_draw(random, num, correlation) < accuracies).astype(float)
        selection = select(evaluation_of(answers), within=within)
        accuracy, *larger = accuracies[RANKS.index(selection.rank) :]
        is_true = not larger or accuracy >= (1 - within) * max(larger)
        false_claims += bool(selection.is_significant) and not is_true
    assert false_claims <= 0.05 * runs


@pytest.mark.parametrize("num", [20, 100])
def test_false_claims_of_a_loss_are_rare(num: int) -> None:
    """The small ranks lose 1 nat at 6 % of the questions, and the mean loss is 0.5."""
    random = np.random.default_rng(0)
    false_claims = 0
    for _ in range(200):
        losses = random.gamma(2, 0.25, (num, 1)) + 0.01 * random.standard_normal((num, 4))
        losses[:, :3] += random.random((num, 1)) < 0.06
        selection = select(evaluation_of(losses, higher_is_better=False), within="10%")
        false_claims += bool(selection.is_significant) and selection.rank < 8
    assert false_claims <= 10


def test_enough_questions_make_a_claim() -> None:
    answers = (_draw(np.random.default_rng(0), 1000, 0.8) < (0.5, 0.94, 0.95, 0.95)).astype(float)
    selection = select(evaluation_of(answers), within="5%")
    assert (selection.rank, selection.is_significant) == (2, True)
    first, second, *_ = str(selection).splitlines()
    assert "No larger rank is better than rank 2 by more than 5%" in first
    assert second.startswith("Rank 2")


def test_a_selection_is_json() -> None:
    fields = json.loads(json.dumps(select(new_evaluation(), within="2%").to_dict()))
    assert (fields["rank"], fields["unresolved_ranks"], fields["is_significant"]) == (4, [8], False)
    assert fields["differences_by_rank"]["8"]["value"] == pytest.approx(1 / 60)


def test_without_errors_the_number_of_questions_is_unknown() -> None:
    evaluation = new_evaluation()
    evaluation.examples = []
    evaluation.metric().standard_errors[4] = None
    selection = select(evaluation, within="5%")
    assert (selection.unresolved_ranks, selection.num_questions_needed) == ((8,), None)


def test_differences_are_relative_to_the_selected_rank() -> None:
    differences = select(new_evaluation(), within="5%").differences()
    assert {rank: difference.value for rank, difference in differences.items()} == pytest.approx(
        {0: -36 / 60, 1: -36 / 60, 2: -16 / 60, 8: 1 / 60}
    )


def test_an_evaluation_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_evaluation("family", "words").write(tmp_path)
    assert select(tmp_path, within="5%", task="words").rank == 4
    monkeypatch.chdir(tmp_path)
    assert select(".", within="5%", task="words").rank == 4
    with pytest.raises(MatryoshkaError, match="task"):
        select(tmp_path, within="5%")


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        ({}, "within"),
        ({"within": "101%"}, "share"),
        ({"max_bytes": 99}, "best is rank 8"),
        ({"within": "1%", "max_bytes": 400}, "best is rank 8"),
        ({"max_bytes": "many"}, "size"),
        ({"within": "1%", "metric": "los"}, "metric"),
    ],
)
def test_invalid_conditions(arguments: dict[str, Any], keyword: str) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        select(new_evaluation(), **arguments)


def test_a_metric_that_does_not_define_what_is_better() -> None:
    with pytest.raises(MatryoshkaError, match="higher_is_better"):
        select(new_evaluation(higher_is_better=None), within="1%")


def test_a_task_without_values() -> None:
    evaluation = new_evaluation()
    evaluation.metric().values.update(dict.fromkeys(RANKS))
    with pytest.raises(MatryoshkaError, match="value"):
        select(evaluation, within="1%")


@pytest.mark.parametrize("num_correct_of_base", [NUM_CORRECT[8], NUM_CORRECT[8] + 1])
def test_no_rank_is_better_than_the_base_model(num_correct_of_base: int) -> None:
    num_correct = {**NUM_CORRECT, 0: num_correct_of_base}
    with pytest.raises(MatryoshkaError, match="Train longer"):
        select(new_evaluation(num_correct=num_correct), within="1%")


def test_a_difference_from_the_base_model_may_be_chance() -> None:
    """One right answer of 60 is a difference smaller than two errors."""
    selection = select(
        new_evaluation(num_correct={**dict.fromkeys(RANKS, 1), 0: 0}), max_bytes="1MB"
    )
    assert selection.rank == 1
    difference = selection.differences()[0]
    assert difference.value == pytest.approx(-1 / 60)
    assert "cannot be told apart" in str(difference)


@pytest.mark.parametrize("has_base", [True, False])
def test_no_answer_is_right(has_base: bool) -> None:
    evaluation = new_evaluation(num_correct=dict.fromkeys((0, *RANKS), 0))
    if not has_base:
        del evaluation.metric().values[0]
    with pytest.raises(MatryoshkaError, match="0 at every rank"):
        select(evaluation, within="1%")
    loss = Metric(False, dict.fromkeys(RANKS, 1.0), {})
    evaluation.tasks["family"].metrics["loss,none"] = loss
    with pytest.raises(MatryoshkaError, match="metric='loss'"):
        select(evaluation, within="1%")
    assert select(evaluation, within="1%", metric="loss").rank == 1


def test_without_the_base_model_equal_ranks_are_evidence_for_the_smallest() -> None:
    evaluation = new_evaluation(num_correct=dict.fromkeys((0, *RANKS), 30))
    del evaluation.metric().values[0]
    selection = select(evaluation, within="1%")
    assert selection.rank == 1
    assert 0 not in selection.differences()


def test_ranks_that_are_not_better_than_the_base_model_are_not_selected() -> None:
    assert NUM_CORRECT[1] == NUM_CORRECT[0]
    assert select(new_evaluation(), within="90%").rank == 2


def test_a_selection_shows_the_evidence() -> None:
    text = repr(select(two_metrics(), within="60%"))
    assert "Rank 1 (1.00kB): acc 0.500" in text
    assert "rank 4 is better by 0.250" in text
    assert "the base model is worse by 0.250" in text
    assert "told apart" not in text


@pytest.mark.parametrize(("within", "unresolved"), [("60%", (2,)), ("34%", (2, 4))])
def test_without_examples_the_values_count_as_independent(
    within: str, unresolved: tuple[int, ...]
) -> None:
    """Rank 2 has no value, and rank 4 is better by 0.250 ± 0.064."""
    assert select(two_metrics(), within=within).unresolved_ranks == unresolved


def test_a_selection_by_loss_says_that_no_answer_is_right() -> None:
    without_answers = two_metrics()
    without_answers.metric().values.update(dict.fromkeys((0, 1, 2, 4), 0.0))
    metrics = without_answers.tasks["task0"].metrics
    metrics["loss,none"].values[0] = 3.0
    metrics["f1,none"] = Metric(True, dict.fromkeys((0, 1, 2, 4)), {})  # undefined, and not 0
    text = repr(select(without_answers, within="60%", metric="loss"))
    assert "Rank 1 (1.00kB): loss 2.000" in text
    assert "acc is 0 at every rank" in text
    assert "f1" not in text
