"""Hold the state of `ManyRanks`: rows of a batch with their cache, answers, scores, prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from matryoshka_lora.files.rows import common_length

_ROOM = 64  # spare columns of a cache, so that a step of generation writes in place

Tokens = tuple[int, ...]


class Tree(NamedTuple):
    """A context, and the continuations that branch from it; a prompt to answer has none.

    Attributes:
        tokens: The context, and what all continuations begin with.
        start: The length of the context.
        branches: Each request's number, and its tokens after the common beginning: at least one.
    """

    tokens: Tokens
    start: int
    branches: list[tuple[int, Tokens]]

    @property
    def keep(self) -> int:
        """The number of last tokens whose logits are wanted."""
        return len(self.tokens) - self.start + 1


def tree_of(context: Tokens, branches: list[tuple[int, Tokens]]) -> Tree:
    """Return the tree of a context's continuations, each given with its request's number."""
    continuations = [tokens for _, tokens in branches]
    alike = common_length(min(continuations), max(continuations))
    stem = min(alike, *(len(tokens) - 1 for tokens in continuations))
    rests = [(number, tokens[stem:]) for number, tokens in branches]
    return Tree((*context, *continuations[0][:stem]), len(context), rests)


class GrowingLayer(DynamicLayer):
    """A layer of `DynamicCache` that appends in place; the original copies all columns."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append columns to keys and values of shape (rows, heads, columns, features)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self._rooms: dict[str, Tensor] = {}
            return key_states, value_states
        before, more = self.keys.shape[-2], key_states.shape[-2]
        for name, new in (("keys", key_states), ("values", value_states)):
            room = self._rooms.get(name)
            if room is None or room.shape[-2] < before + more:
                room = new.new_empty(*new.shape[:-2], before + more + _ROOM, new.shape[-1])
                room[:, :, :before] = getattr(self, name)
            room[:, :, before : before + more] = new
            self._rooms[name] = room
            setattr(self, name, room[:, :, : before + more])
        return self.keys, self.values


@dataclass
class Rows:
    """Rows of one batch that were read. They end at the same column, and stand behind padding.

    Attributes:
        ranks: One for each row.
        pads: The columns of padding before each row's first token.
        states: Keys and values for each layer, which the cache begins with.
    """

    ranks: list[int]
    pads: list[int]
    states: list[Any] = field(default_factory=list)

    @cached_property
    def cache(self) -> DynamicCache:
        """Transformers' cache. It keeps all columns of sliding windows too: masks hide the old."""
        cache, states, self.states = DynamicCache(), self.states, []
        cache.layer_class_to_replicate = GrowingLayer
        for number, pair in enumerate(states):
            cache.update(*pair, number)
        return cache

    @property
    def columns(self) -> int:
        """The columns that were read, padding included."""
        return int(self.cache.get_seq_length())

    def select(self, rows: Sequence[int]) -> Rows:
        """Return a copy of some rows, without columns that are padding in all of them."""
        pads = [self.pads[row] for row in rows]
        spare = min(pads)
        states = [
            [each[torch.tensor(rows, device=each.device), :, spare:] for each in pair]
            for pair in _pairs(self)
        ]
        return Rows([self.ranks[row] for row in rows], [each - spare for each in pads], states)

    def expand(self, ranks: Sequence[int], pads: Sequence[int]) -> Rows:
        """Return rows that begin with this prefix at their ranks, each behind its padding."""
        at = (torch.arange(self.columns) - torch.tensor(pads)[:, None]).clamp(min=0)
        owners = torch.tensor([self.ranks.index(rank) for rank in ranks])

        def moved(state: Tensor) -> Tensor:
            state = state[owners.to(state.device)]
            index = at.to(state.device)[:, None, :, None].expand_as(state)
            return state.gather(2, index) if any(pads) else state

        return Rows(list(ranks), list(pads), [list(map(moved, pair)) for pair in _pairs(self)])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Return the rows of several batches as one; those with fewer columns get padding."""
        most = max(part.columns for part in parts)

        def joined(kind: Sequence[Tensor]) -> Tensor:
            return torch.cat([pad(each, (0, 0, most - each.shape[-2], 0)) for each in kind])

        layers = zip(*map(_pairs, parts), strict=True)
        states = [list(map(joined, zip(*layer, strict=True))) for layer in layers]
        pads = [own + most - part.columns for part in parts for own in part.pads]
        return Rows([rank for part in parts for rank in part.ranks], pads, states)


def _pairs(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in rows.cache.layers]


@dataclass
class Answer:
    """Hold an unfinished answer."""

    number: int
    rank: int
    made: list[int] = field(default_factory=list)
    over: bool = False


@dataclass(frozen=True)
class Limits:
    """Say when an answer ends, as the harness does with one prompt a batch.

    Attributes:
        most: The most tokens.
        until: Texts that end it and do not belong to it.
        ends: Tokens that end it.
    """

    most: int
    until: list[str]
    ends: list[int]
    tokenizer: Any

    @cached_property
    def _look_back(self) -> list[tuple[str, int]]:
        """Each text, and in how many of the newest tokens the harness looks for it."""
        encode = self.tokenizer.encode
        return [(text, len(encode(text, add_special_tokens=False)) + 2) for text in self.until]

    def take(self, logits: Tensor, answers: Sequence[Answer]) -> Iterator[Answer]:
        """Add the likeliest token to each answer that is not over; yield those that it ends."""
        tokens, said = logits[:, -1].float().argmax(dim=-1).tolist(), self.tokenizer.decode
        for answer, token in zip(answers, tokens, strict=True):
            if answer.over:
                continue
            made = answer.made
            made.append(token)
            answer.over = len(made) >= self.most or token in self.ends
            answer.over |= any(text in said(made[-back:]) for text, back in self._look_back)
            if answer.over:
                yield answer

    def text(self, answer: Answer) -> str:
        """Return an answer's text."""
        text = self.tokenizer.decode(answer.made, skip_special_tokens=True)
        return str(postprocess_generated_text(text, stop=self.until, think_end_token=None))


class Scores:
    """Log-likelihoods of requests at ranks, added up token by token: arrays (requests, ranks)."""

    def __init__(self, requests: int, ranks: list[int]) -> None:
        self.ranks = ranks
        self.logprobs = np.zeros((requests, len(ranks)))
        self.greedy = np.ones((requests, len(ranks)), dtype=bool)

    def add(self, logits: Tensor, asked: list[tuple[int, int, int, int, int]]) -> None:
        """Add tokens, each given by request, rank, the row and place of its logits, and itself."""
        requests, ranks, *where = zip(*asked, strict=True)
        at = np.array(requests), np.array([self.ranks.index(rank) for rank in ranks])
        rows, places, tokens = (torch.tensor(each, device=logits.device) for each in where)
        logits = logits.float()
        found = logits[rows, places, tokens] - logits.logsumexp(dim=-1)[rows, places]
        best = logits.argmax(dim=-1)[rows, places] == tokens
        np.add.at(self.logprobs, at, found.cpu().numpy())
        np.logical_and.at(self.greedy, at, best.cpu().numpy())


def shared_prefix(sequences: Sequence[Tokens]) -> Tokens:
    """Return what all sequences begin with, but for the last token of the shortest."""
    first, last = min(sequences), max(sequences)
    return first[: min(common_length(first, last), min(map(len, sequences)) - 1)]
