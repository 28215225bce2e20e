"""Attention over rows that share a prefix, and the keys and values of rows that are being generated.

A forward pass keeps the keys and values itself, so that

* a prefix that rows of one rank share is stored once for each rank, and at each decode step is read once for all of
  their rows, in one product;
* rows are padded on the right and the new keys of a row take the place right after its own last one: no row carries
  another row's padding along, and rows can leave or join between two steps;
* one row can hold a context and several continuations that do not see each other (branches).

Which keys a token sees besides, the architecture says: its own mask function is evaluated where the tokens stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_GROWTH = 32
"""Places for keys are made in steps of this size: a step copies them, and all of a step's places are computed with."""


@dataclass
class KeyValues:
    """The keys and values of each call of attention, shape (rows, heads, tokens, width).

    A call is known by its number in the forward pass: some models attend several times in a layer, or run a layer
    several times.
    """

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many places each row has."""
        return self.calls[0][0].shape[2] if self.calls else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one place of one row."""
        return sum(each.shape[1] * each.shape[3] * each.itemsize for call in self.calls for each in call)

    def select(self, rows: Tensor) -> KeyValues:
        """Copies of these rows, shape of ``rows`` (rows,), in its order."""
        return KeyValues([(keys[rows], values[rows]) for keys, values in self.calls])

    def grown(self, tokens: int) -> KeyValues:
        """With so many places, the new ones at the end and zero."""
        more = tokens - self.tokens
        return KeyValues([(pad(k, (0, 0, 0, more)), pad(v, (0, 0, 0, more))) for k, v in self.calls])

    @staticmethod
    def concat(parts: Sequence[KeyValues]) -> KeyValues:
        """All rows of all parts, which have equally many places."""
        joined = zip(*(part.calls for part in parts), strict=True)
        return KeyValues([(torch.cat([k for k, _ in call]), torch.cat([v for _, v in call])) for call in joined])


