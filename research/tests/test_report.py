"""A study's statistics against values worked out by hand, and its report as people read it."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError
from research import stats
from research.commonsense import OTHER_METRIC, TASKS, USUAL_METRIC, mean_accuracies
from research.pages import markdown
from research.plot import draw, legible
from research.records import Curve, Result, Tried
from research.report import tables

approx: Any = pytest.approx  # equal to numbers

# 97.5 % quantiles of Student's t by degrees of freedom, from a printed table.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 14: 2.145, 29: 2.045}

whole = st.lists(st.integers(-20, 20), min_size=2, max_size=8)


def result(
    method: str,
    task: str = "sums",
    seed: int = 0,
    accuracy: tuple[float, ...] = (0.2, 0.4, 0.8),
    loss: tuple[float, ...] = (3.0, 2.0, 1.0),
    ranks: tuple[int, ...] = (1, 2, 8),
    tokens: int = 1000,
    seconds: float = 10.0,
    parameters: int = 64,
) -> Result:
    return Result(method, task, seed, ranks, Curve(loss, accuracy), (1e-3,) * len(ranks), tokens, seconds, parameters)


def flat(method: str, height: float, task: str = "sums", seed: int = 0, loss: float = 1.0, **others: Any) -> Result:
    """A curve whose AURAC is its height and whose mean loss is its loss, at three ranks."""
    return result(method, task, seed, (height,) * 3, (loss,) * 3, **others)


def study() -> list[Result]:
    """Two seeds of two tasks; ``nested/prefix`` is the best, and ``lora/prefix`` lacks one task."""
    found = []
    for seed in (0, 1):
        up = 0.1 * seed
        for task in ("sums", "words"):
            found.append(result("lora-each", task, seed, (0.3, 0.5, 0.7 + up), (0.9, 0.8, 0.7), tokens=3000))
            found.append(result("nested/prefix", task, seed, (0.4, 0.5, 0.7 + 2 * up), (0.8, 0.8, 0.75 + up)))
        found.append(result("lora/prefix", "sums", seed, (0.1, 0.2, 0.7 + up), (2.0, 1.5, 0.7), seconds=5.0))
    return found


def written(results: list[Result], **others: Any) -> str:
    return tables(results, **{"title": "Study", "about": {}, "tried": ()} | others)


def rates_of(method: str, task: str, losses: dict[float, float]) -> Tried:
    return Tried(method, task, 8, losses, min(losses, key=losses.__getitem__))


def section(text: str, heading: str) -> str:
    """The text between one heading and the next of its level or above."""
    level = len(re.match("#+", heading)[0])  # type: ignore[index]
    assert f"\n{heading}\n" in text
    return re.split(rf"\n#{{1,{level}}} ", text.split(f"\n{heading}\n")[1])[0]


def row(text: str, *start: str) -> list[str]:
    """The cells of the first row that starts with these cells."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    return next(cells for cells in rows if tuple(cells[: len(start)]) == start)


# Means and intervals.


@pytest.mark.parametrize("degrees", T)
def test_an_interval_is_the_t_quantile_times_the_standard_error(degrees: int) -> None:
    numbers = np.random.default_rng(degrees).normal(3, 2, degrees + 1)
    found = stats.estimate(list(numbers))
    assert found is not None
    assert found.n == degrees + 1
    assert found.mean == approx(numbers.sum() / len(numbers))
    error = np.sqrt(((numbers - numbers.mean()) ** 2).sum() / degrees / len(numbers))
    assert found.half_width == approx(T[degrees] * error, rel=3e-4)


def test_what_sums_a_curve_up() -> None:
    one = result("a/prefix")
    # Over log2: (0.2+0.4)/2 * 1 + (0.4+0.8)/2 * 2 = 1.5, over 3. Over the rank: 0.3 * 1 + 0.6 * 6 = 3.9, over 7.
    assert stats.aurac_log2(one) == approx(0.5)
    assert stats.aurac_linear(one) == approx(3.9 / 7)
    assert stats.mean_loss(one) == approx(2.0)
    assert stats.worst_rank_gap(one) == approx(0.6)
    # The worst rank need not be the first.
    assert stats.worst_rank_gap(result("a/prefix", accuracy=(0.5, 0.1, 0.4))) == approx(0.3)
    assert [stats.accuracy_at(rank)(one) for rank in (1, 2, 4, 8, None)] == [0.2, 0.4, None, 0.8, 0.8]
    assert [stats.loss_at(rank)(one) for rank in (1, 2, 4, 8, None)] == [3.0, 2.0, None, 1.0, 1.0]


