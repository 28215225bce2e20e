"""What all nested layers of one adapter share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.rules import Draw, Rule

Inference = Literal["prefix", "keep"]
Form = Literal["raw", "folded", "reordered"]


@dataclass
class NestedState:
    """How one adapter is trained and deployed.

    Attributes:
        nesting: Its ranks and scales.
        rule: How p is chosen while training.
        inference: ``"prefix"`` deploys rank r as ``s_r B[:, :r] A[:r]``, the paper's way; ``"keep"`` keeps the trained
            p between the factors.
        seed: Of the rule's draws.
        form: What A and B are. ``"raw"``: as they are trained, p stands outside. ``"folded"``: p has been multiplied
            into B. ``"reordered"``: the SVD of what was trained. In the last two every prefix has the one scale
            ``s_R`` that plain PEFT gives to the whole adapter.
    """

    nesting: Nesting
    rule: Rule
    inference: Inference = "prefix"
    seed: int = 0
    form: Form = "raw"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that the adapter may be used at."""
        if self.form == "reordered":
            return tuple(range(1, self.nesting.max_rank + 1))
        return self.rule.trained_ranks(self.nesting)

    def check_rank(self, rank: int) -> None:
        """Raises MatryoshkaError unless the adapter may be used at this rank."""
        self.nesting.scale(rank)  # an integer from 1 to R
        if rank not in self.ranks:
            raise MatryoshkaError(
                f"rank {rank} was not trained; the trained ranks are {', '.join(map(str, self.ranks))}. "
                "After reorder() every rank from 1 to the largest works."
            )

    @property
    def draws(self) -> bool:
        """Whether training draws another p for each optimizer step."""
        return self.form == "raw" and not self.rule.fixed

    @property
    def per_row(self) -> bool:
        """Whether training gives each row of a batch a p of its own."""
        return self.form == "raw" and self.rule.per_row

    @property
    def deploys_what_is_trained(self) -> bool:
        """Whether eval mode at the largest rank computes what training computes there."""
        rank = self.nesting.max_rank
        return torch.allclose(self.mask(rank) * self.scale(rank), self.trained_diagonal(), rtol=1e-12)

    def trained_diagonal(self) -> Tensor:
        """The p between A and B in the full-rank function that they compute now, shape (R,), float64."""
        if self.form == "raw":
            return self.rule.trained_diagonal(self.nesting)
        return self.nesting.prefix(self.nesting.max_rank)

    def draw(self, step: int, rows: int | None) -> Draw:
        """p for an optimizer step. Once p is in the factors, training goes on as plain LoRA at rank R."""
        if self.form == "raw":
            return self.rule.draw(self.nesting, self.seed, step, rows)
        return Draw(self.nesting.prefix(self.nesting.max_rank))

    def scale(self, rank: int) -> float:
        """The scale of the prefix of this rank when deployed; kept diagonals have theirs inside, relative to it."""
        if self.form == "raw" and self.inference == "prefix":
            return self.nesting.scale(rank)
        return self.nesting.scale(self.nesting.max_rank)

    def mask(self, rank: int) -> Tensor:
        """The diagonal of the deployed prefix without its `scale`, shape (R,), float64."""
        mask = (torch.arange(self.nesting.max_rank) < rank).double()
        if self.form == "raw" and self.inference == "keep":
            return mask * self.trained_diagonal() / self.scale(rank)
        return mask
