"""Diagonals that are tried in the place of the paper's P."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from matryoshka_lora import Nesting
from matryoshka_lora.rules import Draw, Rule


def _fixed(name: str, diagonal: Callable[[Nesting], Tensor]) -> Rule:
    def at_step(nesting: Nesting, generator: Random, rows: int | None) -> Draw:
        return Draw(diagonal(nesting))

    return Rule(name, at_step, fixed=True)


def _shuffled(nesting: Nesting) -> Tensor:
    # One order for all runs, as the diagonal of a run must be found again without its seed.
    return nesting.diagonal()[torch.randperm(nesting.max_rank, generator=torch.Generator().manual_seed(0))]


def _geometric(decay: float) -> Rule:
    def diagonal(nesting: Nesting) -> Tensor:
        falling = decay ** torch.arange(nesting.max_rank, dtype=torch.float64)
        return falling / falling.mean() * nesting.scale

    return _fixed(f"geometric-{decay:g}", diagonal)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        _fixed("mean", lambda nesting: nesting.diagonal() / len(nesting.ranks)),
        _fixed("reversed", lambda nesting: nesting.diagonal().flip(0)),
        _fixed("random", _shuffled),
        *map(_geometric, (0.97, 0.9, 0.8)),
    )
}
"""By name; the package's own rules are not among them."""


def rule_of(name: str) -> Rule | str:
    """What `matryoshka_lora.nest` takes for the name of one of these rules, or of one of the package's."""
    return RULES.get(name, name)