def chosen(seed: int, method: str = "lora/svd", ranks: tuple[int, ...] = (1, 8)) -> Result:
    """Of choices: number n of the tasks has 10 n, and 1 more at rank 1, 2 more at rank 8, and 3 more with seed 1."""
    parts = {
        task: {
            USUAL_METRIC[task]: [0.1 * n, *(0.1 * n + {1: 0.01, 8: 0.02}[rank] + 0.03 * seed for rank in ranks)],
            OTHER_METRIC[task]: [0.05] * (1 + len(ranks)),
        }
        for n, task in enumerate(TASKS)
    }
    accuracy = tuple(mean_accuracies(parts)[1:])
    return Result(method, "eight", seed, ranks, Curve(accuracy, accuracy, parts), (1e-3,) * len(ranks), 1, 1.0, 1)


def test_choices_have_a_row_for_each_method_and_rank_and_one_for_the_base_model() -> None:
    text = written([*(chosen(seed) for seed in (0, 1)), chosen(0, "lora-each")])
    usual, other = text.split("by each task's other metric:")
    usual = usual.split("by each task's usual metric:")[1]
    heading = row(usual, "method", "rank")
    assert heading[2:] == [*(f"{task} ({USUAL_METRIC[task]})" for task in TASKS), "mean"]
    assert heading[2 + list(TASKS).index("piqa")] == "piqa (acc_norm)"
    assert row(usual, "the base model")[1:] == ["", *(f"{10 * n}.0 ± 0.0" for n in range(8)), "35.0 ± 0.0"]
    # Half of 3 points apart, times the quantile of one degree of freedom: 1.5 * 12.706.
    assert row(usual, "lora/svd", "8")[2:] == [*(f"{10 * n + 3.5} ± 19.1" for n in range(8)), "38.5 ± 19.1"]
    assert row(usual, "lora-each", "1")[2:] == [*(f"{10 * n + 1}.0" for n in range(8)), "36.0"]
    assert row(other, "lora/svd", "1")[2:] == ["5.0 ± 0.0"] * 9
    assert len(re.findall("the base model", usual)) == 1
    assert "metric:" not in written(study())


# Differences and tests.


def test_differences_are_those_of_common_tasks_and_seeds() -> None:
    some = [
        flat("a/prefix", height, task, seed) for height, task, seed in ((0.5, "x", 0), (0.6, "x", 1), (0.9, "y", 0))
    ]
    others = [flat("b/prefix", h, task, seed) for h, task, seed in ((0.25, "x", 1), (0.1, "x", 2), (0.4, "y", 0))]
    found = stats.differences([*some, *others], "a/prefix", "b/prefix", stats.accuracy_at(2))
    assert found == {("x", 1): approx(0.35), ("y", 0): approx(0.5)}
    pooled = stats.mean([*some, *others], "a/prefix", stats.accuracy_at(2), minus="b/prefix")
    # Of 0.35 and 0.5: half their distance is their standard error.
    assert pooled is not None
    assert (pooled.mean, pooled.n) == (approx(0.425), 2)
    assert pooled.half_width == approx(12.706 * 0.075, rel=1e-4)
    one = stats.mean([*some, *others], "a/prefix", stats.accuracy_at(2), "y", "b/prefix")
    assert one == stats.Estimate(approx(0.5), None, 1)
    assert stats.mean(some, "a/prefix", stats.accuracy_at(2), minus="b/prefix") is None


@settings(max_examples=50, deadline=None)
@given(whole)
def test_p_is_the_share_of_sign_flips_that_are_as_far_from_zero(numbers: list[int]) -> None:
    sums = [sum(s * n for s, n in zip(signs, numbers, strict=True)) for signs in product((1, -1), repeat=len(numbers))]
    expected = sum(abs(total) >= abs(sum(numbers)) for total in sums) / len(sums)
    found = stats.sign_flip_p([float(number) for number in numbers])
    assert found == approx(expected, rel=1e-12)
    assert stats.sign_flip_p([-float(number) for number in numbers]) == found
    # Accuracies are no whole numbers: what is rounded otherwise is as far from zero all the same.
    assert stats.sign_flip_p([number / 300 for number in numbers]) == approx(expected, rel=1e-12)


