"""Ranks, scales and P: the table of the method, and every way to write a nesting wrongly."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import one_layer
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError, Nesting, nest

# p on the blocks 1 | 2 | 3-4 | 5-8 | 9-16 | 17-32 | ..., summed by hand from the last to the first.
TABLE = [
    (32, "none", [6, 5, 4, 3, 2, 1]),
    (32, "sqrt", [2.98744, 1.98744, 1.28033, 0.78033, 0.42678, 0.17678]),
    (32, "rank", [1.96875, 0.96875, 0.46875, 0.21875, 0.09375, 0.03125]),
    (256, "none", [9, 8, 7, 6, 5, 4, 3, 2, 1]),
]

rank_lists = st.sets(st.integers(1, 80), min_size=1, max_size=8).map(sorted)
scalings = st.sampled_from(["none", "rank", "sqrt"])
scales = st.floats(1e-3, 1e3)


@pytest.mark.parametrize(("max_rank", "scaling", "blocks"), TABLE)
def test_diagonal_is_the_table_of_the_method(max_rank: int, scaling: Any, blocks: list[float]) -> None:
    widths = [1, *(2**k for k in range(len(blocks) - 1))]
    expected = [p for p, width in zip(blocks, widths, strict=True) for _ in range(width)]
    paper = {"none": 1.0, "rank": 1 / max_rank, "sqrt": max_rank**-0.5}  # alpha is 1
    diagonal = Nesting.powers_of_two(max_rank, scaling, paper[scaling]).diagonal()
    assert diagonal.shape == (max_rank,)
    assert diagonal.dtype == torch.float64
    assert diagonal.tolist() == pytest.approx(expected, abs=1e-5)


@given(rank_lists, scalings, scales)
def test_diagonal_is_the_sum_of_prefixes_and_the_formula(ranks: list[int], scaling: Any, whole: float) -> None:
    nesting = Nesting(ranks, scaling, whole)
    prefixes = sum(oracle.prefix_p(ranks, r, scaling, whole) for r in ranks)
    torch.testing.assert_close(nesting.diagonal(), prefixes, rtol=1e-12, atol=0)
    torch.testing.assert_close(nesting.diagonal(), oracle.trained_p(ranks, scaling, whole), rtol=1e-12, atol=0)


@given(rank_lists, scalings, scales, st.data())
def test_prefix_and_scale(ranks: list[int], scaling: Any, whole: float, data: st.DataObject) -> None:
    nesting = Nesting(ranks, scaling, whole)
    rank = data.draw(st.integers(1, max(ranks)))
    assert nesting.scale_at(rank) == pytest.approx(oracle.scale(scaling, whole, max(ranks), rank), rel=1e-14)
    torch.testing.assert_close(nesting.prefix(rank), oracle.prefix_p(ranks, rank, scaling, whole))


@given(rank_lists, scalings, scales)
def test_the_largest_rank_has_the_scale_that_is_given(ranks: list[int], scaling: Any, whole: float) -> None:
    nesting = Nesting(ranks, scaling, whole)
    assert nesting.scale == nesting.scale_at(max(ranks)) == whole


@given(st.integers(1, 20), scales, st.booleans())
def test_the_scale_of_an_adapter_is_what_peft_multiplies_by(rank: int, alpha: float, use_rslora: bool) -> None:
    model = one_layer("Linear", Nesting([1]), r=rank, lora_alpha=alpha, use_rslora=use_rslora)
    nesting = nest(model).nesting
    assert nesting == Nesting.powers_of_two(rank, scale=model.base_model.model.layer.scaling["default"])
    assert nesting.scale == pytest.approx(alpha / (rank**0.5 if use_rslora else rank), rel=1e-14)


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
    assert json.loads(json.dumps(nesting.ranks)) == [1, 4, 8]
    assert Nesting.powers_of_two(np.int64(6)) == Nesting([1, 2, 4, 6])
    assert nesting.scale_at(np.int32(4)) == 1.0
    assert type(Nesting([1, 2], "rank", np.float64(4)).scale) is float


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


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, -math.inf, 10**400, True, "16", None])
def test_an_impossible_scale_is_refused(scaling: Any, scale: Any) -> None:
    with pytest.raises(MatryoshkaError, match=r"scale is .*; write a positive number"):
        Nesting([1, 2], scaling, scale)


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
@pytest.mark.parametrize("method", ["scale_at", "prefix"])
def test_a_rank_outside_the_nesting_is_refused(method: str, rank: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        getattr(Nesting([2, 8]), method)(rank)


@pytest.mark.parametrize("max_rank", [0, -1, 2.0, True, "8", None])
def test_powers_of_two_refuses_what_is_no_rank(max_rank: Any) -> None:
    with pytest.raises(MatryoshkaError, match=r"not positive|not an integer"):
        Nesting.powers_of_two(max_rank)
