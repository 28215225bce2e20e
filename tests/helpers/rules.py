"""Any nesting; and rules of a user: one diagonal per row, one per batch, and a fixed one."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from matryoshka_lora import Nesting, Rule

NESTINGS = st.builds(
    Nesting,
    st.sets(st.integers(1, 80), min_size=1, max_size=8).map(lambda ranks: tuple(sorted(ranks))),
    st.sampled_from(["none", "rank", "sqrt"]),
    st.floats(1e-3, 1e3),
)


def _rank_per_row(nesting: Nesting, rng: random.Random, batch_size: int) -> NDArray[np.float64]:
    return np.stack([nesting.prefix(rng.choice(nesting.ranks)) for _ in range(batch_size)])


def _any_rank(nesting: Nesting, rng: random.Random, batch_size: int) -> NDArray[np.float64]:
    return nesting.prefix(rng.randint(1, nesting.max_rank))


def _decreasing(nesting: Nesting, rng: random.Random, batch_size: int) -> NDArray[np.float64]:
    return nesting.scale * np.linspace(2.0, 1.0, nesting.max_rank)


RANK_PER_ROW = Rule("rank per row", _rank_per_row)
ANY_RANK = Rule("any rank", _any_rank)
DECREASING = Rule("decreasing", _decreasing, fixed=True)