def test_holm_by_hand() -> None:
    # In order: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not be below the one before.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_a_comparison_is_pooled_and_corrected_for_the_rivals_that_have_pairs() -> None:
    pairs = [(task, seed) for task in ("x", "y") for seed in (0, 1, 2)]
    results = [flat("a/prefix", 0.5, task, seed, loss=1.0) for task, seed in pairs]
    results += [flat("b/prefix", 0.4, task, seed, loss=1.5) for task, seed in pairs]
    results += [flat("c/prefix", 0.5 + 0.1 * seed, "x", seed) for seed in (1, 2)]
    results += [flat("d/prefix", 0.1, "x", 7)]
    rivals = ["d/prefix", "b/prefix", "c/prefix"]
    d, b, c = stats.compare(results, "a/prefix", rivals, stats.aurac_log2)
    assert d == stats.Comparison("d/prefix", None, None, None)
    assert b.difference is not None
    assert (b.difference.n, b.difference.mean, b.p) == (6, approx(0.1), approx(2 / 64))
    assert c.difference is not None
    assert (c.difference.n, c.difference.mean, c.p) == (2, approx(-0.15), approx(0.5))
    assert (b.holm, c.holm) == (approx(4 / 64), approx(0.5))
    (loss,) = stats.compare(results, "a/prefix", ["b/prefix"], stats.mean_loss)
    assert loss.difference == stats.Estimate(approx(-0.5), approx(0), 6)
    assert loss.holm == loss.p == approx(2 / 64)


# The report.


def test_the_tables_of_a_task_by_hand() -> None:
    text = section(written(study()), "## Task sums")
    # lora-each: 70 and 80 at the last rank, so AURAC log2 160 / 3 and 170 / 3, linear 400 / 7 and 430 / 7; each
    # interval is 12.706 times half the distance. nested/prefix: 70 and 90.
    assert row(text, "method") == ["method", "seeds", "1", "2", "8", "AURAC log2", "linear", "gap"]
    each = ["lora-each", "2", "30.0 ± 0.0", "50.0 ± 0.0", "75.0 ± 63.5", "55.0 ± 21.2", "59.3 ± 27.2", "45.0 ± 63.5"]
    nested = ["nested/prefix", "2", "40.0 ± 0.0", "50.0 ± 0.0", "80.0 ± 127.1"]
    assert row(text, "lora-each") == each
    assert row(text, "nested/prefix")[:5] == nested
    accuracy, loss = text.split("Loss at each rank:")
    assert re.findall(r"^\| ([\w/-]+) \| 2", accuracy, re.M) == ["nested/prefix", "lora-each", "lora/prefix"]
    assert re.findall(r"^\| ([\w/-]+) \| 2", loss, re.M) == ["nested/prefix", "lora-each", "lora/prefix"]
    assert row(loss, "method") == ["method", "seeds", "1", "2", "8", "mean"]
    # 0.75 and 0.85, mean 2.35 / 3 and 2.45 / 3.
    assert row(loss, "nested/prefix")[1:5] == ["2", "0.800 ± 0.000", "0.800 ± 0.000", "0.800 ± 0.635"]
    assert row(loss, "nested/prefix")[5] == "0.800 ± 0.212"


TESTS = "## One method against the others, over all tasks"


def test_the_winner_is_tested_against_all_others() -> None:
    text = section(written(study()), TESTS)
    assert "nested/prefix was picked here" in text
    accuracy, loss = text.split("Mean loss over the ranks")
    # The first rank weighs 1/6 and the last 1/3: of 10 points at the first, and at the second seed also at the last,
    # 1.67 and 5.00, twice; sd 1.925, times 3.182 / 2. On each task by itself: sd 2.357, times 12.706 / sqrt(2).
    by_task = ["+3.3 ± 21.2"] * 2
    assert row(accuracy, "rival")[-2:] == ["sums", "words"]
    assert row(accuracy, "lora-each") == ["lora-each", "4", "+3.3 ± 3.1", "0.12500", "0.25000", *by_task]
    assert row(accuracy, "lora/prefix")[1] == "2"
    assert row(accuracy, "lora/prefix")[3:5] == ["0.50000", "0.50000"]
    assert row(accuracy, "lora/prefix")[-1] == ""
    # (-0.1 + 0.05) / 3 and (-0.1 + 0.15) / 3.
    assert row(loss, "lora-each") == ["lora-each", "4", "+0.000 ± 0.031", "1.00000", "1.00000", *["+0.000 ± 0.212"] * 2]
    # Of the two p, that of 4 pairs can be 2 / 2 ** 4, and its double after the correction.
    assert "Of a rival with 2 pairs, the fewest here, no p can be below 0.50000; of 2 corrected ones, with 4 " in text
    assert "pairs at the most, none below 0.25000." in text


