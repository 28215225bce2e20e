"""A study's statistics against values worked out by hand, and its report as people read it."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from matryoshka_lora.errors import MatryoshkaError
from research import stats
from research.plot import draw, legible
from research.records import Curve, Result, Tried
from research.report import tables, write_report

# 97.5 % quantiles of Student's t by degrees of freedom, from a printed table.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 14: 2.145, 29: 2.045}

whole = st.lists(st.integers(-20, 20), min_size=2, max_size=8)
shares = st.lists(st.floats(0, 1), max_size=8)


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
    assert found.mean == pytest.approx(numbers.sum() / len(numbers))
    error = np.sqrt(((numbers - numbers.mean()) ** 2).sum() / degrees / len(numbers))
    assert found.half_width == pytest.approx(T[degrees] * error, rel=3e-4)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert stats.estimate([]) is None
    single = stats.estimate([0.7])
    assert single == stats.Estimate(0.7, None, 1)
    assert single.sign is None
    assert stats.estimate([0.5, 0.5]) == stats.Estimate(0.5, 0.0, 2)


@pytest.mark.parametrize(
    ("numbers", "sign"), [([1.0, 1.1, 1.2], 1), ([-1.0, -1.1, -1.2], -1), ([-1.0, 1.0, 1.1], 0), ([0.0, 0.0], 0)]
)
def test_the_sign_is_that_of_the_whole_interval(numbers: list[float], sign: int) -> None:
    found = stats.estimate(numbers)
    assert found is not None
    assert found.sign == sign


def test_what_sums_a_curve_up() -> None:
    one = result("a/prefix")
    # Over log2: (0.2+0.4)/2 * 1 + (0.4+0.8)/2 * 2 = 1.5, over 3. Over the rank: 0.3 * 1 + 0.6 * 6 = 3.9, over 7.
    assert stats.aurac_log2(one) == pytest.approx(0.5)
    assert stats.aurac_linear(one) == pytest.approx(3.9 / 7)
    assert stats.mean_loss(one) == pytest.approx(2.0)
    assert stats.worst_rank_gap(one) == pytest.approx(0.6)
    # The worst rank need not be the first.
    assert stats.worst_rank_gap(result("a/prefix", accuracy=(0.5, 0.1, 0.4))) == pytest.approx(0.3)
    assert [stats.accuracy_at(rank)(one) for rank in (1, 2, 4, 8, None)] == [0.2, 0.4, None, 0.8, 0.8]
    assert [stats.loss_at(rank)(one) for rank in (1, 2, 4, 8, None)] == [3.0, 2.0, None, 1.0, 1.0]


# Differences and tests.


def test_differences_are_those_of_common_tasks_and_seeds() -> None:
    some = [
        flat("a/prefix", height, task, seed) for height, task, seed in ((0.5, "x", 0), (0.6, "x", 1), (0.9, "y", 0))
    ]
    others = [flat("b/prefix", h, task, seed) for h, task, seed in ((0.25, "x", 1), (0.1, "x", 2), (0.4, "y", 0))]
    found = stats.differences([*some, *others], "a/prefix", "b/prefix", stats.accuracy_at(2))
    assert found == {("x", 1): pytest.approx(0.35), ("y", 0): pytest.approx(0.5)}
    pooled = stats.mean([*some, *others], "a/prefix", stats.accuracy_at(2), minus="b/prefix")
    # Of 0.35 and 0.5: half their distance is their standard error.
    assert pooled is not None
    assert (pooled.mean, pooled.n) == (pytest.approx(0.425), 2)
    assert pooled.half_width == pytest.approx(12.706 * 0.075, rel=1e-4)
    one = stats.mean([*some, *others], "a/prefix", stats.accuracy_at(2), "y", "b/prefix")
    assert one == stats.Estimate(pytest.approx(0.5), None, 1)
    assert stats.mean(some, "a/prefix", stats.accuracy_at(2), minus="b/prefix") is None


@settings(max_examples=50, deadline=None)
@given(whole)
def test_p_is_the_share_of_sign_flips_that_are_as_far_from_zero(numbers: list[int]) -> None:
    sums = [sum(s * n for s, n in zip(signs, numbers, strict=True)) for signs in product((1, -1), repeat=len(numbers))]
    expected = sum(abs(total) >= abs(sum(numbers)) for total in sums) / len(sums)
    found = stats.sign_flip_p([float(number) for number in numbers])
    assert found == pytest.approx(expected, rel=1e-12)
    assert stats.sign_flip_p([-float(number) for number in numbers]) == found
    # Accuracies are no whole numbers: what is rounded otherwise is as far from zero all the same.
    assert stats.sign_flip_p([number / 300 for number in numbers]) == pytest.approx(expected, rel=1e-12)


def test_p_by_hand() -> None:
    assert stats.sign_flip_p([]) is None
    assert stats.sign_flip_p([0.3]) == 1.0
    assert stats.sign_flip_p([0.0] * 4) == 1.0
    assert stats.sign_flip_p([0.1] * 5) == pytest.approx(2 / 32)
    # Of 16 outcomes, 4 + 3 + 2 - 1 = 8 or more is reached by all plus (10) and by the one flipped (8), either way.
    assert stats.sign_flip_p([4, 3, 2, -1]) == pytest.approx(4 / 16)


def test_many_differences_are_drawn_and_give_the_same_p_each_time() -> None:
    # Of 20 signs, 14 or more are plus with probability 60460 / 2 ** 20.
    numbers = [1.0] * 14 + [-1.0] * 6
    found = stats.sign_flip_p(numbers)
    assert found == pytest.approx(2 * 60460 / 2**20, abs=0.005)
    assert stats.sign_flip_p(numbers) == found
    assert stats.sign_flip_p([-number for number in numbers]) == found
    # Never zero, however rare.
    assert stats.sign_flip_p([1.0] * 40) == pytest.approx(2 / 100_000)


def test_holm_by_hand() -> None:
    # In order: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not be below the one before.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


@given(shares)
def test_holm_is_no_smaller_and_keeps_the_order(ps: list[float]) -> None:
    found = stats.holm(ps)
    assert all(p <= corrected <= 1 for p, corrected in zip(ps, found, strict=True))
    assert not ps or min(found) == pytest.approx(min(1, len(ps) * min(ps)))
    for p, corrected in zip(ps, found, strict=True):
        assert all(corrected <= other for q, other in zip(ps, found, strict=True) if p <= q)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p(p: float) -> None:
    with pytest.raises(MatryoshkaError, match="from 0 to 1"):
        stats.holm([0.5, p])


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
    assert (b.difference.n, b.difference.mean, b.p) == (6, pytest.approx(0.1), pytest.approx(2 / 64))
    assert c.difference is not None
    assert (c.difference.n, c.difference.mean, c.p) == (2, pytest.approx(-0.15), pytest.approx(0.5))
    assert (b.holm, c.holm) == (pytest.approx(4 / 64), pytest.approx(0.5))
    (loss,) = stats.compare(results, "a/prefix", ["b/prefix"], stats.mean_loss)
    assert loss.difference == stats.Estimate(pytest.approx(-0.5), pytest.approx(0), 6)
    assert loss.holm == loss.p == pytest.approx(2 / 64)


def test_a_method_against_its_equal_has_p_1() -> None:
    results = [flat(method, 0.1 * seed, seed=seed) for method in ("a/prefix", "b/prefix") for seed in (1, 2, 3)]
    (found,) = stats.compare(results, "a/prefix", ["b/prefix"], stats.aurac_log2)
    assert found == stats.Comparison("b/prefix", stats.Estimate(0.0, 0.0, 3), 1.0, 1.0)


@pytest.mark.parametrize(
    ("method", "rivals", "message"),
    [
        ("missing", ["a/prefix"], "no method 'missing'; it has a/prefix, b/prefix"),
        ("a/prefix", ["missing"], "no method 'missing'"),
        ("a/prefix", ["a/prefix"], "names a method twice"),
        ("a/prefix", ["b/prefix", "b/prefix"], "names a method twice"),
    ],
)
def test_a_comparison_names_wrong_names(method: str, rivals: list[str], message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        stats.compare([flat("a/prefix", 0.5), flat("b/prefix", 0.5)], method, rivals, stats.aurac_log2)


def test_the_best_has_every_task_and_is_not_the_reference() -> None:
    results = [flat("lora-each", 0.9, task) for task in ("x", "y")]
    results += [flat("easy/prefix", 0.8, "x")]
    results += [flat("a/prefix", height, "x", seed) for seed, height in enumerate((0.4, 0.4, 0.4, 0.4))]
    results += [flat("a/prefix", 0.7, "y")]  # the mean of its tasks is 0.55, that of its curves 0.46
    results += [flat("b/prefix", 0.5, task) for task in ("x", "y")]
    assert stats.ranking(results) == ["lora-each", "a/prefix", "b/prefix", "easy/prefix"]
    assert stats.ranking(results, "x") == ["lora-each", "easy/prefix", "b/prefix", "a/prefix"]
    assert stats.best(results) == "a/prefix"
    assert stats.best([r for r in results if r.method in ("lora-each", "easy/prefix")]) is None


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "no results yet"),
        ([result("a/prefix"), result("a/prefix")], "a/prefix on sums, seed 0 is there twice"),
        ([result("a/prefix"), result("b/prefix", ranks=(1, 2, 4))], r"b/prefix .* other ranks than \[1, 2, 8\]"),
        ([result("a/prefix", accuracy=(0.1, 0.2))], "2 accuracies for 3 ranks"),
        ([result("a/prefix", accuracy=(0.1, 0.2, float("nan")))], "not all finite"),
        ([result("a/prefix", accuracy=(10.0, 20.0, 80.0))], "no shares"),
        ([result("a/prefix", loss=(1.0, 1.0))], "not one loss"),
        ([result("a/prefix", loss=(1.0, 1.0, float("nan")))], "not one loss"),
        ([result("a/prefix", loss=(1.0, 1.0, float("inf")))], "not one loss"),
        ([result("a/prefix", loss=(1.0, -1.0, 1.0))], "not one loss"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(results: list[Result], message: str, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        stats.check(results)
    with pytest.raises(MatryoshkaError, match=message):
        write_report(results, tmp_path / "report", title="Study", about={}, tried=())
    assert not (tmp_path / "report").exists()


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


def test_the_cost_is_a_multiple_of_the_cheapest_cut_of_plain_lora_on_what_both_did() -> None:
    dear = [result("lora/loss", "sums", seed, (0.1, 0.2, 0.7), seconds=7.0) for seed in (0, 1)]
    text = section(written([*study(), *dear]), "## Cost")
    assert "the multiple of lora/prefix," in text
    assert row(text, "lora/prefix") == ["lora/prefix", "2", "1,000", "1.00", "5", "1.00", "256", "1.00"]
    assert row(text, "lora/loss") == ["lora/loss", "2", "1,000", "1.00", "7", "1.40", "256", "1.00"]
    assert row(text, "lora-each") == ["lora-each", "4", "3,000", "3.00", "10", "2.00", "256", "1.00"]
    without = section(written([r for r in study() if r.method != "lora/prefix"]), "## Cost")
    assert "no lora/" in without
    assert row(without, "lora-each") == ["lora-each", "4", "3,000", "", "10", "", "256", ""]


def test_the_multiple_of_the_cost_leaves_out_what_only_one_has_done() -> None:
    results = [result("lora/prefix", seed=seed, tokens=tokens) for seed, tokens in ((0, 100), (2, 9_000))]
    results += [result("a/prefix", seed=seed, tokens=tokens) for seed, tokens in ((0, 300), (1, 9_000))]
    assert row(section(written(results), "## Cost"), "a/prefix")[2:4] == ["4,650", "3.00"]


def test_the_largest_rank_is_read_by_its_interval() -> None:
    def curves(method: str, *last: tuple[float, float]) -> list[Result]:
        return [result(method, "sums", s, (0.1, 0.2, a), (2.0, 2.0, nats)) for s, (a, nats) in enumerate(last)]

    results = curves("lora-each", (0.8, 1.0), (0.7, 1.1), (0.75, 1.2))
    results += curves("worse/prefix", (0.7, 1.5), (0.6, 1.6), (0.64, 1.7))
    results += curves("same/prefix", (0.8, 1.0), (0.7, 1.1), (0.75, 1.2))
    results += curves("open/prefix", (0.7, 1.3), (0.8, 1.0), (0.75, 1.2))
    results += curves("once/prefix", (0.7, 1.3))
    text = section(written(results), "## At the largest rank against LoRA trained at it")
    # -10, -10, -11: mean -10.33, sd 0.577, times 4.303 / sqrt(3) is 1.43.
    worse = ["worse/prefix", "sums", "3", "-10.3 ± 1.4", "+0.500 ± 0.000", "accuracy lower, loss higher"]
    assert row(text, "worse/prefix") == worse
    same = ["same/prefix", "sums", "3", "+0.0 ± 0.0", "+0.000 ± 0.000", "accuracy the same, loss the same"]
    assert row(text, "same/prefix") == same
    assert row(text, "open/prefix")[-1] == "accuracy undecided, loss undecided"
    assert row(text, "once/prefix")[2:] == ["1", "-10.0", "+0.300", "accuracy of one seed, loss of one seed"]
    assert "\n| lora-each |" not in text


def test_a_cut_of_lora_is_no_reference_at_the_largest_rank() -> None:
    """Its learning rate was chosen for all ranks, not for that one."""
    results = [flat("lora/prefix", 0.5, "sums", seed) for seed in (0, 1)]
    results += [flat("a/prefix", 0.6, "sums", seed) for seed in (0, 1)]
    heading = "## At the largest rank against LoRA trained at it"
    assert section(written(results), heading).strip() == "There is no lora-each with the same seeds to compare with."
    each = flat("lora-each", 0.4, "sums", 0)
    assert row(section(written([*results, each]), heading), "a/prefix")[1:4] == ["sums", "1", "+20.0"]


def test_every_rank_is_compared_on_each_task_and_on_all() -> None:
    text = section(written(study()), "## At every rank against LoRA trained at that rank")
    sums, pooled = section(text, "### Task sums"), section(text, "### All tasks")
    # At the last rank 0 and 10 points.
    assert row(sums, "nested/prefix") == ["nested/prefix", "2", "+10.0 ± 0.0", "+0.0 ± 0.0", "+5.0 ± 63.5"]
    # 0, 10, 0, 10: sd 5.774, times 3.182 / 2.
    assert row(pooled, "nested/prefix") == ["nested/prefix", "4", "+10.0 ± 0.0", "+0.0 ± 0.0", "+5.0 ± 9.2"]
    assert row(pooled, "lora/prefix")[:3] == ["lora/prefix", "2", "-20.0 ± 0.0"]
    loss = sums.split("Loss in nats per token, less is better:")[1]
    # 0.05 and 0.15.
    assert row(loss, "nested/prefix")[2:] == ["-0.100 ± 0.000", "+0.000 ± 0.000", "+0.100 ± 0.635"]
    alone = written([r for r in study() if r.task == "sums"])
    assert "### Task sums" in alone
    assert "All tasks" not in alone


def test_a_recipe_is_compared_with_plain_lora_in_the_same_cut() -> None:
    heading = "## At every rank against plain LoRA in the same cut"
    text = section(written(study()), heading)
    # On one task, of which both have two seeds: 30 and 30 points, at the last rank 0 and 10.
    accuracy, loss = text.split("Loss in nats per token, less is better:")
    assert row(accuracy, "nested/prefix") == ["nested/prefix", "2", "+30.0 ± 0.0", "+30.0 ± 0.0", "+5.0 ± 63.5"]
    # 0.05 and 0.15 at the last.
    assert row(loss, "nested/prefix") == ["nested/prefix", "2", "-1.200 ± 0.000", "-0.700 ± 0.000", "+0.100 ± 0.635"]
    assert "| lora" not in text
    assert heading not in written([r for r in study() if r.method != "lora/prefix"])


def test_what_rounds_to_zero_has_no_minus() -> None:
    results = [result("lora-each"), result("a/prefix", accuracy=(0.2, 0.4, 0.7999), loss=(3.0, 2.0, 0.9999))]
    text = section(written(results), "## At the largest rank against LoRA trained at it")
    assert row(text, "a/prefix")[3:5] == ["+0.0", "+0.000"]


def test_tasks_may_have_other_ranks() -> None:
    results = [
        *study(),
        *(result(m, "more", 0, (0.5, 0.6), (1.0, 1.0), (2, 4)) for m in ("lora-each", "nested/prefix")),
    ]
    text = written(results)
    assert row(section(text, "## Task more"), "method")[:4] == ["method", "seeds", "2", "4"]
    pooled = section(text, "### All tasks")
    assert row(pooled, "method") == ["method", "pairs", "1", "2", "4", "8"]
    # Rank 4 is that of one task, with one seed.
    assert row(pooled, "nested/prefix") == ["nested/prefix", "5", "+10.0 ± 0.0", "+0.0 ± 0.0", "+0.0", "+5.0 ± 9.2"]
    assert row(pooled, "lora/prefix")[4] == ""


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


def test_a_winner_can_be_named() -> None:
    text = section(written(study(), winner="lora/prefix"), TESTS)
    assert "lora/prefix was named" in text
    assert "picked here" not in text
    assert re.findall(r"^\| ([\w/-]+) \| \d", text, re.M) == ["nested/prefix", "lora-each"] * 2


def test_a_wrong_name_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="no method 'nestd/prefix'; it has lora-each, lora/prefix, nested/prefix"):
        write_report(study(), tmp_path / "report", title="Study", about={}, tried=(), winner="nestd/prefix")
    assert not (tmp_path / "report").exists()


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


def test_a_single_seed_has_no_intervals() -> None:
    text = written([r for r in study() if r.seed == 1])
    assert "One seed only, and so no interval: sums, words." in text
    assert row(section(text, "## Task sums"), "lora-each")[2:5] == ["30.0", "50.0", "80.0"]
    assert "±" not in section(text, "## Task sums")
    # Both tasks are two pairs.
    assert row(section(text, TESTS), "lora-each") == [
        "lora-each",
        "2",
        "+5.0 ± 0.0",
        "0.50000",
        "1.00000",
        "+5.0",
        "+5.0",
    ]


def test_a_study_without_the_reference_says_so() -> None:
    text = written([r for r in study() if r.method != "lora-each"])
    lacking = "There is no lora-each with the same seeds to compare with."
    assert section(text, "## At every rank against LoRA trained at that rank").strip() == lacking
    alone = written([r for r in study() if r.method == "nested/prefix"])
    assert section(alone, "## At the largest rank against LoRA trained at it").strip() == lacking
    assert row(section(text, TESTS), "lora/prefix")[1] == "2"


@pytest.mark.parametrize("only", ["lora-each", "nested/prefix", "lora/prefix"])
def test_one_method_has_nothing_to_be_tested_against(only: str, tmp_path: Path) -> None:
    results = [r for r in study() if r.method == only]
    assert section(written(results), TESTS).strip().startswith("This takes two methods")
    write_report(results, tmp_path, title="Study", about={}, tried=())
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_rows_about_the_study_and_its_learning_rates() -> None:
    tried = [
        rates_of("nested/prefix", "sums", {1e-3: 0.8, 2e-3: 0.7, 4e-3: math.inf}),
        Tried("lora-each", "words", 2, {5e-4: 0.91}, None),
    ]
    text = written(study(), about={"model": "tiny", "items": "200 per task"}, tried=tried)
    what = section(text, "## What was compared")
    assert row(what, "items") == ["items", "200 per task"]
    assert row(what, "methods") == ["methods", "lora-each, lora/prefix, nested/prefix"]
    assert row(what, "seeds") == ["seeds", "2 of sums, 2 of words"]
    rates = section(text, "## Learning rates")
    assert row(rates, "method") == ["method", "task", "R", "chosen", "0.0005", "0.001", "0.002", "0.004"]
    assert row(rates, "nested/prefix") == ["nested/prefix", "sums", "8", "0.002", "", "0.800", "0.700", "diverged"]
    assert row(rates, "lora-each") == ["lora-each", "words", "2", "", "0.910", "", "", ""]


def test_a_rate_at_the_edge_of_what_was_tried_is_named() -> None:
    inside = rates_of("lora/prefix", "sums", {1e-3: 0.8, 2e-3: 0.7, 4e-3: 0.9})
    edges = [rates_of("nested/prefix", task, {1e-3: 0.6, 2e-3: 0.7}) for task in ("sums", "words")]
    beyond = "a better one may lie beyond: nested/prefix on sums, nested/prefix on words."
    assert beyond in section(written(study(), tried=[inside, *edges]), "## Learning rates")
    assert "beyond" not in section(written(study(), tried=[inside]), "## Learning rates")


def test_the_method_to_test_is_nominated_on_validation_data() -> None:
    """By the geometric mean: easy/prefix is a little worse where losses are large, much better where they are not.

    What trains for longer is better at both, and is there for comparison only.
    """
    results = [
        flat(method, 0.5, task)
        for method in ("easy/prefix", "hard/prefix", "half/prefix", "lora-longer/frobenius", "lora-each")
        for task in ("sums", "words")
    ]
    losses = {"easy/prefix": (2.0, 0.1), "hard/prefix": (1.5, 0.2), "lora-each": (0.1, 0.1)}
    losses["lora-longer/frobenius"] = (1.0, 0.05)
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


def test_every_method_is_compared_with_every_other() -> None:
    results = [flat("a/x", 0.5 + 0.1 * seed, seed=seed, loss=1.0) for seed in (0, 1)]
    results += [flat("b/x", 0.4, seed=seed, loss=1.5) for seed in (0, 1)] + [flat("c/x", 0.9, loss=1.0)]
    text = section(written(results), "## Every method against every other, over all tasks")
    accuracy, loss = text.split("Mean loss over the ranks")
    # Differences of 10 and 20 points: sd 7.07, times 12.706 / sqrt(2).
    assert row(accuracy, "method") == ["method", "c/x", "a/x", "b/x"]
    assert row(accuracy, "a/x") == ["a/x", "-40.0", "", "+15.0 ± 63.5"]
    assert row(accuracy, "b/x") == ["b/x", "-50.0", "-15.0 ± 63.5", ""]
    assert row(loss, "a/x") == ["a/x", "+0.000", "", "-0.500 ± 0.000"]


# The files.


class Page(HTMLParser):
    """A page's text by element, and the proof that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open:
            self.texts.append((self.open[-1], data))


