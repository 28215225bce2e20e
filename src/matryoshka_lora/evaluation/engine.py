"""Log-likelihoods and greedy answers of a causal language model at several ranks at once.

Each row of a batch has its own rank. Tokens that several requests begin with are computed once per
rank, and their keys and values are copied.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from matryoshka_lora.examples import common_prefix_length
from matryoshka_lora.peft.adapter import NestedAdapter

Tokens = tuple[int, ...]

_MAX_BATCH_TOKENS = 2**15
_MAX_LOGITS = 2**27  # of one forward: 512 MiB in float32
_MAX_NEW_TOKENS_CPU = 512  # small forwards have less padding and stay in the CPU's caches
# At this share of unfinished rows, the others leave the batch, which copies the cache.
_RUNNING_SHARE = 7 / 8
# The errors of architectures that do not support ranks, padding or a copied cache.
_UNSUPPORTED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


class Row(NamedTuple):
    """A row to compute.

    Attributes:
        tokens: The tokens of the row.
        rank: The rank at which they are computed; 0 is the base model.
        num_logits: The number of last positions whose logits are needed.
        source: The index of the tree or prompt that the row computes.
    """

    tokens: Tokens
    rank: int
    num_logits: int
    source: int


class Tree(NamedTuple):
    """A context, and the continuations that branch from it.

    Attributes:
        tokens: The context, followed by the stem.
        stem: The tokens that all continuations begin with.
        branches: For each continuation, the index of its request, and its tokens after the stem, at
            least one.
    """

    tokens: Tokens
    stem: Tokens
    branches: list[tuple[int, Tokens]]


@dataclass
class Answer:
    """The tokens that are generated for a prompt at a rank."""

    prompt: int
    rank: int
    tokens: list[int] = field(default_factory=list)
    is_finished: bool = False


@dataclass
class Scores:
    """The log-likelihoods of continuations, which are summed up token by token.

    Attributes:
        logprobs: Shape (requests, ranks), float64.
        is_greedy: Whether each token is the most likely one, shape (requests, ranks).
    """

    logprobs: np.ndarray[Any, np.dtype[np.float64]]
    is_greedy: np.ndarray[Any, np.dtype[np.bool_]]

    def add(self, logits: Tensor, tokens: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Add tokens of a forward pass.

        Args:
            logits: Shape (rows, positions, vocabulary).
            tokens: For each token the indices of its request and rank, the row and the position of
                its logits, and the token.
        """
        indices = torch.tensor(tokens).T
        requests, ranks = indices[:2].numpy()
        rows, positions, token_ids = indices[2:].to(logits.device)
        logits = logits.float()
        normalizers = logits.logsumexp(dim=-1)[rows, positions]
        logprobs = logits[rows, positions, token_ids] - normalizers
        is_best = logits.argmax(dim=-1)[rows, positions] == token_ids
        np.add.at(self.logprobs, (requests, ranks), logprobs.cpu().numpy())
        np.logical_and.at(self.is_greedy, (requests, ranks), is_best.cpu().numpy())


@dataclass
class Batch:
    """The rows of a batch, with the keys and values of their tokens so far.

    All rows end at the same position, so shorter rows are left-padded. The cache keeps all
    positions for sliding windows as well: the masks hide the old ones.

    Attributes:
        ranks: The rank of each row.
        padding: The number of positions of padding before each row.
        cache: The keys and values, shape (rows, heads, positions, features) in each layer.
    """

    ranks: list[int]
    padding: list[int]
    cache: DynamicCache = field(default_factory=DynamicCache)

    @property
    def length(self) -> int:
        """The number of positions, padding included."""
        return int(self.cache.get_seq_length())

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> DynamicCache:
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(function(layer.keys), function(layer.values), index)
        return cache

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a copy of some rows, without positions that are padding in all of them."""
        padding = [self.padding[row] for row in rows]
        unused = min(padding)
        index = torch.tensor(rows)
        cache = self._map_states(lambda states: states[index.to(states.device), :, unused:])
        ranks = [self.ranks[row] for row in rows]
        return Batch(ranks, [count - unused for count in padding], cache)

    def expand(self, ranks: Sequence[int], padding: Sequence[int]) -> Batch:
        """Return rows that begin with a prefix, of which this batch has one row per rank.

        The length stays the same, so a left-padded row gets only the beginning of the prefix.
        """
        rows = torch.tensor([self.ranks.index(rank) for rank in ranks])
        positions = torch.arange(self.length) - torch.tensor(padding)[:, None]
        positions = positions.clamp(min=0)

        def expand_states(states: Tensor) -> Tensor:
            states = states[rows.to(states.device)]
            if not any(padding):
                return states
            index = positions.to(states.device)[:, None, :, None].expand_as(states)
            return states.gather(2, index)

        return Batch(list(ranks), list(padding), self._map_states(expand_states))


def _concatenate(batches: Sequence[Batch]) -> Batch:
    """Return the rows of several batches as one batch, with padding before the shorter ones."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.length for batch in batches)

    def concatenate_states(states: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (0, 0, length - part.shape[-2], 0)) for part in states])

    cache = DynamicCache()
    for index, layers in enumerate(zip(*(batch.cache.layers for batch in batches), strict=True)):
        keys = concatenate_states([layer.keys for layer in layers])
        values = concatenate_states([layer.values for layer in layers])
        cache.update(keys, values, index)
    ranks: list[int] = []
    padding: list[int] = []
    for batch in batches:
        ranks += batch.ranks
        padding += [count + length - batch.length for count in batch.padding]
    return Batch(ranks, padding, cache)