def test_a_whole_study_does_not_say_that_it_is_partial() -> None:
    whole = [r for r in study() if r.method != "lora/prefix"]
    planned = [(r.method, r.task, r.seed) for r in whole]
    assert "partial" not in written(whole, planned=planned)
    assert "One seed only" not in written(whole)
    more = [*product(["nested/prefix"], ["sums", "words"], [0, 1, 2]), *product(["lora/prefix"], ["unseen"], [0, 1])]
    assert (
        "This study is partial. Not run, or diverged: nested/prefix on sums (1 of 3 seeds), nested/prefix on words "
        "(1 of 3 seeds), lora/prefix on unseen (2 of 2 seeds)."
    ) in written(study(), planned=more)


def test_the_method_to_test_is_nominated_on_validation_data() -> None:
    """By the geometric mean: easy/prefix is a little worse where losses are large, much better where they are not.

    What trains for longer is better at both, and is there for comparison only.
    """
    results = [
        flat(method, 0.5, task)
        for method in ("easy/prefix", "hard/prefix", "half/prefix", "lora-longer/svd", "lora-each")
        for task in ("sums", "words")
    ]
    losses = {"easy/prefix": (2.0, 0.1), "hard/prefix": (1.5, 0.2), "lora-each": (0.1, 0.1)}
    losses["lora-longer/svd"] = (1.0, 0.05)
    tried = [
        rates_of(method, task, {1e-3: loss, 2e-3: 9.0})
        for method, pair in losses.items()
        for task, loss in zip(("sums", "words"), pair, strict=True)
    ]
    tried += [rates_of("half/prefix", "sums", {1e-3: 0.01}), Tried("half/prefix", "words", 8, {1e-3: 0.01}, None)]
    assert stats.nominate(results, tried) == "easy/prefix"
    assert "easy/prefix was picked on validation data" in section(written(results, tried=tried), TESTS)
    diverged = [rates_of(one.method, one.task, {1e-3: math.inf}) for one in tried]
    assert stats.nominate(results, diverged) is None
    assert "easy/prefix was picked here, for its AURAC" in section(written(results, tried=diverged), TESTS)
    named = section(written(results, tried=tried, winner="hard/prefix"), TESTS)
    assert "hard/prefix was named by" in named


def test_hostile_text_stays_text() -> None:
    found = markdown([(1, "a | `x` **b** [c](d) <script>\nnext")])
    assert not re.search(r"(?<!\\)[<`*\[|]", found)
    assert found.count("\n") == 1


# The picture.


def test_a_picture_has_the_reference_the_winner_and_those_listed_first(tmp_path: Path) -> None:
    results = [flat(f"m{n}/prefix", 0.9 - 0.05 * n) for n in (9, *range(9))] + [flat("lora-each", 0.01)]
    kept = [f"m{n}/prefix" for n in range(5)]
    assert legible(results) == [*kept, "m5/prefix", "m9/prefix", "lora-each"]
    assert legible(results, "m8/prefix") == [*kept, "m8/prefix", "m9/prefix", "lora-each"]
    shown = f"8 of the 11 methods: {', '.join(kept)}, m8/prefix, m9/prefix, lora-each."
    assert shown in written(results, winner="m8/prefix")
    with pytest.raises(MatryoshkaError, match="name 1 to 8"):
        draw(results, tmp_path / "a.png", title="Study", methods=[r.method for r in results])
    with pytest.raises(MatryoshkaError, match="name 1 to 8"):
        draw(results, tmp_path / "a.png", title="Study", methods=[])