HOSTILE = "<script>alert(1)</script> | `x` **b** {title} &amp; [a](b)\nnext"


def test_the_files_say_the_same(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "title": "Study",
        "about": {"model": "tiny"},
        "tried": [rates_of("nested/prefix", "sums", {1e-3: 0.8, 2e-3: 0.7})],
    }
    (tmp_path / "other.txt").write_text("stays")
    write_report(study(), tmp_path, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"other.txt", "study.md", "study.html", "study.png"}
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert text == tables(study(), **given)
    page = Page((tmp_path / "study.html").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert page.rows == [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    headings = [(f"h{len(level)}", words) for level, words in re.findall(r"^(#+) (.*)$", text, re.M)]
    assert [(tag, words) for tag, words in page.texts if re.fullmatch(r"h\d", tag)] == headings
    paragraphs = [part for part in text.strip().split("\n\n") if part[0] not in "#|!"]
    assert [words for tag, words in page.texts if tag == "p"] == paragraphs


def test_the_page_needs_no_other_file_and_fits_a_phone(tmp_path: Path) -> None:
    write_report(study(), tmp_path, title="Study", about={}, tried=())
    text = (tmp_path / "study.html").read_text(encoding="utf-8")
    page = Page(text)
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1
    head, data = str(sources[0]).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "study.png").read_bytes()
    assert not re.search(r"<script|<link|@import|url\(|https?:", text)
    # Every table scrolls by itself.
    assert text.count("<table") == text.count('<div class="wide"><table')


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    results = [*study(), flat(HOSTILE, 0.5, "sums")]
    write_report(
        results,
        tmp_path,
        title=HOSTILE,
        about={HOSTILE: HOSTILE},
        tried=[Tried(HOSTILE, HOSTILE, 8, {1e-3: 1.0}, None)],
        planned=[(HOSTILE, HOSTILE, 0)],
    )
    page = Page((tmp_path / "study.html").read_text(encoding="utf-8"))
    for tag in ("title", "h1"):
        assert "".join(words for found, words in page.texts if found == tag) == HOSTILE
    assert [HOSTILE, HOSTILE] in page.rows
    assert any(tag == "p" and HOSTILE in words for tag, words in page.texts)
    assert "script" not in {tag for tag, _ in page.texts}
    lines = (tmp_path / "study.md").read_text(encoding="utf-8").splitlines()
    about = next(line for line in lines if line.startswith("| \\<script>"))
    # A row with two cells, in which nothing is markup.
    assert about.count("alert") == 2
    assert len(re.findall(r"(?<!\\)\|", about)) == 3
    assert not re.search(r"(?<!\\)[<`*\[]", about)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MatryoshkaError, match="cannot write"):
        write_report(study(), tmp_path / "file", title="Study", about={}, tried=())
    assert (tmp_path / "file").read_text() == "x"


