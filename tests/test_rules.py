"""Every rule is a diagonal; a draw is a function of seed and step alone."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from conftest import nested_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora import MatryoshkaError, Nesting
from matryoshka_lora.rules import RULES, Rule, get_rule

NESTING = Nesting([1, 2, 4, 8], "sqrt", 0.7)
ALL = list(RULES)

nestings = st.builds(
    Nesting,
    st.sets(st.integers(1, 24), min_size=1, max_size=6).map(sorted),
    st.sampled_from(["none", "rank", "sqrt"]),
    st.floats(0.1, 8),
)


def prefix(nesting: Nesting, rank: int) -> Tensor:
    return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale)


def drawn_rank(diagonal: Tensor) -> int:
    """The rank of a prefix, and that it is one."""
    rank = int((diagonal != 0).sum())
    torch.testing.assert_close(diagonal, prefix(NESTING, rank), rtol=1e-14, atol=0)
    return rank


def chi_square(counts: Counter[int], values: Any) -> float:
    values = list(values)
    expected = sum(counts.values()) / len(values)
    assert set(counts) <= set(values)
    return sum((counts[value] - expected) ** 2 / expected for value in values)


def test_these_are_the_rules() -> None:
    assert ALL == ["lora", "matryoshka", "dylora", "dylora-all", "dylora-frozen", "stratified"]
    assert all(get_rule(name).name == name for name in ALL)


@pytest.mark.parametrize("rule", ALL)
def test_a_rule_pickles(rule: str) -> None:
    """With the model whose layers hold it."""
    again = pickle.loads(pickle.dumps(get_rule(rule)))
    assert again.name == rule
    assert torch.equal(again.draw(NESTING, 3, 5, 4).diagonal, get_rule(rule).draw(NESTING, 3, 5, 4).diagonal)


@given(nestings, st.integers(0, 10**6), st.integers(0, 10**9))
def test_lora_and_dylora_fall_out_of_p_alone(nesting: Nesting, seed: int, step: int) -> None:
    lora = get_rule("lora").draw(nesting, seed, step).diagonal
    whole = torch.full((nesting.max_rank,), nesting.scale, dtype=torch.float64)
    torch.testing.assert_close(lora, whole, rtol=1e-14, atol=0)

    p = get_rule("matryoshka").draw(nesting, seed, step).diagonal
    torch.testing.assert_close(p, oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale), rtol=1e-12, atol=0)

    dylora = get_rule("dylora").draw(nesting, seed, step).diagonal
    b = int((dylora != 0).sum())
    assert b in nesting.ranks
    torch.testing.assert_close(dylora, prefix(nesting, b), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", ALL)
@given(st.integers(0, 2**40), st.integers(0, 10**7), st.integers(1, 40))
def test_a_draw_is_a_function_of_seed_and_step(rule: str, seed: int, step: int, rows: int) -> None:
    first = get_rule(rule).draw(NESTING, seed, step, rows)
    # What other code does with random numbers in between, and which steps were drawn before, must not count.
    random.seed(step)
    torch.manual_seed(seed)
    get_rule(rule).draw(NESTING, seed, step + 1, rows)
    again = get_rule(rule).draw(NESTING, seed, step, rows)
    assert torch.equal(first.diagonal, again.diagonal)
    assert (first.learn is None) == (again.learn is None)
    if first.learn is not None:
        assert torch.equal(first.learn, again.learn)


@pytest.mark.parametrize("rule", ALL)
def test_a_draw_leaves_the_global_generators_alone(rule: str) -> None:
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
    get_rule(rule).draw(NESTING, 1, 2, 8)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("rule", ["dylora", "dylora-all", "dylora-frozen", "stratified"])
def test_seeds_and_steps_give_different_draws(rule: str) -> None:
    def draws(seed: int) -> list[list[float]]:
        return [get_rule(rule).draw(NESTING, seed, step, 7).diagonal.flatten().tolist() for step in range(20)]

    assert draws(0) != draws(1)
    assert len({tuple(draw) for draw in draws(0)}) > 1
    # Seed 1 at step 0 must not be seed 0 at step 1, as it would be if they were added.
    assert draws(1)[:-1] != draws(0)[1:]


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
def test_a_fixed_rule_never_changes(rule: str) -> None:
    draws = [get_rule(rule).draw(NESTING, seed, step, rows) for seed, step, rows in ((0, 0, None), (5, 9, 3))]
    assert torch.equal(draws[0].diagonal, draws[1].diagonal)
    assert get_rule(rule).fixed
    assert draws[0].diagonal.shape == (8,)


# The 99.9 % points of chi-square for 3 and 7 degrees of freedom; the seed is fixed, so the test cannot flicker.
@pytest.mark.parametrize(
    ("rule", "values", "limit"),
    [("dylora", NESTING.ranks, 16.27), ("dylora-all", range(1, 9), 24.32), ("dylora-frozen", range(1, 9), 24.32)],
)
def test_dylora_draws_are_uniform(rule: str, values: Any, limit: float) -> None:
    counts = Counter(drawn_rank(get_rule(rule).draw(NESTING, 42, step).diagonal) for step in range(4000))
    assert chi_square(counts, values) < limit
    # Consecutive steps are independent: so are their pairs.
    ranks = [drawn_rank(get_rule(rule).draw(NESTING, 7, step).diagonal) for step in range(4000)]
    repeated = sum(a == b for a, b in pairwise(ranks)) / len(ranks)
    assert repeated == pytest.approx(1 / len(list(values)), abs=0.03)


def test_frozen_learns_only_the_drawn_row_and_column() -> None:
    for step in range(50):
        draw = get_rule("dylora-frozen").draw(NESTING, 3, step)
        b = drawn_rank(draw.diagonal)
        assert draw.learn is not None
        assert draw.learn.dtype == torch.bool
        assert draw.learn.nonzero().flatten().tolist() == [b - 1]
    for rule in set(ALL) - {"dylora-frozen"}:
        assert get_rule(rule).draw(NESTING, 3, 0, 4).learn is None


@given(nestings, st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 40))
def test_stratified_counts_differ_by_at_most_one(nesting: Nesting, seed: int, step: int, rows: int) -> None:
    diagonal = get_rule("stratified").draw(nesting, seed, step, rows).diagonal
    assert diagonal.shape == (rows, nesting.max_rank)
    ranks = [int((row != 0).sum()) for row in diagonal]
    for row, rank in zip(diagonal, ranks, strict=True):
        torch.testing.assert_close(row, prefix(nesting, rank), rtol=1e-14, atol=0)
    counts = Counter(ranks)
    assert set(counts) <= set(nesting.ranks)
    assert max(counts[r] for r in nesting.ranks) - min(counts[r] for r in nesting.ranks) <= 1


def stratified_ranks(rows: int, steps: int) -> list[list[int]]:
    draws = (get_rule("stratified").draw(NESTING, 11, step, rows).diagonal for step in range(steps))
    return [[drawn_rank(row) for row in draw] for draw in draws]


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_stratified_draws_every_rank_as_often_and_at_every_position(rows: int) -> None:
    steps = 2000
    draws = stratified_ranks(rows, steps)
    counts = Counter(rank for draw in draws for rank in draw)
    for rank in NESTING.ranks:
        assert counts[rank] / (rows * steps) == pytest.approx(1 / 4, abs=0.03)
    for position in range(rows):
        assert chi_square(Counter(draw[position] for draw in draws), NESTING.ranks) < 16.27


def test_every_rule_but_stratified_needs_no_rows() -> None:
    for rule in RULES.values():
        if rule.per_row:
            for rows in (None, 0):
                with pytest.raises(MatryoshkaError, match="'stratified' gives each row a rank of its own: say"):
                    rule.draw(NESTING, 0, 0, rows)
        else:
            assert rule.draw(NESTING, 0, 0).diagonal.shape == (8,)


@pytest.mark.parametrize("rule", RULES.values(), ids=ALL)
def test_trained_ranks_and_diagonal(rule: Rule) -> None:
    nesting = Nesting([2, 5], "rank", 3.0)
    every = rule.name in ("dylora-all", "dylora-frozen")
    assert rule.trained_ranks(nesting) == (tuple(range(1, 6)) if every else (2, 5))
    expected = oracle.trained_p([2, 5], "rank", 3.0) if rule.name == "matryoshka" else prefix(nesting, 5)
    torch.testing.assert_close(rule.trained_diagonal(nesting), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("matroshka", "did you mean 'matryoshka'"), ("DyLoRA", ""), ("dylora_all", "did you mean 'dylora-all'"), (7, "")],
)
def test_an_unknown_rule_is_refused_with_the_list(name: Any, hint: str) -> None:
    with pytest.raises(MatryoshkaError, match=f"no rule {name!r}; .*{hint}.*lora, matryoshka, dylora, .*stratified"):
        get_rule(name)


@settings(max_examples=10)
@given(st.sampled_from(ALL), st.integers(0, 500), st.integers(0, 500))
def test_the_adapter_draws_what_the_rule_draws(rule: str, seed: int, step: int) -> None:
    nested = nested_layer("Linear", NESTING, rule, seed=seed)
    nested.adapter.draw(step, rows=6)
    x = nested.kind.batch(6)
    p = get_rule(rule).draw(NESTING, seed, step, 6).diagonal
    torch.testing.assert_close(nested.layer(x), nested.expected(p, x), rtol=1e-12, atol=1e-12)


def test_processes_share_one_draw_over_all_their_rows() -> None:
    nested = nested_layer("Linear", NESTING, "stratified")
    whole = get_rule("stratified").draw(NESTING, 0, 5, 6).diagonal
    x = nested.kind.batch(2)
    for index in range(3):
        nested.adapter.draw(5, rows=2, share=(index, 3))
        expected = nested.expected(whole[2 * index : 2 * index + 2], x)
        torch.testing.assert_close(nested.layer(x), expected, rtol=1e-12, atol=1e-12)
