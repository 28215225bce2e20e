"""Training rules: the built-in ones follow their formulas, and users can write their own."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.models import nested_llama
from helpers.rules import NESTINGS, RANK_PER_ROW
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import research.rules
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.rules import RULES, Rule, get_rule

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)


def prefix(nesting: Nesting, rank: int) -> NDArray[Any]:
    return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale).numpy()


@pytest.mark.parametrize("rule", [*RULES.values(), RANK_PER_ROW])
@given(st.integers(0, 2**40), st.integers(0, 10**7), st.integers(1, 40))
def test_a_diagonal_depends_only_on_seed_and_step(
    rule: Rule, seed: int, step: int, batch_size: int
) -> None:
    random.seed(step)
    torch.manual_seed(seed)
    state, torch_state = random.getstate(), torch.get_rng_state()
    first = rule.sample(NESTING, seed, step, batch_size)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    rule.sample(NESTING, seed, step + 1, batch_size)
    unpickled = pickle.loads(pickle.dumps(copy.deepcopy(rule)))
    np.testing.assert_array_equal(first, unpickled.sample(NESTING, seed, step, batch_size))


@given(NESTINGS, st.integers(0, 10**6), st.integers(0, 10**9))
def test_the_built_in_rules_follow_their_formulas(nesting: Nesting, seed: int, step: int) -> None:
    def sample(rule: str) -> NDArray[Any]:
        return get_rule(rule).sample(nesting, seed, step)

    np.testing.assert_allclose(sample("lora"), prefix(nesting, nesting.max_rank), rtol=1e-12)
    p = oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale).numpy()
    np.testing.assert_allclose(sample("matryoshka"), p, rtol=1e-12)
    rank = int(np.count_nonzero(sample("dylora")))
    assert rank in nesting.ranks
    np.testing.assert_allclose(sample("dylora"), prefix(nesting, rank), rtol=1e-12)


def test_dylora_is_uniform_and_independent_over_steps_and_seeds() -> None:
    def sample_ranks(seed: int, steps: int) -> list[int]:
        rule = get_rule("dylora")
        return [int(np.count_nonzero(rule.sample(NESTING, seed, step))) for step in range(steps)]

    ranks = sample_ranks(seed=42, steps=4000)
    expected_count = 1000
    chi_square = sum((ranks.count(r) - expected_count) ** 2 / expected_count for r in NESTING.ranks)
    assert chi_square < 16.27  # the 99.9 % point for 3 degrees of freedom
    repetitions = sum(a == b for a, b in pairwise(ranks)) / len(ranks)
    assert repetitions == pytest.approx(1 / 4, abs=0.03)
    # Seed 43 at step 0 must not be seed 42 at step 1, as if seed and step were added.
    assert sample_ranks(seed=43, steps=19) != ranks[1:20]


def test_a_rule_of_a_user_may_give_each_row_a_diagonal() -> None:
    diagonals = RANK_PER_ROW.sample(NESTING, seed=0, step=0, batch_size=16)
    assert diagonals.shape == (16, 8)
    assert {int(np.count_nonzero(row)) for row in diagonals} == set(NESTING.ranks)


def test_a_list_of_integers_is_converted() -> None:
    def constant(nesting: Nesting, rng: random.Random, batch_size: int) -> Any:
        return [1] * nesting.max_rank

    diagonal = Rule("constant", constant, fixed=True).sample(NESTING, seed=0, step=0)
    assert diagonal.dtype == np.float64
    np.testing.assert_array_equal(diagonal, np.ones(8))


@pytest.mark.parametrize(
    ("diagonal", "fixed", "keyword"),
    [
        (np.ones(7), False, "shape"),
        (np.ones((3, 8)), False, "shape"),
        (np.ones((2, 8)), True, "shape"),
        (np.full(8, np.nan), False, "finite"),
        (np.array([1.0, 0.0] * 4), True, "zero"),
    ],
)
def test_an_invalid_diagonal_is_rejected(diagonal: NDArray[Any], fixed: bool, keyword: str) -> None:
    rule = Rule("mine", lambda nesting, rng, batch_size: diagonal, fixed)
    with pytest.raises(MatryoshkaError, match=keyword):
        rule.sample(NESTING, seed=0, step=0, batch_size=2)


def test_a_rule_has_a_known_name_or_is_a_rule() -> None:
    assert get_rule(RANK_PER_ROW) is RANK_PER_ROW
    with pytest.raises(MatryoshkaError, match="matryoshka"):
        get_rule("matroshka")
    with pytest.raises(MatryoshkaError, match="rule"):
        get_rule(["lora"])  # type: ignore[arg-type]


def test_the_last_column_alone_has_a_gradient() -> None:
    last_column = research.rules.LastColumn()
    adapter = nested_llama(NESTING, Rule("frozen", last_column.draw))
    last_column.train_alone(adapter)
    adapter.draw(3)
    logits = adapter.model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits
    logits.square().mean().backward()
    for A, B in adapter.layer_factors().values():
        assert A.grad is not None
        assert B.grad is not None
        assert A.grad.any(dim=1).nonzero().flatten().tolist() == [last_column.rank - 1]
        assert B.grad.any(dim=0).nonzero().flatten().tolist() == [last_column.rank - 1]
