"""Training rules: which diagonal p stands between B and A at each optimizer step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.nesting import Nesting

DiagonalArray = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """Choose the diagonal p between B and A at each optimizer step.

    Example, a rule that trains rank R half of the time and a random nested rank otherwise::

        def half(nesting, rng, batch_size):
            rank = nesting.max_rank if rng.random() < 0.5 else rng.choice(nesting.ranks)
            return nesting.prefix(rank)

        adapter = nest(model, rule=Rule("half", half))

    Attributes:
        name: The name of the rule, for messages.
        diagonal: A function of the `Nesting`, a ``random.Random`` and the number of rows of a
            batch. It returns p: shape (R,) for the whole batch, or (batch_size, R) for one
            diagonal per row. A function of a module, rather than a lambda, can be pickled.
        fixed: True if p is the same at every step. P is then part of the adapter: rank R computes
            ``B diag(p) A``. Otherwise p is used in training only, and rank R computes ``s_R B A``.
    """

    name: str
    diagonal: Callable[[Nesting, random.Random, int], DiagonalArray]
    fixed: bool = False

    def sample(self, nesting: Nesting, seed: int, step: int, batch_size: int = 1) -> DiagonalArray:
        """Return p for an optimizer step. The same arguments give the same p on every machine.

        Args:
            nesting: The nested ranks and their scales.
            seed: Any integer.
            step: The number of optimizer steps completed so far.
            batch_size: The number of rows of a batch, over all processes.

        Returns:
            Shape (R,) or (batch_size, R), float64.

        Raises:
            MatryoshkaError: The rule returned an array of another shape, or a value that is not
                finite; or it is fixed, and returned a zero.
        """
        rng = random.Random(f"{seed}/{step}")
        p = np.asarray(self.diagonal(nesting, rng, batch_size), dtype=np.float64)
        per_batch, per_row = (nesting.max_rank,), (batch_size, nesting.max_rank)
        if p.shape != per_batch and (self.fixed or p.shape != per_row):
            expected = f"{per_batch}" if self.fixed else f"{per_batch} or {per_row}"
            raise MatryoshkaError(
                f"Rule {self.name!r} returned a diagonal of shape {p.shape}, expected {expected}."
            )
        if not np.isfinite(p).all():
            raise MatryoshkaError(f"Rule {self.name!r} returned a diagonal that is not finite.")
        # Saved factors hold B diag(p), so loading them divides by p.
        if self.fixed and not p.all():
            raise MatryoshkaError(
                f"Rule {self.name!r} is fixed, but returned a diagonal with zeros. Use a smaller "
                "largest rank instead of zeros at the end, or `fixed=False`."
            )
        return p


def lora(nesting: Nesting, rng: random.Random, batch_size: int) -> DiagonalArray:
    """Return the diagonal of plain LoRA at rank R."""
    return nesting.prefix(nesting.max_rank)


def matryoshka(nesting: Nesting, rng: random.Random, batch_size: int) -> DiagonalArray:
    """Return the diagonal P of the paper, the sum of all prefixes (arXiv 2605.07850)."""
    return nesting.diagonal()


def dylora(nesting: Nesting, rng: random.Random, batch_size: int) -> DiagonalArray:
    """Return the diagonal of one random nested rank.

    As in the DyLoRA baseline of arXiv 2605.07850 (DyLoRA: arXiv 2210.07558).
    """
    return nesting.prefix(rng.choice(nesting.ranks))


RULES: dict[str, Rule] = {
    "lora": Rule("lora", lora, fixed=True),
    "matryoshka": Rule("matryoshka", matryoshka, fixed=True),
    "dylora": Rule("dylora", dylora),
}


def get_rule(rule: str | Rule) -> Rule:
    """Return a rule, given itself or the name of a built-in one.

    Raises:
        MatryoshkaError: No built-in rule has this name.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        names = ", ".join(map(repr, RULES))
        raise MatryoshkaError(f"`rule` must be one of {names} or a Rule, got {short(rule)}.")
    return RULES[rule]
