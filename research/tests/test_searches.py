"""The cells of the blocks on searches for learning rates."""

from __future__ import annotations

from research.blocks.searches import rate_cell, seeds_cell
from research.plan import Rates

LOSSES = {1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}


def test_a_rate_at_an_edge_of_the_grid_is_marked() -> None:
    assert rate_cell(Rates([], LOSSES, 2e-3, 2e-3)) == "0.002"
    assert "edge" in rate_cell(Rates([], LOSSES, 1e-3, 2e-3))
    assert "edge" in rate_cell(Rates([], LOSSES, 4e-3, 4e-3))
    assert "diverged" in rate_cell(Rates([], LOSSES, None))


def test_numbers_of_seeds() -> None:
    assert (seeds_cell(1), seeds_cell(3)) == ("1 seed", "3 seeds")