def common_prefix(sequences: Sequence[Tokens]) -> Tokens:
    """Return the tokens that all sequences begin with, without the last token of the shortest."""
    # In lexicographic order, all others lie between the first and the last.
    first, last = min(sequences), max(sequences)
    shortest = min(len(sequence) for sequence in sequences)
    return first[: min(common_prefix_length(first, last), shortest - 1)]


class Engine:
    """A causal language model with a nested adapter, for batches of rows with different ranks.

    `score` and `generate` compute requests at all ranks. A subclass may override `compute_prefix`
    and `build_trees`, which find the tokens that requests have in common.

    Args:
        adapter: The adapter, on a model in eval mode.
        ranks: The ranks to evaluate; 0 is the base model.
        max_batch_tokens: The maximum number of tokens, over all rows, whose keys and values a batch
            holds; positive. Defaults to 32,768.

    Raises:
        MatryoshkaError: The adapter is merged or not active, or a rank is not available.
    """

    def __init__(
        self, adapter: NestedAdapter, ranks: Sequence[int], max_batch_tokens: int | None = None
    ) -> None:
        with adapter.rows(ranks):  # checks the adapter and the ranks
            pass
        self.adapter = adapter
        self.ranks = list(ranks)
        self.max_batch_tokens = max_batch_tokens or _MAX_BATCH_TOKENS
        self.model = adapter.model
        self.device = self.model.device
        forward = adapter.base_model.forward
        self._forward_parameters = set(inspect.signature(forward).parameters)
        self._vocab_size = self.model.config.get_text_config().vocab_size
        self._max_new_tokens = max(1, self.max_batch_tokens // 8)
        if self.device.type == "cpu":
            self._max_new_tokens = _MAX_NEW_TOKENS_CPU

    @torch.no_grad()
    def is_supported(self, tokens: Tokens) -> bool:
        """Return whether rows with ranks, padding and a copied cache get a plain forward's logits.

        Architectures fail in many ways: routed experts have no rows, recurrent states have no
        positions, some models do not detect where padding ends. One trial run catches all of these.

        Args:
            tokens: Any 13 tokens.
        """
        first_rank, last_rank = self.ranks[0], self.ranks[-1]
        rows = [Row(tokens[:9], last_rank, 1, source=0), Row(tokens[:6], first_rank, 1, source=1)]
        try:
            batch, _ = self.prefill(None, rows)
            batch = batch.select([1, 0])
            with self.adapter.rows(batch.ranks):
                logits = self.forward(batch, [tokens[6:10], tokens[9:13]], 1)[:, 0]
        except _UNSUPPORTED:
            return False
        previous_rank = self.adapter.rank
        expected: list[Tensor] = []
        for rank, row_tokens in ((first_rank, tokens[:10]), (last_rank, tokens)):
            self.adapter.set_rank(rank)
            expected.append(
                self.model(torch.tensor([row_tokens], device=self.device)).logits[0, -1]
            )
        self.adapter.set_rank(previous_rank)
        tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
        largest = torch.stack(expected).abs().max()
        return bool((logits - torch.stack(expected)).abs().max() <= tolerance * largest)

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[tuple[Tokens, Tokens]],
        update_progress: Callable[[int], object],
    ) -> Scores:
        """Return the log-likelihoods of continuations at all ranks.

        Args:
            requests: A context and a continuation each, of at least one token.
            update_progress: Is called with the number of tokens of the requests that were computed.
                The numbers add up to the tokens of all requests, times ranks.
        """
        shape = (len(requests), len(self.ranks))
        scores = Scores(np.zeros(shape), np.ones(shape, dtype=bool))
        trees = self.build_trees(requests)
        prefix = self.compute_prefix([context for context, _ in requests])
        rows: list[Row] = []
        for source, tree in enumerate(trees):
            # The last position of the context predicts the first token of the continuations.
            rows += [Row(tree.tokens, rank, len(tree.stem) + 1, source) for rank in self.ranks]
        for batch_rows in self._split_rows(rows, prefix):
            batch, logits = self.prefill(prefix, batch_rows)
            scored: list[tuple[int, int, int, int, int]] = []
            branches: list[tuple[int, int, Tokens]] = []  # the row, the request and its tokens
            num_tokens = 0
            for index, row in enumerate(batch_rows):
                tree, column = trees[row.source], self.ranks.index(row.rank)
                for request, tokens in tree.branches:
                    first_position = logits.shape[1] - row.num_logits
                    for position, token in enumerate((*tree.stem, tokens[0]), first_position):
                        scored.append((request, column, index, position, token))
                    if len(tokens) > 1:
                        branches.append((index, request, tokens))
                    num_tokens += sum(map(len, requests[request]))
            scores.add(logits, scored)

            # The first tokens are scored. The last ones are predicted, but predict nothing.
            branches.sort(key=lambda branch: -len(branch[2]))
            lengths = [len(tokens) - 1 for _, _, tokens in branches]
            for selected in self._split(lengths, max(lengths, default=0), batch.length):
                part, longest = branches[selected], lengths[selected.start]
                part_batch = batch.select([index for index, _, _ in part])
                inputs = [tokens[:-1] + (0,) * (longest + 1 - len(tokens)) for _, _, tokens in part]
                with self.adapter.rows(part_batch.ranks):
                    logits = self.forward(part_batch, inputs, longest)
                scored = []
                for row_index, (_, request, tokens) in enumerate(part):
                    column = self.ranks.index(part_batch.ranks[row_index])
                    for position, token in enumerate(tokens[1:]):
                        scored.append((request, column, row_index, position, token))
                scores.add(logits, scored)
            update_progress(num_tokens)
        return scores

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        is_finished: Callable[[list[int]], bool],
        update_progress: Callable[[int], object],
    ) -> list[Answer]:
        """Return the answers of greedy decoding at all ranks, in any order.

        Finished rows leave the batch, and waiting prompts join it.

        Args:
            is_finished: Returns whether an answer ends with its last token.
            update_progress: Is called with the number of tokens that were generated, or that a
                finished answer does not need. The numbers add up to ``max_new_tokens`` for each
                prompt and rank.
        """
        prefix = self.compute_prefix(prompts)
        waiting = [
            Row(tokens, rank, 1, source=prompt)
            for prompt, tokens in enumerate(prompts)
            for rank in self.ranks
        ]
        waiting.sort(key=lambda row: len(row.tokens))  # the longest last
        max_rows = max(1, self.max_batch_tokens // (len(waiting[-1].tokens) + max_new_tokens))
        finished: list[Answer] = []
        batch: Batch | None = None
        answers: list[Answer] = []  # one per row of the batch

        def append_tokens(answers: Sequence[Answer], logits: Tensor) -> None:
            """Append the most likely token to each answer that has not ended."""
            num_done = 0
            tokens = logits[:, -1].float().argmax(dim=-1).tolist()
            for answer, token in zip(answers, tokens, strict=True):
                if not answer.is_finished:
                    answer.tokens.append(token)
                    num_done += 1
                    length = len(answer.tokens)
                    answer.is_finished = length == max_new_tokens or is_finished(answer.tokens)
                    if answer.is_finished:
                        num_done += max_new_tokens - length
            update_progress(num_done)

        while waiting or answers:
            num_free = max_rows - len(answers)
            if waiting and num_free:
                starting, waiting = waiting[-num_free:], waiting[:-num_free]
                batches = [] if batch is None else [batch]
                for rows in self._split_rows(starting, prefix):
                    new_batch, logits = self.prefill(prefix, rows)
                    new_answers = [Answer(row.source, row.rank) for row in rows]
                    append_tokens(new_answers, logits)
                    batches.append(new_batch)
                    answers += new_answers
                batch = _concatenate(batches)
            assert batch is not None
            with self.adapter.rows(batch.ranks):
                while sum(not a.is_finished for a in answers) > _RUNNING_SHARE * len(answers):
                    last_tokens = [answer.tokens[-1:] for answer in answers]
                    append_tokens(answers, self.forward(batch, last_tokens, 1))
            finished += [answer for answer in answers if answer.is_finished]
            running = [row for row, answer in enumerate(answers) if not answer.is_finished]
            batch = batch.select(running) if running else None
            answers = [answers[row] for row in running]
        return finished

    def build_trees(self, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Tree]:
        """Return a tree for each context, so that continuations share it."""
        requests_by_context: dict[Tokens, list[int]] = defaultdict(list)
        for request, (context, _) in enumerate(requests):
            requests_by_context[context].append(request)
        trees: list[Tree] = []
        for context, indices in requests_by_context.items():
            stem = common_prefix([requests[index][1] for index in indices])
            branches = [(index, requests[index][1][len(stem) :]) for index in indices]
            trees.append(Tree(context + stem, stem, branches))
        return trees

    def compute_prefix(self, contexts: Sequence[Tokens]) -> Batch | None:
        """Compute the tokens that all contexts begin with, such as few-shot examples.

        Returns:
            One row per rank, or None if nothing would be computed twice.
        """
        prefix = common_prefix(contexts)
        if not prefix or len(contexts) == 1:
            return None
        batch, _ = self.prefill(None, [Row(prefix, rank, 1, source=0) for rank in self.ranks])
        return batch

    def prefill(self, prefix: Batch | None, rows: Sequence[Row]) -> tuple[Batch, Tensor]:
        """Compute rows so that they end at the same position.

        All rows compute the number of new tokens that the longest one needs. Shorter rows compute
        some tokens of the prefix again, rather than padding, and are left-padded.

        Args:
            prefix: The beginning of all rows, from `compute_prefix`.

        Returns:
            The rows, and the logits of the largest ``num_logits``.
        """
        length = max(len(row.tokens) for row in rows)
        ranks = [row.rank for row in rows]
        padding = [length - len(row.tokens) for row in rows]
        batch = Batch(ranks, padding) if prefix is None else prefix.expand(ranks, padding)
        past_length = batch.length
        inputs = [
            ((0,) * count + row.tokens)[past_length:]
            for row, count in zip(rows, padding, strict=True)
        ]
        with self.adapter.rows(ranks):
            logits = self.forward(batch, inputs, max(row.num_logits for row in rows))
        return batch, logits

    def forward(self, batch: Batch, inputs: Sequence[Sequence[int]], num_logits: int) -> Tensor:
        """Compute more tokens of rows, in the context ``adapter.rows(batch.ranks)``.

        Args:
            batch: The rows; their cache grows.
            inputs: The new tokens of each row, the same number for all.
            num_logits: The number of last positions whose logits are returned.

        Returns:
            Logits of shape (rows, num_logits, vocabulary).
        """
        input_ids = torch.tensor(inputs, device=self.device)
        past_length = batch.length
        positions = torch.arange(past_length + input_ids.shape[1], device=self.device)
        padding = torch.tensor(batch.padding, device=self.device)[:, None]
        attention_mask = (positions >= padding).long() if any(batch.padding) else None
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": (positions[past_length:] - padding).clamp(min=0),
            "logits_to_keep": num_logits,
            "past_key_values": batch.cache,
            "cache": batch.cache,  # transformers has renamed the argument
        }
        if "cache" in self._forward_parameters:
            del arguments["past_key_values"]
        supported = {
            name: value for name, value in arguments.items() if name in self._forward_parameters
        }
        logits: Tensor = self.model(input_ids, use_cache=True, **supported).logits
        return logits[:, -num_logits:]

    def _split_rows(self, rows: Sequence[Row], prefix: Batch | None) -> Iterator[list[Row]]:
        """Yield rows in batches for `prefill`, the longest ones first."""
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        past_length = prefix.length if prefix is not None else 0
        num_logits = max(row.num_logits for row in rows)
        lengths = [len(row.tokens) - past_length for row in rows]
        for part in self._split(lengths, num_logits, past_length):
            yield list(rows[part])

    def _split(self, lengths: Sequence[int], num_logits: int, past_length: int) -> Iterator[slice]:
        """Yield the rows of forward passes of limited memory.

        Args:
            lengths: The number of new tokens of each row, the longest one first.
            num_logits: The number of positions whose logits are needed.
        """
        start = 0
        while start < len(lengths):
            num_rows = min(
                self.max_batch_tokens // (past_length + lengths[start]),
                self._max_new_tokens // lengths[start],
                _MAX_LOGITS // (num_logits * self._vocab_size),
            )
            yield slice(start, start + max(1, num_rows))
            start += max(1, num_rows)
