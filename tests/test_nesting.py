"""Ranks, scales, P and the rules: the paper's formulas; a draw depends on seed and step alone."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora import MatryoshkaError, Nesting
from matryoshka_lora.nesting import RULES, get_rule

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)

# p on the blocks 1 | 2 | 3-4 | 5-8 | 9-16 | 17-32 | ..., summed by hand from the last to the first.
TABLE = [
    (32, "none", [6, 5, 4, 3, 2, 1]),
    (32, "sqrt", [2.98744, 1.98744, 1.28033, 0.78033, 0.42678, 0.17678]),
    (32, "rank", [1.96875, 0.96875, 0.46875, 0.21875, 0.09375, 0.03125]),
    (256, "none", [9, 8, 7, 6, 5, 4, 3, 2, 1]),
]

nestings = st.builds(
    Nesting,
    st.sets(st.integers(1, 80), min_size=1, max_size=8).map(lambda ranks: tuple(sorted(ranks))),
    st.sampled_from(["none", "rank", "sqrt"]),
    st.floats(1e-3, 1e3),
)


def prefix(nesting: Nesting, rank: int) -> Tensor:
    return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale)


@pytest.mark.parametrize(("max_rank", "scaling", "blocks"), TABLE)
def test_p_is_the_table_of_the_paper(max_rank: int, scaling: Any, blocks: list[float]) -> None:
    widths = [1, *(2**k for k in range(len(blocks) - 1))]
    expected = [p for p, width in zip(blocks, widths, strict=True) for _ in range(width)]
    paper = {"none": 1.0, "rank": 1 / max_rank, "sqrt": max_rank**-0.5}  # alpha is 1
    diagonal = Nesting.powers_of_two(max_rank, scaling, paper[scaling]).diagonal()
    assert diagonal.dtype == torch.float64
    assert diagonal.tolist() == pytest.approx(expected, abs=1e-5)


@given(nestings, st.data())
def test_p_prefix_and_scale_are_the_formulas(nesting: Nesting, data: st.DataObject) -> None:
    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 0}
    expected = oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale)
    torch.testing.assert_close(nesting.diagonal(), expected, **exact)
    rank = data.draw(st.integers(1, nesting.max_rank))
    torch.testing.assert_close(nesting.prefix(rank), prefix(nesting, rank), **exact)
    assert nesting.scale == nesting.scale_at(nesting.max_rank)


@pytest.mark.parametrize(
    ("max_rank", "ranks"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_powers_of_two_end_in_the_largest_rank(max_rank: int, ranks: tuple[int, ...]) -> None:
    assert Nesting.powers_of_two(max_rank).ranks == ranks


def test_numpy_integers_become_json() -> None:
    nesting = Nesting(np.array([1, 4, 8]), "rank", np.float64(4))  # type: ignore[arg-type]
    assert nesting == Nesting((1, 4, 8), "rank", 4)
    assert json.loads(json.dumps([nesting.ranks, nesting.scale])) == [[1, 4, 8], 4]
    assert type(nesting.scale) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ranks": [4, 2, 2, 1]},
            r"ranks are \[4, 2, 2, 1\]: they must increase, as \[1, 2, 4\] do",
        ),
        ({"ranks": [0, 1]}, "rank 0 is not positive"),
        ({"ranks": [1, np.float64(4)]}, "not an integer; write a whole number"),
        ({"ranks": "1248"}, "rank '1' is not an integer; write a whole number"),
        ({"ranks": []}, r"as \[8\] do"),
        ({"scaling": "rslora"}, "scaling is 'rslora'; write one of 'none', 'rank', 'sqrt'"),
        ({"scale": math.nan}, "scale is nan; write a positive number"),
        ({"scale": 0}, "scale is 0; write a positive number"),
    ],
)
def test_what_makes_no_nesting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        Nesting(**{"ranks": (1, 2), **options})


@pytest.mark.parametrize("rank", [9, 0, 2.0, "4"])
def test_a_rank_that_the_nesting_lacks_is_refused(rank: Any) -> None:
    with pytest.raises(
        MatryoshkaError, match=r"choose one from 1 to 8|not positive|not an integer"
    ):
        Nesting((2, 8)).prefix(rank)


# Rules.


@pytest.mark.parametrize("rule", RULES)
@given(st.integers(0, 2**40), st.integers(0, 10**7), st.integers(1, 40))
def test_a_draw_is_a_function_of_seed_and_step(rule: str, seed: int, step: int, rows: int) -> None:
    random.seed(step)
    torch.manual_seed(seed)
    before = random.getstate(), torch.get_rng_state()
    first = get_rule(rule).draw(NESTING, seed, step, rows)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    get_rule(rule).draw(NESTING, seed, step + 1, rows)
    again = pickle.loads(pickle.dumps(copy.deepcopy(get_rule(rule))))
    assert torch.equal(first, again.draw(NESTING, seed, step, rows))


@given(nestings, st.integers(0, 10**6), st.integers(0, 10**9))
def test_each_rule_draws_its_diagonal(nesting: Nesting, seed: int, step: int) -> None:
    def draw(rule: str, rows: int | None = None) -> Tensor:
        return get_rule(rule).draw(nesting, seed, step, rows)

    exact: dict[str, Any] = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(draw("lora"), prefix(nesting, nesting.max_rank), **exact)
    p = oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale)
    torch.testing.assert_close(draw("matryoshka"), p, **exact)
    for rule in ("dylora", "dylora-all", "dylora-frozen"):
        rank = int(draw(rule).count_nonzero())
        assert rank in (nesting.ranks if rule == "dylora" else range(1, nesting.max_rank + 1))
        torch.testing.assert_close(draw(rule), prefix(nesting, rank), **exact)
    rows = step % 40 + 1
    drawn = draw("stratified", rows)
    assert drawn.shape == (rows, nesting.max_rank)
    counts = Counter(int(row.count_nonzero()) for row in drawn)
    for row in drawn:
        torch.testing.assert_close(row, prefix(nesting, int(row.count_nonzero())), **exact)
    numbers = [counts[rank] for rank in nesting.ranks]
    assert sum(numbers) == rows
    assert max(numbers) - min(numbers) <= 1


# The 99.9 % points of chi-square for 3 and 7 degrees of freedom; the seed is fixed.
@pytest.mark.parametrize(
    ("rule", "values", "limit"),
    [("dylora", NESTING.ranks, 16.27), ("dylora-all", range(1, 9), 24.32)],
)
def test_dylora_draws_are_uniform_and_independent(rule: str, values: Any, limit: float) -> None:
    steps = 4000
    ranks = [int(get_rule(rule).draw(NESTING, 42, step).count_nonzero()) for step in range(steps)]
    expected = steps / len(values)
    assert sum((ranks.count(v) - expected) ** 2 / expected for v in values) < limit
    repeated = sum(a == b for a, b in pairwise(ranks)) / steps
    assert repeated == pytest.approx(1 / len(values), abs=0.03)
    # Seed 1 at step 0 must not be seed 0 at step 1, as it would be if they were added.
    other = [int(get_rule(rule).draw(NESTING, 43, step).count_nonzero()) for step in range(20)]
    assert other[:-1] != ranks[1:20]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_stratified_gives_each_position_each_rank_as_often(rows: int) -> None:
    draws = [get_rule("stratified").draw(NESTING, 11, step, rows) for step in range(2000)]
    for position in range(rows):
        counts = Counter(int(draw[position].count_nonzero()) for draw in draws)
        assert sum((counts[r] - 500) ** 2 / 500 for r in NESTING.ranks) < 16.27


def test_stratified_needs_rows_and_an_unknown_rule_is_refused() -> None:
    with pytest.raises(MatryoshkaError, match="gives each row a rank: say how many"):
        get_rule("stratified").draw(NESTING, 0, 0)
    with pytest.raises(MatryoshkaError, match=r"the rules are lora, matryoshka, dylora"):
        get_rule("matroshka")
