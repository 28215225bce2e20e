"""AURAC against numpy's trapezoid and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError, aurac

curves = st.dictionaries(st.integers(1, 512), st.floats(0, 100), min_size=2, max_size=10).map(
    lambda curve: dict(sorted(curve.items()))
)


@given(curves)
def test_linear_and_log2_are_numpys_trapezoid_over_the_width(curve: dict[int, float]) -> None:
    ranks, accuracies = list(curve), list(curve.values())
    for axis, x in (("linear", np.array(ranks, float)), ("log2", np.log2(ranks))):
        expected = np.trapezoid(accuracies, x) / (x[-1] - x[0])
        assert aurac(accuracies, ranks, axis) == pytest.approx(expected, rel=1e-12, abs=1e-12)  # type: ignore[arg-type]


@given(curves)
def test_it_lies_between_the_extremes_and_a_level_curve_has_its_level(curve: dict[int, float]) -> None:
    for axis in ("linear", "log2"):
        area = aurac(list(curve.values()), list(curve), axis)  # type: ignore[arg-type]
        assert min(curve.values()) - 1e-9 <= area <= max(curve.values()) + 1e-9
        assert aurac([7.5] * len(curve), list(curve), axis) == pytest.approx(7.5)  # type: ignore[arg-type]


def test_by_hand() -> None:
    # Over log2: segments 0-1 and 1-3, (0.2+0.4)/2 * 1 + (0.4+0.8)/2 * 2 = 1.5, over 3.
    assert aurac([0.2, 0.4, 0.8], [1, 2, 8]) == pytest.approx(0.5)
    # Over the rank: (0.2+0.4)/2 * 1 + (0.4+0.8)/2 * 6 = 3.9, over 7.
    assert aurac([0.2, 0.4, 0.8], [1, 2, 8], "linear") == pytest.approx(3.9 / 7)


def test_log2_is_the_default_and_differs_from_linear() -> None:
    assert aurac([0, 1], [1, 4]) == aurac([0, 1], [1, 4], "log2")
    assert aurac([0, 1, 1], [1, 2, 8]) != pytest.approx(aurac([0, 1, 1], [1, 2, 8], "linear"))


@pytest.mark.parametrize("axis", ["log2", "linear"])
@pytest.mark.parametrize("rank", [1, 32])
def test_a_single_rank_has_its_accuracy(axis: Any, rank: int) -> None:
    assert aurac([0.37], [rank], axis) == 0.37


def test_the_linear_axis_puts_82_percent_of_the_weight_on_ranks_64_to_256() -> None:
    # A trapezoid is a weighted mean; the weight of a rank is the area under its unit vector.
    ranks = [2**k for k in range(9)]

    def weight(axis: Any) -> dict[int, float]:
        return {r: aurac([float(r == other) for other in ranks], ranks, axis) for r in ranks}

    linear, log2 = weight("linear"), weight("log2")
    assert sum(linear.values()) == pytest.approx(1)
    assert sum(log2.values()) == pytest.approx(1)
    assert linear[64] + linear[128] + linear[256] == pytest.approx(0.8157, abs=1e-4)
    assert log2[64] + log2[128] + log2[256] == pytest.approx(2.5 / 8)


def test_numpy_arrays_are_taken() -> None:
    assert aurac(np.array([0.0, 1.0]), np.array([1, 2])) == 0.5


@pytest.mark.parametrize(
    ("accuracies", "ranks", "axis", "message"),
    [
        ([0.1, 0.2], [1, 2, 4], "log2", "2 accuracies for 3 ranks; give one for each rank"),
        ([0.1, 0.2], [2, 1], "log2", r"write \[1, 2\]"),
        ([0.1, 0.2], [0, 1], "log2", "rank 0 is not positive"),
        ([], [], "log2", "ranks is empty"),
        ([0.1, math.nan], [1, 2], "log2", "accuracies are not all finite"),
        ([math.inf, 0.1], [1, 2], "linear", "accuracies are not all finite"),
        ([0.1, 0.2], [1, 2], "log10", "axis is 'log10'; write 'log2' or 'linear'"),
        ([0.1], [1], "log", "axis is 'log'"),
    ],
)
def test_bad_input_is_refused(accuracies: list[float], ranks: list[int], axis: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        aurac(accuracies, ranks, axis)