def places(tokens: int) -> int:
    """How many places to make for so many tokens."""
    return -(-tokens // _GROWTH) * _GROWTH


@dataclass(frozen=True, eq=False)
class Mask:
    """What transformers hands to the layers instead of a mask: the function that would have made it.

    Attributes:
        sees: Of row, head, a token's position and a key's position, all tensors: whether the token sees the key.
    """

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def at(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """Whether tokens at these positions see keys at those, for shapes (rows, 1, n, 1) and (1 or rows, 1, 1, m)."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None, None, None]
        return self.sees(rows, torch.zeros_like(rows), tokens, keys)


@dataclass(frozen=True)
class Settings:
    """What an architecture says of its attention.

    Attributes:
        scale: Of the scores.
        mask: None where a token sees all that stands before it.
        softcap: A bound of the scores.
        sinks: For each head, a score that takes its share and has no value.
    """

    scale: float
    mask: Mask | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Pass(Protocol):
    """One forward pass: what each call of attention asks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        """Shapes (rows, heads, tokens, width); k and v may have fewer heads, and v another width. Returns q's heads."""


class Prefill:
    """New tokens, several for each row, after a prefix or nothing.

    Args:
        positions: Of the new tokens, shape (rows, tokens).
        branches: For rows that hold continuations: 0 for the context, then 1, 2, ... for each continuation; shape
            (rows, tokens). A token sees the context and its own branch.
        prefix: Keys and values of the shared prefix, one row for each rank.
        owners: Which row of the prefix each row follows, shape (rows,).
        keep: Whether the keys and values of the new tokens are kept in ``new``.
    """

    def __init__(
        self,
        positions: Tensor,
        branches: Tensor | None = None,
        prefix: KeyValues | None = None,
        owners: Tensor | None = None,
        keep: bool = False,
    ) -> None:
        self.positions, self.branches = positions, branches
        self.prefix, self.owners = prefix, owners
        self.new: KeyValues | None = KeyValues() if keep else None
        self._calls = 0
        self._masks: dict[Mask | None, Tensor | None] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        if self.new is not None:
            self.new.calls.append((k, v))
        if self.prefix is not None:
            before_k, before_v = self.prefix.calls[self._calls]
            k = torch.cat([before_k[self.owners], k], dim=2)
            v = torch.cat([before_v[self.owners], v], dim=2)
        self._calls += 1
        if settings.mask not in self._masks:
            self._masks[settings.mask] = self._seen(k.shape[2], settings.mask)
        seen = self._masks[settings.mask]
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if settings.softcap is None and settings.sinks is None:
            causal = seen is None and q.shape[2] > 1
            return scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=settings.scale)
        scores = _capped(q @ k.mT * settings.scale, settings.softcap)
        scores = scores.masked_fill(~(self._causal(k.shape[2]) if seen is None else seen), float("-inf"))
        return _softmax(scores, None if settings.sinks is None else settings.sinks[:, None, None]) @ v

    def _causal(self, keys: int) -> Tensor:
        new = self.positions.shape[1]
        return torch.ones(new, keys, dtype=torch.bool, device=self.positions.device).tril(keys - new)[None, None]

    def _seen(self, keys: int, mask: Mask | None) -> Tensor | None:
        """Which keys each new token sees, shape (1 or rows, 1, tokens, keys); None is causal without a prefix.

        Padding stands on the right, where no token of the row sees it.
        """
        before = keys - self.positions.shape[1]
        if mask is None and before == 0 and self.branches is None:
            return None
        causal = seen = self._causal(keys)
        if self.branches is not None:
            mine, other = self.branches[:, None, :, None], self.branches[:, None, None, :]
            seen = seen & pad((other == 0) | (other == mine), (before, 0), value=True)
        if mask is not None:
            # Without branches, all rows have the same positions.
            positions = self.positions if self.branches is not None else self.positions[:1]
            first = torch.arange(before, device=seen.device).expand(len(positions), -1)
            at = torch.cat([first, positions], dim=1)
            seen = seen & mask.at(positions[:, None, :, None], at[:, None, None, :])
            if before == 0 and torch.equal(seen, causal):
                return None
        return seen


class Decode:
    """One new token for each row, after the row's own tokens and a shared prefix.

    Rows of one rank must stand together. The new keys and values are written into ``own``.

    Args:
        own: The rows' keys and values, with a free place at ``lengths`` in each row.
        lengths: How many tokens each row has in ``own``, shape (rows,).
        prefix: Keys and values of the shared prefix, one row for each rank.
        spans: For each row of the prefix, the first of its rows and the one after its last.
    """

    def __init__(
        self,
        own: KeyValues,
        lengths: Tensor,
        prefix: KeyValues | None = None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.own, self.lengths, self.prefix = own, lengths, prefix
        self.spans = [(rank, first, last) for rank, (first, last) in enumerate(spans) if last > first]
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._before = 0 if prefix is None else prefix.tokens
        self._calls = 0
        self._masks: dict[Mask | None, tuple[Tensor, Tensor | None]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        keys, values = self.own.calls[self._calls]
        keys[self._rows, :, self.lengths] = k[:, :, 0]
        values[self._rows, :, self.lengths] = v[:, :, 0]
        rows, heads, _, width = q.shape
        # The query heads of one key head stand together, so no key is repeated.
        q = q.view(rows, keys.shape[1], heads // keys.shape[1], width) * settings.scale
        sinks = None if settings.sinks is None else settings.sinks.view(keys.shape[1], -1, 1)
        if settings.mask not in self._masks:
            self._masks[settings.mask] = self._hidden(keys.shape[2], settings.mask)
        hidden, hidden_before = self._masks[settings.mask]
        scores = _capped(q @ keys.mT, settings.softcap).masked_fill_(hidden, float("-inf"))
        if self.prefix is None:
            out: Tensor = _softmax(scores, sinks) @ values
        else:
            prefix_keys, prefix_values = self.prefix.calls[self._calls]
            before = torch.cat([_grouped(q[a:b], prefix_keys[rank].mT) for rank, a, b in self.spans])
            before = _capped(before, settings.softcap)
            if hidden_before is not None:
                before.masked_fill_(hidden_before, float("-inf"))
            weights = _softmax(torch.cat([before, scores], dim=-1), sinks)
            out = weights[..., self._before :] @ values
            of_prefix = weights[..., : self._before]
            out += torch.cat([_grouped(of_prefix[a:b], prefix_values[rank]) for rank, a, b in self.spans])
        self._calls += 1
        return out.reshape(rows, heads, 1, -1)

    def _hidden(self, keys: int, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
        """Which places a row does not see: those after its newest token, and those that the mask hides."""
        at = torch.arange(keys, device=self.lengths.device)
        hidden = at > self.lengths[:, None, None, None]
        if mask is None:
            return hidden, None
        newest = self._before + self.lengths[:, None, None, None]
        first = torch.arange(self._before, device=at.device)[None, None, None]
        return hidden | ~mask.at(newest, self._before + at[None, None, None]), ~mask.at(newest, first)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return weights if sinks is None else weights[..., :-1]


def _grouped(rows: Tensor, shared: Tensor) -> Tensor:
    """(rows, heads, n, a) times (heads, a, b) for all rows at once: one product for each head."""
    count, heads, repeats, _ = rows.shape
    flat = rows.transpose(0, 1).reshape(heads, count * repeats, -1) @ shared
    return flat.view(heads, count, repeats, -1).transpose(0, 1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
