"""What an adapter of a rank is: the one place that knows which diagonal stands between the first columns and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.rules import Draw, Rule, get_rule

Deploy = Literal["reordered", "paper"]
By = Literal["svd", "activations", "loss", "learned", "trained"]


@dataclass
class State:
    """How one adapter is trained, and what its ranks are. All layers of an adapter share it.

    Attributes:
        nesting: Its ranks and scales.
        rule: How the diagonal p is chosen while training.
        seed: Of the ranks that the rule draws.
        deploy: What is saved of factors that were not reordered yet. ``"reordered"`` reorders a copy of them first.
            ``"paper"`` leaves them as they are and drops P, as arXiv 2605.07850 does.
        reordered: How the factors were reordered, or None: they are as they are trained, and p stands between them.
        spectra: The singular values by layer that reordering has found in memory; None where they are not known.
    """

    nesting: Nesting
    rule: Rule
    seed: int = 0
    deploy: Deploy = "reordered"
    reordered: By | None = None
    spectra: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.deploy not in get_args(Deploy):
            raise MatryoshkaError(f"deploy is {self.deploy!r}; write 'reordered' or 'paper'")

    @property
    def deployed(self) -> bool:
        """Whether the factors are as they are deployed; others are reordered first."""
        return self.reordered is not None or self.deploy == "paper"

    @property
    def draws(self) -> bool:
        """Whether training draws another p for each optimizer step."""
        return not self.reordered and not self.rule.fixed

    @property
    def per_row(self) -> bool:
        """Whether training gives each row of a batch a p of its own."""
        return not self.reordered and self.rule.per_row

    @property
    def deploys_what_is_trained(self) -> bool:
        """Whether eval mode at the largest rank computes what training computes there."""
        return torch.allclose(self.diagonal(self.nesting.max_rank), self.trained_diagonal(), rtol=1e-12)

    @property
    def is_plain_at_full_rank(self) -> bool:
        """Whether plain LoRA of the same factors is the full-rank function that was trained."""
        return torch.equal(self.trained_diagonal(), self.nesting.prefix(self.nesting.max_rank))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that the adapter may be used at."""
        if self.reordered:
            return tuple(range(1, self.nesting.max_rank + 1))
        return self.rule.trained_ranks(self.nesting)

    def end_order(self) -> None:
        """Say that reordered factors are trained on: as plain LoRA of rank R, and their order is lost."""
        if self.reordered:
            self.rule, self.reordered, self.spectra = get_rule("lora"), None, None

    def check_rank(self, rank: int) -> None:
        """Raises MatryoshkaError unless the adapter may be used at this rank."""
        self.nesting.scale_at(rank)  # an integer from 1 to R
        if rank not in self.ranks:
            raise MatryoshkaError(
                f"rank {rank} was not trained; the trained ranks are {', '.join(map(str, self.ranks))}. "
                "After reorder() every rank from 1 to the largest works."
            )

    def diagonal(self, rank: int) -> Tensor:
        """What stands between the factors at a rank from 0 to R: 0 from entry ``rank`` on. Shape (R,), float64.

        Of reordered factors, it is the scale of R. Of others, it is what the rank was trained with: P where the rule
        has a fixed one, else the scale of the rank. The paper's deployment has the scale of the rank in any case.
        """
        if rank == 0:
            return torch.zeros(self.nesting.max_rank, dtype=torch.float64)
        if not self.reordered and (self.deploy == "paper" or not self.rule.fixed):
            return self.nesting.prefix(rank)
        return self.trained_diagonal() * (torch.arange(self.nesting.max_rank) < rank)

    def trained_diagonal(self) -> Tensor:
        """The p between A and B in the full-rank function that was trained, shape (R,), float64."""
        if self.reordered:
            return self.nesting.prefix(self.nesting.max_rank)
        return self.rule.trained_diagonal(self.nesting)

    def draw(self, step: int, rows: int | None) -> Draw:
        """p for an optimizer step. Reordered factors go on as plain LoRA at rank R."""
        if self.reordered:
            return Draw(self.nesting.prefix(self.nesting.max_rank))
        return self.rule.draw(self.nesting, self.seed, step, rows)


def split(diagonal: Tensor) -> tuple[Tensor, float]:
    """A diagonal as a part between the factors and a scale after them, as PEFT has one.

    Returns:
        The part, whose largest entry is 1, and the scale. Of a diagonal of one value, the part is exactly ones and
        zeros, so that the prefix is PEFT's result to the last bit.
    """
    scale = float(diagonal.max())
    return (diagonal / scale if scale > 0 else diagonal), scale