# The picture.


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.round(imread(path)[:, :, :3] * 255).astype(int)
    return set(map(tuple, pixels.reshape(-1, 3)))


def has(path: Path, colour: str) -> bool:
    return tuple(round(255 * part) for part in to_rgb(colour)) in colours(path)


def test_the_picture_has_a_row_for_each_task_and_a_colour_for_each_method(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw([r for r in study() if r.task == "sums"], one, title="Study", methods=["lora-each", "nested/prefix"])
    draw(study(), two, title="Study", methods=["lora-each", "nested/prefix", "lora/prefix"])
    assert imread(one).shape[1] == imread(two).shape[1] == 1600
    assert imread(two).shape[0] > 1.5 * imread(one).shape[0]
    assert (has(one, "#0072B2"), has(one, "#E69F00")) == (True, False)
    assert (has(two, "#0072B2"), has(two, "#E69F00")) == (True, True)


def test_the_picture_shows_intervals(tmp_path: Path) -> None:
    one = [flat("a/prefix", 0.5)]
    two = [flat("a/prefix", 0.49 + 0.02 * seed, seed=seed, loss=0.99 + 0.02 * seed) for seed in (0, 1)]
    amounts = []
    for results in (one, two):
        draw(results, tmp_path / "a.png", title="Study", methods=["a/prefix"])
        pixels = imread(tmp_path / "a.png")
        amounts.append((pixels[:, :, 2] - pixels[:, :, 0] > 0.3).sum())
    # The line is the same, and six bars of over 100 pixels are new.
    assert amounts[1] > amounts[0] + 600


def test_a_picture_takes_a_loss_of_zero_and_a_single_rank(tmp_path: Path) -> None:
    results = [result("a/prefix", "x", seed, (0.5,), (0.0,), (4,)) for seed in (0, 1)]
    draw(results, tmp_path / "a.png", title="Study", methods=["a/prefix"])
    assert has(tmp_path / "a.png", "#0072B2")


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
