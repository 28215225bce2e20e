"""Attention over rows that share a prefix, and the keys and values of rows that are being generated.

transformers hands each layer's queries, keys and values to a function that is registered by name. This one keeps the
keys and values itself, so that

* a prefix that rows of one rank share is stored once for each rank, and at each decode step is read once for all of
  their rows, in one product;
* rows are padded on the right and the new keys of a row take the place right after its own last one: no row carries
  another row's padding along, and rows can leave or join between two steps;
* one row can hold a context and several continuations that do not see each other (branches).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from matryoshka_lora.errors import MatryoshkaError

NAME = "matryoshka_rows"

_GROWTH = 32
"""Places for keys are made in steps of this size: a step copies them, and all of a step's places are computed with."""


@dataclass
class KeyValues:
    """The keys and values of each layer, shape (rows, heads, tokens, width)."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many places each row has."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def select(self, rows: Tensor) -> KeyValues:
        """Copies of these rows, shape of ``rows`` (rows,), in its order."""
        return KeyValues([(keys[rows], values[rows]) for keys, values in self.layers])

    def grown(self, tokens: int) -> KeyValues:
        """With so many places, the new ones at the end and zero."""
        more = tokens - self.tokens
        return KeyValues([(pad(k, (0, 0, 0, more)), pad(v, (0, 0, 0, more))) for k, v in self.layers])

    @staticmethod
    def concat(parts: Sequence[KeyValues]) -> KeyValues:
        """All rows of all parts, which have equally many places."""
        joined = zip(*(part.layers for part in parts), strict=True)
        return KeyValues([(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in joined])


def places(tokens: int) -> int:
    """How many places to make for so many tokens."""
    return -(-tokens // _GROWTH) * _GROWTH


class Pass(Protocol):
    """One forward pass: what each layer's attention asks."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        """Shapes (rows, heads, tokens, width), fewer heads in k and v. Returns the shape of q."""


@dataclass(frozen=True)
class Settings:
    """What an architecture says of its attention."""

    scale: float
    window: int | None = None
    softcap: float | None = None


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
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        if self.new is not None:
            self.new.layers.append((k, v))
        if self.prefix is not None:
            before_k, before_v = self.prefix.layers[layer]
            k = torch.cat([before_k[self.owners], k], dim=2)
            v = torch.cat([before_v[self.owners], v], dim=2)
        if settings.window not in self._masks:
            self._masks[settings.window] = self._mask(k.shape[2], settings.window)
        mask = self._masks[settings.window]
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if settings.softcap is not None:
            scores = _capped(q @ k.mT * settings.scale, settings.softcap)
            seen = self._causal(k.shape[2]) if mask is None else mask
            scores = scores.masked_fill(~seen, float("-inf"))
            return torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=settings.scale
        )

    def _causal(self, keys: int) -> Tensor:
        new = self.positions.shape[1]
        return torch.ones(new, keys, dtype=torch.bool, device=self.positions.device).tril(keys - new)[None, None]

    def _mask(self, keys: int, window: int | None) -> Tensor | None:
        """Which keys each new token sees, shape (1 or rows, 1, tokens, keys); None is causal without a prefix.

        Padding stands on the right, where no token of the row sees it.
        """
        new = self.positions.shape[1]
        before = keys - new
        if before == 0 and self.branches is None and (window is None or window >= new):
            return None
        seen = self._causal(keys)
        if self.branches is not None:
            mine, other = self.branches[:, None, :, None], self.branches[:, None, None, :]
            alike = pad((other == 0) | (other == mine), (before, 0), value=True)
            seen = seen & alike
        if window is not None:
            first = torch.arange(before, device=seen.device).expand(len(self.positions), -1)
            at = torch.cat([first, self.positions], dim=1)
            seen = seen & (self.positions[:, None, :, None] - at[:, None, None, :] < window)
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
        self._masks: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Tensor:
        keys, values = self.own.layers[layer]
        keys[self._rows, :, self.lengths] = k[:, :, 0]
        values[self._rows, :, self.lengths] = v[:, :, 0]
        rows, heads, _, width = q.shape
        # The query heads of one key head stand together, so no key is repeated.
        q = q.view(rows, keys.shape[1], heads // keys.shape[1], width) * settings.scale
        if settings.window not in self._masks:
            self._masks[settings.window] = self._hidden(keys.shape[2], settings.window)
        hidden, hidden_before = self._masks[settings.window]
        scores = _capped(q @ keys.mT, settings.softcap).masked_fill_(hidden, float("-inf"))
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.prefix is None:
            out: Tensor = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ values
            return out.reshape(rows, heads, 1, width)
        prefix_keys, prefix_values = self.prefix.layers[layer]
        before = torch.cat([_grouped(q[a:b], prefix_keys[rank].mT) for rank, a, b in self.spans])
        before = _capped(before, settings.softcap)
        if hidden_before is not None:
            before.masked_fill_(hidden_before, float("-inf"))
        weights = torch.softmax(torch.cat([before, scores], dim=-1), dim=-1, dtype=wide).to(q.dtype)
        out = weights[..., self._before :] @ values
        of_prefix = weights[..., : self._before]
        out += torch.cat([_grouped(of_prefix[a:b], prefix_values[rank]) for rank, a, b in self.spans])
        return out.reshape(rows, heads, 1, width)

    def _hidden(self, keys: int, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Which places a row does not see: those after its newest token, and those before the window."""
        at = torch.arange(keys, device=self.lengths.device)
        hidden = at[None, :] > self.lengths[:, None]
        if window is None:
            return hidden[:, None, None], None
        hidden |= self.lengths[:, None] - at[None, :] >= window
        first = torch.arange(self._before, device=at.device)
        before = self._before + self.lengths[:, None] - first[None, :] >= window
        return hidden[:, None, None], before[:, None, None]


def _grouped(rows: Tensor, shared: Tensor) -> Tensor:
    """(rows, heads, n, a) times (heads, a, b) for all rows at once: one product for each head."""
    count, heads, repeats, _ = rows.shape
    flat = rows.transpose(0, 1).reshape(heads, count * repeats, -1) @ shared
    return flat.view(heads, count, repeats, -1).transpose(0, 1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    row_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if row_pass is None:
        raise MatryoshkaError("this attention works only inside the engine; call the model as it was before")
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise MatryoshkaError(f"the model's attention has {name}, which the engine does not compute")
    settings = Settings(
        scale=module.head_dim**-0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window") or None,
        softcap=kwargs.get("softcap") or None,
    )
    out = row_pass.attend(module.layer_idx, query, key, value, settings)
    return out.transpose(1, 2).contiguous(), None


# Without a mask function of this name, transformers makes no mask: passes make their own.
AttentionInterface.register(NAME, _attention)


@contextmanager
def row_attention(model: PreTrainedModel) -> Any:
    """A context in which a model's layers attend through the pass that is given to its forward as ``row_pass``.

    Raises:
        MatryoshkaError: The model has layers of another kind, or an attention that cannot be replaced.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not getattr(model, "_supports_attention_backend", False):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "an attention that cannot be exchanged"
        raise MatryoshkaError(
            f"{type(model).__name__} has {what}, so its ranks cannot share a batch: export the ranks "
            "and evaluate each with lm_eval's own hf backend"
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
