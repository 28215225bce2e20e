"""Log-likelihoods of continuations at several ranks at once.

The common context prefix is computed once per rank and its KV cache is copied. The continuations of
a context branch from its keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.evaluation.kv_cache import (
    BatchRows,
    Branch,
    PrefixTree,
    Tokens,
    build_tree,
)
from matryoshka_lora.evaluation.multi_rank_model import MultiRankModel, Row


class ScoredToken(NamedTuple):
    """A token that counts in a continuation, and where its logits are.

    Attributes:
        request: The index of the request.
        rank: The rank.
        row, position: The index of its logits in the forward pass.
        token: The token.
    """

    request: int
    rank: int
    row: int
    position: int
    token: int


class Scores:
    """The log-likelihoods of continuations, which are summed up token by token.

    Attributes:
        logprobs: Shape (requests, ranks), float64.
        is_greedy: Whether each token is the most likely one, shape (requests, ranks).
    """

    def __init__(self, num_requests: int, ranks: Sequence[int]) -> None:
        self.logprobs = np.zeros((num_requests, len(ranks)))
        self.is_greedy = np.ones((num_requests, len(ranks)), dtype=bool)
        self._columns = {rank: column for column, rank in enumerate(ranks)}

    def add(self, logits: Tensor, tokens: Sequence[ScoredToken]) -> None:
        """Add tokens of a forward pass with logits of shape (rows, positions, vocabulary)."""
        requests = np.array([token.request for token in tokens])
        columns = np.array([self._columns[token.rank] for token in tokens])
        rows = torch.tensor([token.row for token in tokens], device=logits.device)
        positions = torch.tensor([token.position for token in tokens], device=logits.device)
        token_ids = torch.tensor([token.token for token in tokens], device=logits.device)
        logits = logits.float()
        normalizers = logits.logsumexp(dim=-1)[rows, positions]
        logprobs = logits[rows, positions, token_ids] - normalizers
        is_best = logits.argmax(dim=-1)[rows, positions] == token_ids
        np.add.at(self.logprobs, (requests, columns), logprobs.cpu().numpy())
        np.logical_and.at(self.is_greedy, (requests, columns), is_best.cpu().numpy())


@torch.no_grad()
def score_continuations(
    model: MultiRankModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    update_progress: Callable[[int], object],
) -> Scores:
    """Return the log-likelihoods of continuations at all ranks of the model.

    Args:
        model: The model.
        requests: A context and a continuation each, of at least one token.
        update_progress: Is called with the number of tokens of the requests that were computed.
            They sum up to those of all requests, times ranks.
    """
    continuations: dict[Tokens, list[Branch]] = defaultdict(list)
    for index, (context, continuation) in enumerate(requests):
        continuations[context].append(Branch(index, continuation))
    trees = [build_tree(context, branches) for context, branches in continuations.items()]
    rows: list[Row] = []
    for source, tree in enumerate(trees):
        for rank in model.ranks:
            # The last position of the context predicts the first token of the continuations.
            num_logits = len(tree.stem) + 1
            rows.append(Row(tree.tokens, rank, num_logits, source))
    scores = Scores(len(requests), model.ranks)
    prefix = model.compute_prefix(list(continuations))
    for batch_rows in model.split_rows(rows, prefix):
        batch, logits = model.prefill(prefix, batch_rows)
        batch_trees = [trees[row.source] for row in batch_rows]
        _score_stems(scores, batch.ranks, batch_trees, logits)
        _score_branches(scores, model, batch, batch_trees)
        for tree in batch_trees:
            for branch in tree.branches:
                context, continuation = requests[branch.request]
                update_progress(len(context) + len(continuation))
    return scores


def _score_stems(
    scores: Scores, ranks: Sequence[int], trees: Sequence[PrefixTree], logits: Tensor
) -> None:
    """Score the stem of each tree, and the first token of each branch."""
    num_positions = logits.shape[1]
    scored_tokens: list[ScoredToken] = []
    for row, (rank, tree) in enumerate(zip(ranks, trees, strict=True)):
        for branch in tree.branches:
            tokens = (*tree.stem, branch.tokens[0])
            first_position = num_positions - len(tokens)
            for position, token in enumerate(tokens, start=first_position):
                scored_tokens.append(ScoredToken(branch.request, rank, row, position, token))
    scores.add(logits, scored_tokens)


def _score_branches(
    scores: Scores, model: MultiRankModel, batch: BatchRows, trees: Sequence[PrefixTree]
) -> None:
    """Score the tokens of each branch after its first."""
    branches: list[tuple[int, Branch]] = []
    for row, tree in enumerate(trees):
        for branch in tree.branches:
            if len(branch.tokens) > 1:
                branches.append((row, branch))
    branches.sort(key=lambda item: -len(item[1].tokens))
    # The last token is predicted, but predicts nothing.
    lengths = [len(branch.tokens) - 1 for _, branch in branches]
    for start, stop in model.split(lengths, lengths, batch.length):
        selected = branches[start:stop]
        longest = lengths[start]
        inputs: list[Tokens] = []
        for _, branch in selected:
            padding = (0,) * (longest + 1 - len(branch.tokens))
            inputs.append(branch.tokens[:-1] + padding)
        branch_rows = batch.select([row for row, _ in selected])
        logits = model.extend(branch_rows, inputs, longest)
        scored_tokens: list[ScoredToken] = []
        for row, (_, branch) in enumerate(selected):
            for position, token in enumerate(branch.tokens[1:]):
                scored_tokens.append(
                    ScoredToken(branch.request, branch_rows.ranks[row], row, position, token)
                )
        scores.add(logits, scored_tokens)
