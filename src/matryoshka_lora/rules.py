"""Training rules: which diagonal p stands between the factors at an optimizer step.

Every rule is the same mechanism, ``B diag(p) A x``; only p differs. A draw is a pure function of the seed and the
number of the optimizer step, so a resumed run draws what the uninterrupted one would have drawn, and every process of
a distributed run draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting


@dataclass(frozen=True)
class Draw:
    """What a rule says for one optimizer step.

    Attributes:
        diagonal: p, float64, of shape (R,) for the whole batch or (rows, R) for one diagonal per row.
        learn: Which columns of B and rows of A receive a gradient, bool of shape (R,); None means all of them.
    """

    diagonal: Tensor
    learn: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """One training rule.

    Attributes:
        name: What users write.
        at_step: The draw for a random generator and a number of rows.
        fixed: p never changes, so it is part of what was trained and can be kept at inference.
        per_row: p differs between the rows of a batch.
        every_rank: All ranks from 1 to R are drawn, not only the nested ones.
    """

    name: str
    at_step: Callable[[Nesting, random.Random, int | None], Draw]
    fixed: bool = False
    per_row: bool = False
    every_rank: bool = False

    def draw(self, nesting: Nesting, seed: int, step: int, rows: int | None = None) -> Draw:
        """The diagonal for optimizer step ``step``; the same arguments give the same draw, on any machine.

        Args:
            nesting: The nested ranks and their scales.
            seed: Any integer.
            step: The number of optimizer steps done so far, from 0.
            rows: The number of rows of a batch; needed by a rule with one diagonal per row.
        """
        if self.per_row and (rows is None or rows < 1):
            raise MatryoshkaError(f"rule {self.name!r} gives each row a rank of its own: say how many rows a batch has")
        return self.at_step(nesting, random.Random(f"{seed}/{step}"), rows)

    def trained_ranks(self, nesting: Nesting) -> tuple[int, ...]:
        """The ranks that an adapter trained by this rule may be cut at."""
        return tuple(range(1, nesting.max_rank + 1)) if self.every_rank else nesting.ranks

    def trained_diagonal(self, nesting: Nesting) -> Tensor:
        """The p of the full-rank function that was trained, shape (R,): P itself where p is fixed, else ``s_R``."""
        if self.fixed:
            return self.draw(nesting, seed=0, step=0).diagonal
        return nesting.prefix(nesting.max_rank)


def _lora(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    return Draw(nesting.prefix(nesting.max_rank))


def _matryoshka(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    return Draw(nesting.diagonal())


def _dylora(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    return Draw(nesting.prefix(generator.choice(nesting.ranks)))


def _dylora_all(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    return Draw(nesting.prefix(generator.randint(1, nesting.max_rank)))


def _dylora_frozen(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    rank = generator.randint(1, nesting.max_rank)
    return Draw(nesting.prefix(rank), learn=torch.arange(1, nesting.max_rank + 1) == rank)


def _stratified(nesting: Nesting, generator: random.Random, rows: int | None) -> Draw:
    assert rows is not None  # Rule.draw checks it
    return Draw(torch.stack([nesting.prefix(rank) for rank in stratified_ranks(nesting.ranks, rows, generator)]))


def stratified_ranks(ranks: Sequence[int], rows: int, generator: random.Random) -> list[int]:
    """A rank for each row: each as often as every other, so that no two counts differ by over 1, in random order."""
    whole, rest = divmod(rows, len(ranks))
    drawn = [*ranks] * whole + generator.sample(ranks, rest)
    generator.shuffle(drawn)
    return drawn


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        # Plain LoRA at rank R.
        Rule("lora", _lora, fixed=True),
        # The paper's P, the sum of all prefixes (arXiv 2605.07850).
        Rule("matryoshka", _matryoshka, fixed=True),
        # One nested rank per step for the whole batch, as in the MatryoshkaLoRA paper.
        Rule("dylora", _dylora),
        # One rank of 1..R per step (DyLoRA, arXiv 2210.07558); frozen, only its own row of A and column of B learn.
        Rule("dylora-all", _dylora_all, every_rank=True),
        Rule("dylora-frozen", _dylora_frozen, every_rank=True),
        # Each row of the batch at a rank of its own, every rank as often.
        Rule("stratified", _stratified, per_row=True),
    )
}


def is_named(rule: Rule) -> bool:
    """Whether a file can name it: it is one of `RULES`, and not another one that is called so."""
    return RULES.get(rule.name) == rule


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        MatryoshkaError: There is none; the message lists them.
    """
    if not isinstance(name, str) or name not in RULES:
        close = get_close_matches(str(name), RULES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise MatryoshkaError(f"there is no rule {name!r}; {hint}the rules are {', '.join(RULES)}")
    return RULES[name]
