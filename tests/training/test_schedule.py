"""Which rank each step trains."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matryoshka_lora.training.schedule import RankSchedule, rank_shares, share_of_max_rank


def test_a_share_follows_the_root_of_the_gap() -> None:
    """Rank 3 is between two nested ranks, and its gap is between theirs."""
    shares = rank_shares({1: 1.6, 2: 0.9, 4: 0.1, 8: 0.0})
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[1] / shares[2] == pytest.approx(4 / 3)
    assert shares[2] / shares[4] == pytest.approx(3)
    assert shares[2] > shares[3] > shares[4] > shares[5] + shares[6] + shares[7] > 0
    assert shares[5] > shares[6] > shares[7]
    assert shares[8] == pytest.approx(1 / 8)


def test_the_largest_rank_gets_more_of_the_final_steps() -> None:
    shares_of_max_rank = [share_of_max_rank(step, 60) for step in range(60)]
    assert shares_of_max_rank == [1 / 8] * 50 + [1 / 3] * 10
    shares = rank_shares({1: 1.0, 2: 0.5, 4: 0.0}, 1 / 3)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[4] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("gaps", "trained_ranks"),
    [
        ({2: 1.0, 32: 0.0}, {2, 32}),
        ({2: 1.0, 4: 0.5, 32: 0.0}, {2, 3, 4, 32}),
        ({3: 1.0, 6: 0.0, 7: 0.0}, {3, 4, 5, 7}),
        ({1: 0.0, 4: 0.0}, {4}),
    ],
    ids=str,
)
def test_ranks_between_distant_nested_ranks_are_not_trained(
    gaps: dict[int, float], trained_ranks: set[int]
) -> None:
    """Nor is a rank without a gap, except R."""
    shares = rank_shares(gaps)
    assert {rank for rank, share in shares.items() if share > 0} == trained_ranks


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 1000), st.integers(0, 99))
def test_each_rank_gets_its_share_of_the_steps(
    weights: list[float], num_steps: int, seed: int
) -> None:
    total = sum(weights) + 0.1
    shares = {rank: weight / total for rank, weight in enumerate([*weights, 0.1], 1)}
    schedule = RankSchedule(seed)
    counts = Counter(schedule.next(shares) for _ in range(num_steps))
    assert set(counts) <= set(shares)
    for rank, share in shares.items():
        assert abs(counts[rank] - share * num_steps) <= 4
