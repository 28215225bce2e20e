"""The training examples that the recorded runs have spent on a rank."""

from __future__ import annotations

import pytest

from research.spent import examples_spent, share_of_squeezed


def test_shares_of_the_ranks_add_up() -> None:
    ranks = [1, 2, 4]
    # Rank 4 has 1/4 of 1 + 1/2 + 1/4, then rank 2 has 1/2 of 1 + 1/2 of what is left.
    assert [share_of_squeezed(rank, ranks) for rank in ranks] == pytest.approx(
        [4 / 7, 2 / 7, 1 / 7]
    )
    assert share_of_squeezed(8, ranks) == 0


def test_examples_of_recorded_runs() -> None:
    def mean(method: str, rank: int) -> float:
        points = examples_spent("capacity", method, "facts-256", rank)
        return sum(point.examples for point in points) / len(points)

    assert mean("lora/svd", 2) == 0
    assert mean("lora-each", 2) == 800 * 32
    assert 0 < sum(mean("lora/trained", rank) for rank in (1, 2, 32)) < 400 * 32
    assert mean("lora/squeezed", 12) == 0  # truncation leaves it near R
    assert sum(mean("lora/squeezed", rank) for rank in (1, 2, 3, 4, 6, 8)) == pytest.approx(
        400 * 32, rel=1e-3
    )
