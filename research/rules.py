"""Training rules of the studies that are not built into the package.

They are examples of user-written rules. `docs/rules.md` explains how to write one.
"""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, arange

from matryoshka_lora import NestedAdapter, Nesting, Rule

Diagonal = NDArray[np.float64]


def any_rank(nesting: Nesting, rng: random.Random, batch_size: int) -> Diagonal:
    """Return the prefix of a random rank from 1 to R, as DyLoRA (arXiv 2210.07558)."""
    return nesting.prefix(rng.randint(1, nesting.max_rank))


def stratified(nesting: Nesting, rng: random.Random, batch_size: int) -> Diagonal:
    """Return the prefix of a nested rank for each row of a batch, all ranks equally often."""
    repeats, remainder = divmod(batch_size, len(nesting.ranks))
    ranks = [*nesting.ranks] * repeats + rng.sample(nesting.ranks, remainder)
    rng.shuffle(ranks)
    return np.stack([nesting.prefix(rank) for rank in ranks])


def dylora_in_parts(num_parts: int) -> Rule:
    """Return DyLoRA's rule with a random nested rank for each of some equal parts of a batch.

    A step has the gradient of as many micro-batches, each with a draw of its own, and takes the
    time of one batch.
    """
    return Rule("dylora in parts", partial(_rank_of_each_part, num_parts))


def _rank_of_each_part(
    num_parts: int, nesting: Nesting, rng: random.Random, batch_size: int
) -> Diagonal:
    diagonals = [nesting.prefix(rng.choice(nesting.ranks)) for _ in range(num_parts)]
    rows_of_part = math.ceil(batch_size / num_parts)
    return np.repeat(diagonals, rows_of_part, axis=0)[:batch_size]


def all_columns(nesting: Nesting, rng: random.Random, batch_size: int) -> Diagonal:
    """Return the diagonal of plain LoRA at rank R."""
    return nesting.prefix(nesting.max_rank)


TRUNCATED_LORA = Rule("truncated-lora", all_columns, fixed=True)
"""Plain LoRA for ``deploy="paper"``, which the package refuses for its rule ``lora``: ranks below R
are the first columns as they were trained."""

RULES = {
    "dylora-all": Rule("dylora-all", any_rank),
    "stratified": Rule("stratified", stratified),
}


class LastColumn:
    """The frozen mode of DyLoRA (arXiv 2210.07558): one column of B and row of A learn per step.

    Its `draw` is a rule that remembers the rank that it has drawn.
    """

    def __init__(self) -> None:
        self.rank = 0

    def draw(self, nesting: Nesting, rng: random.Random, batch_size: int) -> Diagonal:
        """Return the prefix of a random rank from 1 to R."""
        self.rank = rng.randint(1, nesting.max_rank)
        return nesting.prefix(self.rank)

    def train_alone(self, adapter: NestedAdapter) -> None:
        """Give gradients only to the last column and row of the drawn prefix."""
        for pair in adapter.layer_factors().values():
            for rank_dim, factor in enumerate(pair):
                hook = partial(self._mask, rank_dim)
                factor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _mask(self, rank_dim: int, gradient: Tensor) -> Tensor:
        is_last = arange(gradient.shape[rank_dim], device=gradient.device) == self.rank - 1
        shape = [1] * gradient.ndim
        shape[rank_dim] = -1
        return gradient * is_last.view(shape)
