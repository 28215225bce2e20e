"""Key-value caches of batches whose rows have different ranks, and trees of common prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from matryoshka_lora.examples import common_prefix_length

Tokens = tuple[int, ...]
KeysAndValues = tuple[Tensor, Tensor]
"""The keys and values of a layer, shape (rows, heads, positions, features) each."""

_SPARE_POSITIONS = 64


class Branch(NamedTuple):
    """The end of a continuation.

    Attributes:
        request: The index of the request.
        tokens: The tokens after those that all continuations of the tree begin with, at least one.
    """

    request: int
    tokens: Tokens


class PrefixTree(NamedTuple):
    """A context, and the continuations that branch from it.

    Attributes:
        tokens: The context, followed by the tokens that all continuations begin with.
        context_length: The number of tokens of the context.
        branches: What follows ``tokens``, for each continuation.
    """

    tokens: Tokens
    context_length: int
    branches: list[Branch]

    @property
    def stem(self) -> Tokens:
        """The tokens that all continuations begin with."""
        return self.tokens[self.context_length :]


def build_tree(context: Tokens, continuations: Sequence[Branch]) -> PrefixTree:
    """Return the tree of a context and its continuations, which are at least one token long."""
    stem = common_prefix([continuation.tokens for continuation in continuations])
    branches = [
        Branch(continuation.request, continuation.tokens[len(stem) :])
        for continuation in continuations
    ]
    return PrefixTree(context + stem, len(context), branches)


def common_prefix(sequences: Sequence[Tokens]) -> Tokens:
    """Return the tokens that all sequences begin with, without the last token of the shortest."""
    # In lexicographic order, all others lie between the first and the last.
    first, last = min(sequences), max(sequences)
    shortest = min(len(sequence) for sequence in sequences)
    return first[: min(common_prefix_length(first, last), shortest - 1)]


class GrowingLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
    """A layer of a `DynamicCache` with spare memory, so that a new token does not copy it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        """Append positions, and return all keys and values; see `KeysAndValues`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys, self._key_buffer = _append(self.keys, key_states, self._key_buffer)
            self.values, self._value_buffer = _append(self.values, value_states, self._value_buffer)
        return self.keys, self.values


def _append(states: Tensor, new_states: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append positions to states, in a buffer that begins with them if it is large enough.

    Returns:
        The states, as a view of the buffer, and the buffer.
    """
    old_length = states.shape[-2]
    length = old_length + new_states.shape[-2]
    if buffer is None or buffer.shape[-2] < length:
        rows, heads, _, features = new_states.shape
        buffer = new_states.new_empty(rows, heads, length + _SPARE_POSITIONS, features)
        buffer[:, :, :old_length] = states
    buffer[:, :, old_length:length] = new_states
    return buffer[:, :, :length], buffer


def _new_cache(layers: Sequence[KeysAndValues] = ()) -> DynamicCache:
    """Return a cache that begins with the keys and values of each layer.

    It keeps all positions for sliding windows as well: the masks hide the old ones.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


@dataclass
class BatchRows:
    """The rows of a batch, with the keys and values of their tokens so far.

    All rows end at the same position, so shorter rows are left-padded.

    Attributes:
        ranks: The rank of each row.
        padding: The number of positions of padding before each row.
        cache: The keys and values.
    """

    ranks: list[int]
    padding: list[int]
    cache: DynamicCache = field(default_factory=_new_cache)

    @property
    def length(self) -> int:
        """The number of positions, padding included."""
        return int(self.cache.get_seq_length())

    @property
    def layers(self) -> list[KeysAndValues]:
        """The keys and values of each layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def select(self, rows: Sequence[int]) -> BatchRows:
        """Return a copy of some rows, without positions that are padding in all of them."""
        padding = [self.padding[row] for row in rows]
        unused = min(padding)

        def select_states(states: Tensor) -> Tensor:
            return states[torch.tensor(rows, device=states.device), :, unused:]

        layers = [(select_states(keys), select_states(values)) for keys, values in self.layers]
        ranks = [self.ranks[row] for row in rows]
        return BatchRows(ranks, [count - unused for count in padding], _new_cache(layers))

    def expand(self, ranks: Sequence[int], padding: Sequence[int]) -> BatchRows:
        """Return rows that begin with a prefix, of which this batch has one row per rank.

        All positions are kept, so a left-padded row gets only the beginning of the prefix.

        Args:
            ranks: The rank of each new row.
            padding: The padding of each new row.
        """
        prefix_rows = torch.tensor([self.ranks.index(rank) for rank in ranks])
        positions = torch.arange(self.length) - torch.tensor(padding)[:, None]
        positions = positions.clamp(min=0)

        def expand_states(states: Tensor) -> Tensor:
            states = states[prefix_rows.to(states.device)]
            if not any(padding):
                return states
            index = positions.to(states.device)[:, None, :, None].expand_as(states)
            return states.gather(2, index)

        layers = [(expand_states(keys), expand_states(values)) for keys, values in self.layers]
        return BatchRows(list(ranks), list(padding), _new_cache(layers))


def concatenate(batches: Sequence[BatchRows]) -> BatchRows:
    """Return the rows of several batches as one batch, with padding before the shorter ones."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.length for batch in batches)

    def concatenate_states(states: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(part, (0, 0, length - part.shape[-2], 0)) for part in states])

    layers: list[KeysAndValues] = []
    for layer in zip(*(batch.layers for batch in batches), strict=True):
        keys, values = zip(*layer, strict=True)
        layers.append((concatenate_states(keys), concatenate_states(values)))
    ranks: list[int] = []
    padding: list[int] = []
    for batch in batches:
        ranks += batch.ranks
        padding += [count + length - batch.length for count in batch.padding]
    return BatchRows(ranks, padding, _new_cache(layers))
