"""Log-likelihoods of continuations: one row holds a context and its continuations as branches of a tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka_lora.engine.attention import Prefill
from matryoshka_lora.engine.packing import Tokens
from matryoshka_lora.engine.runner import Prefix, Runner

_BRANCHES = 512
"""Tokens of continuations in one row, above which a row is cut in two: every token's attention reads them all."""


_AT_ONCE = {"cpu": 16}
"""Tokens whose logits are made wide together: so many stay in a core's cache."""


class Likelihood(NamedTuple):
    """What the harness calls a loglikelihood.

    Attributes:
        logprob: The summed log-probability of the continuation, in nats.
        greedy: Whether greedy decoding would have written the continuation.
    """

    logprob: float
    greedy: bool


class Tree(NamedTuple):
    """A context and its continuations.

    Attributes:
        context: What all branches follow.
        rank: The row's.
        branches: Number and tokens of each continuation's request.
    """

    context: Tokens
    rank: int
    branches: list[tuple[int, Tokens]]

    @property
    def length(self) -> int:
        """Tokens of the row. The last one of a continuation predicts nothing that is asked for."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.branches)


def branched(tree: Tree, prefix: int) -> Iterator[Tree]:
    """Without the first ``prefix`` tokens of the context, in rows that are not too long."""
    context, size = tree.context[prefix:], 0
    part: list[tuple[int, Tokens]] = []
    for number, tokens in tree.branches:
        if part and size + len(tokens) > _BRANCHES:
            yield Tree(context, tree.rank, part)
            part, size = [], 0
        part.append((number, tokens))
        size += len(tokens)
    yield Tree(context, tree.rank, part)


def score_trees(
    runner: Runner, prefix: Prefix, trees: Sequence[Tree], put: Callable[[int, Likelihood], object]
) -> None:
    """One forward pass over rows, one for each tree."""
    device, longest = runner.device, max(tree.length for tree in trees)
    several = any(len(tree.branches) > 1 for tree in trees)
    ids, positions, branches, wanted = [], [], [], []
    # For each asked token: its row, the place of its logits in `wanted`, itself; and the request of each stretch.
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    stretches: list[tuple[int, int]] = []
    for row, tree in enumerate(trees):
        context = list(tree.context)
        tokens, at, branch = list(context), list(range(len(context))), [0] * len(context)
        asked = [len(context) - 1]
        for name, (number, continuation) in enumerate(tree.branches, start=1):
            begin = len(tokens)
            tokens += continuation[:-1]
            at += range(len(context), len(context) + len(continuation) - 1)
            branch += [name] * (len(continuation) - 1)
            of = [0, *range(len(asked), len(asked) + len(continuation) - 1)]
            asked += range(begin, len(tokens))
            stretches.append((number, len(of)))
            rows += [row] * len(of)
            places += of
            targets += continuation
        spare = longest - len(tokens)
        ids.append(tokens + [runner.pad] * spare)
        # Without branches every row stands at the same positions, padding too.
        padding = [0] * spare if several else range(len(at), longest)
        positions.append([prefix.length + place for place in (*at, *padding)])
        branches.append(branch + [0] * spare)
        wanted.append(asked)
    most = max(map(len, wanted))
    wanted = [asked + asked[:1] * (most - len(asked)) for asked in wanted]
    at_positions = torch.tensor(positions, device=device)
    row_pass = Prefill(
        at_positions,
        torch.tensor(branches, device=device) if several else None,
        prefix.keys,
        torch.tensor([prefix.row[tree.rank] for tree in trees], device=device),
    )
    with runner.ranks([tree.rank for tree in trees]):
        logits = runner.logits(
            torch.tensor(ids, device=device), at_positions, row_pass, torch.tensor(wanted, device=device)
        )
    asked_of = (torch.tensor(rows, device=device), torch.tensor(places, device=device))
    logprobs, is_best = token_scores(logits, *asked_of, torch.tensor(targets, device=device))
    start = 0
    for number, length in stretches:
        put(number, Likelihood(sum(logprobs[start : start + length]), all(is_best[start : start + length])))
        start += length


def token_scores(logits: Tensor, rows: Tensor, places: Tensor, tokens: Tensor) -> tuple[list[float], list[bool]]:
    """The log-probability of each token by the logits at its row and place, and whether it is the likeliest one.

    Args:
        logits: Shape (rows, places, vocabulary).
        rows: Shape (tokens,), as the others.
        places: Of the token's logits.
        tokens: The tokens.
    """
    logprobs: list[float] = []
    is_best: list[bool] = []
    at_once = _AT_ONCE.get(logits.device.type, len(tokens))
    for start in range(0, len(tokens), at_once):
        part = slice(start, start + at_once)
        wide = logits[rows[part], places[part]].to(torch.promote_types(logits.dtype, torch.float32))
        found = wide.gather(1, tokens[part, None]).squeeze(1)
        logprobs += (found - wide.logsumexp(dim=-1)).tolist()
        best = found == wide.amax(dim=-1)
        # Of equally likely tokens, greedy decoding writes argmax's. It takes longer than amax, so few rows are asked.
        best[best.clone()] = wide[best].argmax(dim=-1) == tokens[part][best]
        is_best += best.tolist()
    return logprobs, is_best
