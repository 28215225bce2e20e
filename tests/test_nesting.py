"""Ranks, scales and P by the formulas of the paper."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from helpers import oracle
from helpers.rules import NESTINGS
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting

# p on the components 1 | 2 | 3-4 | 5-8 | 9-16 | 17-32 | ..., summed by hand.
PAPER_TABLE = [
    (32, "none", [6, 5, 4, 3, 2, 1]),
    (32, "sqrt", [2.98744, 1.98744, 1.28033, 0.78033, 0.42678, 0.17678]),
    (32, "rank", [1.96875, 0.96875, 0.46875, 0.21875, 0.09375, 0.03125]),
    (256, "none", [9, 8, 7, 6, 5, 4, 3, 2, 1]),
]


@pytest.mark.parametrize(("max_rank", "scaling", "values"), PAPER_TABLE)
def test_p_is_the_table_of_the_paper(max_rank: int, scaling: Any, values: list[float]) -> None:
    widths = [1, *(2**k for k in range(len(values) - 1))]
    paper_scale = {"none": 1.0, "rank": 1 / max_rank, "sqrt": max_rank**-0.5}[scaling]  # alpha = 1
    diagonal = Nesting.powers_of_two(max_rank, scaling, paper_scale).diagonal()
    assert diagonal.dtype == np.float64
    np.testing.assert_allclose(diagonal, np.repeat(values, widths), rtol=0, atol=1e-5)


@given(NESTINGS, st.data())
def test_p_prefix_and_scale_are_the_formulas(nesting: Nesting, data: st.DataObject) -> None:
    arguments: Any = (nesting.scaling, nesting.scale)
    expected = oracle.trained_p(nesting.ranks, *arguments).numpy()
    np.testing.assert_allclose(nesting.diagonal(), expected, rtol=1e-12)
    rank = data.draw(st.integers(1, nesting.max_rank))
    expected = oracle.prefix_p(nesting.ranks, rank, *arguments).numpy()
    np.testing.assert_allclose(nesting.prefix(rank), expected, rtol=1e-12)
    assert nesting.scale_at(rank) == pytest.approx(expected[0], rel=1e-12)
    assert nesting.scale_at(nesting.max_rank) == nesting.scale


@pytest.mark.parametrize(
    ("max_rank", "ranks"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_powers_of_two_end_with_the_largest_rank(max_rank: int, ranks: tuple[int, ...]) -> None:
    assert Nesting.powers_of_two(max_rank).ranks == ranks


def test_numpy_integers_become_json() -> None:
    nesting = Nesting(np.array([1, 4, 8]), "rank", np.float64(4))  # type: ignore[arg-type]
    assert nesting == Nesting((1, 4, 8), "rank", 4)
    assert json.loads(json.dumps([nesting.ranks, nesting.scale])) == [[1, 4, 8], 4]
    assert type(nesting.scale) is float


@pytest.mark.parametrize(
    ("ranks", "scaling", "scale", "keyword"),
    [
        ([4, 2, 2, 1], "none", 1, "increasing"),
        ([0, 1], "none", 1, "at least 1"),
        ([1, np.float64(4)], "none", 1, "integer"),
        ([True, 2], "none", 1, "integer"),
        ("1248", "none", 1, "integer"),
        ([], "none", 1, "empty"),
        ([1, 2], "rslora", 1, "scaling"),
        ([1, 2], "none", math.nan, "scale"),
        ([1, 2], "none", math.inf, "scale"),
        ([1, 2], "none", 0, "scale"),
        ([1, 2], "none", 10**400, "scale"),
    ],
)
def test_invalid_arguments_are_rejected(
    ranks: Any, scaling: Any, scale: float, keyword: str
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        Nesting(ranks, scaling, scale)


@pytest.mark.parametrize("rank", [9, 0, 2.0, "4", True])
def test_a_rank_outside_of_the_nesting_is_rejected(rank: Any) -> None:
    with pytest.raises(MatryoshkaError, match="rank"):
        Nesting((2, 8)).prefix(rank)
    with pytest.raises(MatryoshkaError, match="rank"):
        Nesting((2, 8)).scale_at(rank)
