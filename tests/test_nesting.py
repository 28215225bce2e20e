"""Ranks, scales and P: the table of the method, and every way to write a nesting wrongly."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError, Nesting

# p on the blocks 1 | 2 | 3-4 | 5-8 | 9-16 | 17-32 | ..., summed by hand from the last to the first.
TABLE = [
    (32, "none", [6, 5, 4, 3, 2, 1]),
    (32, "sqrt", [2.98744, 1.98744, 1.28033, 0.78033, 0.42678, 0.17678]),
    (32, "rank", [1.96875, 0.96875, 0.46875, 0.21875, 0.09375, 0.03125]),
    (256, "none", [9, 8, 7, 6, 5, 4, 3, 2, 1]),
]

rank_lists = st.sets(st.integers(1, 80), min_size=1, max_size=8).map(sorted)
scalings = st.sampled_from(["none", "rank", "sqrt"])
alphas = st.floats(1e-3, 1e3)


def build(ranks: Any, scaling: Any = "none", alpha: Any = 1.0) -> Nesting:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scaling "none" with an alpha
        return Nesting(ranks, scaling, alpha)


@pytest.mark.parametrize(("max_rank", "scaling", "blocks"), TABLE)
def test_diagonal_is_the_table_of_the_method(max_rank: int, scaling: Any, blocks: list[float]) -> None:
    widths = [1, *(2**k for k in range(len(blocks) - 1))]
    expected = [p for p, width in zip(blocks, widths, strict=True) for _ in range(width)]
    diagonal = Nesting.powers_of_two(max_rank, scaling).diagonal()
    assert diagonal.shape == (max_rank,)
    assert diagonal.dtype == torch.float64
    assert diagonal.tolist() == pytest.approx(expected, abs=1e-5)


@given(rank_lists, scalings, alphas)
def test_diagonal_is_the_sum_of_prefixes_and_the_formula(ranks: list[int], scaling: Any, alpha: float) -> None:
    nesting = build(ranks, scaling, alpha)
    prefixes = sum(oracle.prefix_p(ranks, r, scaling, alpha) for r in ranks)
    torch.testing.assert_close(nesting.diagonal(), prefixes, rtol=1e-12, atol=0)
    torch.testing.assert_close(nesting.diagonal(), oracle.trained_p(ranks, scaling, alpha), rtol=1e-12, atol=0)


@given(rank_lists, scalings, alphas, st.data())
def test_prefix_and_scale(ranks: list[int], scaling: Any, alpha: float, data: st.DataObject) -> None:
    nesting = build(ranks, scaling, alpha)
    rank = data.draw(st.integers(1, max(ranks)))
    assert nesting.scale(rank) == pytest.approx(oracle.scale(scaling, alpha, rank), rel=1e-14)
    torch.testing.assert_close(nesting.prefix(rank), oracle.prefix_p(ranks, rank, scaling, alpha))


@given(rank_lists, scalings, alphas)
def test_lora_alpha_makes_peft_scale_by_s_r(ranks: list[int], scaling: Any, alpha: float) -> None:
    nesting = build(ranks, scaling, alpha)
    assert nesting.lora_alpha / nesting.max_rank == pytest.approx(oracle.scale(scaling, alpha, max(ranks)), rel=1e-14)


@given(rank_lists, scalings, alphas)
def test_round_trip_through_json_is_lossless(ranks: list[int], scaling: Any, alpha: float) -> None:
    nesting = build(ranks, scaling, alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = Nesting.from_dict(json.loads(json.dumps(nesting.to_dict())))
    assert again == nesting
    assert hash(again) == hash(nesting)
    assert torch.equal(again.diagonal(), nesting.diagonal())


@pytest.mark.parametrize(
    ("max_rank", "ranks"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_powers_of_two_end_in_the_largest_rank(max_rank: int, ranks: tuple[int, ...]) -> None:
    assert Nesting.powers_of_two(max_rank).ranks == ranks
    assert Nesting.powers_of_two(max_rank).max_rank == max_rank


def test_numpy_integers_and_any_iterable_are_taken() -> None:
    nesting = Nesting(np.array([1, 4, 8]))
    assert nesting == Nesting(r for r in (1, 4, 8))
    assert json.loads(json.dumps(nesting.to_dict()))["ranks"] == [1, 4, 8]
    assert Nesting.powers_of_two(np.int64(6)) == Nesting([1, 2, 4, 6])
    assert nesting.scale(np.int32(4)) == 1.0
    assert Nesting([1, 2], "rank", np.float64(4)).to_dict()["alpha"] == 4.0


def test_a_nesting_is_immutable() -> None:
    nesting = Nesting([1, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        nesting.ranks = (4,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([4, 2, 1], r"increase strictly; write \[1, 2, 4\] instead of \[4, 2, 1\]"),
        ([1, 2, 2, 4], r"increase strictly; write \[1, 2, 4\] instead of \[1, 2, 2, 4\]"),
        ([0, 1], "rank 0 is not positive; the smallest rank is 1"),
        ([-3, 4], "rank -3 is not positive"),
        ([True, 4], "rank True is not an integer; write a whole number"),
        ([1.0, 4], r"rank 1\.0 is not an integer; write a whole number"),
        ([1, np.float64(4)], "not an integer; write a whole number"),
        ([1, float("nan")], "rank nan is not an integer"),
        (["1", 4], "rank '1' is not an integer"),
        ([None], "rank None is not an integer"),
        ("1248", r"ranks is '1248'; write a list of integers, for example \[1, 2, 4, 8\]"),
        (8, "ranks is 8; write a list of integers"),
        (None, "ranks is None; write a list of integers"),
        ([], "ranks is empty; write at least one"),
    ],
)
def test_wrong_ranks_are_refused_with_the_right_ones(ranks: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        Nesting(ranks)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6).filter(lambda ranks: ranks != sorted(set(ranks))))
def test_the_message_for_wrong_order_gives_ranks_that_work(ranks: list[int]) -> None:
    with pytest.raises(MatryoshkaError) as error:
        Nesting(ranks)
    suggestion = json.loads(str(error.value).partition("write ")[2].partition(" instead")[0])
    assert Nesting(suggestion).ranks == tuple(sorted(set(ranks)))


@pytest.mark.parametrize("scaling", ["Rank", "rslora", "", None, 1])
def test_an_unknown_scaling_is_refused(scaling: Any) -> None:
    with pytest.raises(MatryoshkaError, match=r"scaling is .*; write one of 'none', 'rank', 'sqrt'"):
        Nesting([1, 2], scaling)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, -math.inf, True, "16", None])
def test_an_impossible_alpha_is_refused(alpha: Any) -> None:
    with pytest.raises(MatryoshkaError, match=r"alpha is .*; write a positive number"):
        Nesting([1, 2], "rank", alpha)


def test_an_alpha_that_is_not_used_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="scaling 'none' has no alpha"):
        Nesting([1, 2], "none", 16)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (9, "rank 9 is above the largest rank 8; choose one from 1 to 8"),
        (0, "not positive"),
        (2.0, "not an integer"),
        (True, "not an integer"),
        ("4", "not an integer"),
    ],
)
@pytest.mark.parametrize("method", ["scale", "prefix"])
def test_a_rank_outside_the_nesting_is_refused(method: str, rank: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        getattr(Nesting([2, 8]), method)(rank)


@pytest.mark.parametrize("max_rank", [0, -1, 2.0, True, "8", None])
def test_powers_of_two_refuses_what_is_no_rank(max_rank: Any) -> None:
    with pytest.raises(MatryoshkaError, match=r"not positive|not an integer"):
        Nesting.powers_of_two(max_rank)


@pytest.mark.parametrize(
    "data",
    [{}, {"scaling": "none"}, {"ranks": [1], "rank": 4}, [1, 2], None, {"ranks": [1], "scaling": "none", "beta": 1}],
)
def test_from_dict_refuses_other_keys(data: Any) -> None:
    with pytest.raises(MatryoshkaError, match="a nesting has the keys ranks, scaling and alpha, not"):
        Nesting.from_dict(data)


def test_from_dict_checks_the_values_too() -> None:
    with pytest.raises(MatryoshkaError, match=r"write \[1, 2\]"):
        Nesting.from_dict({"ranks": [2, 1], "scaling": "none", "alpha": 1.0})
