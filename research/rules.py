"""Training rules of the studies that are not built into the package.

They are examples of user-written rules. `docs/rules.md` explains how to write one.
"""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, arange, nn

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


RULES = {
    "dylora-all": Rule("dylora-all", any_rank),
    # Train with `train_last_column_only`, too.
    "dylora-frozen": Rule("dylora-frozen", any_rank),
    "stratified": Rule("stratified", stratified),
}


TRUNCATED_LORA = Rule("truncated-lora", all_columns, fixed=True)
"""Plain LoRA for ``deploy="paper"``, which the package refuses for its rule ``lora``: ranks below R
are the first columns as they were trained."""


def train_last_column_only(adapter: NestedAdapter) -> None:
    """Give gradients only to the last column of B and row of A of the drawn prefix.

    This is the frozen mode of DyLoRA (arXiv 2210.07558).
    """
    # PyTorch copies the hooks of a module, but not those of its parameters.
    adapter.model.register_forward_pre_hook(partial(_add_gradient_hooks, adapter))


def _add_gradient_hooks(adapter: NestedAdapter, model: nn.Module, args: object) -> None:
    for pair in adapter.layer_factors().values():
        for rank_dim, factor in enumerate(pair):
            if not factor._backward_hooks:
                hook = partial(_keep_last_entry, adapter, rank_dim)
                factor.register_hook(hook)  # type: ignore[no-untyped-call]


def _keep_last_entry(adapter: NestedAdapter, rank_dim: int, gradient: Tensor) -> Tensor:
    """Return a gradient with zeros everywhere but at the last index of the drawn prefix."""
    diagonal = adapter.state.train_diagonal
    assert diagonal is not None  # the forward pass raises an error if nothing was drawn
    last_index = int(diagonal.q.count_nonzero()) - 1
    is_last = arange(gradient.shape[rank_dim], device=gradient.device) == last_index
    shape = [1] * gradient.ndim
    shape[rank_dim] = -1
    return gradient * is_last.view(shape)
