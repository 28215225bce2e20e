"""Forward passes over rows, each of which has a rank of its own, through `matryoshka_lora.engine.attention`.

transformers hands each layer's queries, keys and values to a function that is registered by name, and lets another one
make the masks. Whether this gives the model's own answers, `matryoshka_lora.engine.agreement` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import causal_mask_function

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.engine.attention import KeyValues, Mask, Pass, Prefill, Settings
from matryoshka_lora.engine.packing import Room, Tokens, measure_room
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.loaded import evaluation_mode, logits_at, pad_token

NAME = "matryoshka_rows"

WAY_OUT = "export the ranks and evaluate each with lm_eval's own hf backend"
"""For models that the engine refuses."""

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers that know of other tokens by nothing but keys, values and a mask."""

_PASS: ContextVar[Pass] = ContextVar("matryoshka_pass")


class Prefix(NamedTuple):
    """A shared prefix, computed.

    Attributes:
        length: In tokens.
        keys: Keys and values, one row for each rank; None where the length is 0.
        row: The row of each rank.
    """

    length: int
    keys: KeyValues | None
    row: dict[int, int]


@dataclass(frozen=True)
class Runner:
    """One model, set up for forward passes over rows; made by `running`."""

    adapter: NestedAdapter
    model: Any
    room: Room
    pad: int

    @property
    def device(self) -> torch.device:
        """Where tensors of a pass belong."""
        device: torch.device = self.model.device
        return device

    def ranks(self, ranks: Sequence[int]) -> Any:
        """A context in which the rows of a pass have these ranks."""
        return self.adapter.rows(ranks, exact=False)

    def logits(self, ids: Tensor, positions: Tensor, row_pass: Pass, wanted: Tensor) -> Tensor:
        """One forward pass.

        Args:
            ids: New tokens, shape (rows, tokens).
            positions: Of the new tokens, shape (rows, tokens).
            row_pass: Its attention.
            wanted: At which of the new tokens logits are made, shape (rows, k).

        Returns:
            Shape (rows, k, vocabulary).
        """
        with _attending(row_pass), logits_at(self.model, wanted):
            # The mask says that rows are rows: by the positions of branches, transformers would take them for packed.
            mask = torch.ones_like(ids)
            found: Tensor = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        return found

    def prefix(self, tokens: Tokens, ranks: Sequence[int]) -> Prefix:
        """Compute a prefix once for each rank."""
        row = {rank: number for number, rank in enumerate(ranks)}
        if not tokens:
            return Prefix(0, None, row)
        parts = []
        at_once = max(1, self.room.prefill_tokens // len(tokens))
        for start in range(0, len(ranks), at_once):
            some = list(ranks[start : start + at_once])
            ids = torch.tensor([tokens] * len(some), device=self.device)
            positions = torch.arange(len(tokens), device=self.device).expand(len(some), -1)
            prefill = Prefill(positions, keep=True)
            with self.ranks(some):
                self.logits(ids, positions, prefill, positions[:, -1:])
            assert prefill.new is not None
            parts.append(prefill.new)
        return Prefix(len(tokens), KeyValues.concat(parts), row)


@contextmanager
def running(
    adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, token_bytes: int, batch_size: int | None = None
) -> Iterator[Runner]:
    """A context for forward passes over rows.

    Args:
        adapter: Its ranks and mode are the same afterwards.
        tokenizer: The base model's.
        token_bytes: Of the keys and values of one token.
        batch_size: The most rows that generate together; None measures how many fit.
    """
    model: Any = adapter.model.get_base_model()
    room = measure_room(model, token_bytes, batch_size)
    with torch.inference_mode(), evaluation_mode(adapter.model), row_attention(model):
        yield Runner(adapter, model, room, pad_token(tokenizer, model))


@contextmanager
def _attending(row_pass: Pass) -> Iterator[None]:
    """A context in which a model's layers attend through a pass."""
    token = _PASS.set(row_pass)
    try:
        yield
    finally:
        _PASS.reset(token)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    row_pass = _PASS.get(None)
    if row_pass is None:
        raise MatryoshkaError("this attention works only inside the engine; call the model as it was before")
    for name in ("position_bias", "sinks", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise MatryoshkaError(f"its attention takes {name}, which the engine does not know")
    if not isinstance(attention_mask, Mask | None):
        raise MatryoshkaError("its layers make masks of their own")
    settings = Settings(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if attention_mask is None or attention_mask.sees is causal_mask_function else attention_mask,
        softcap=kwargs.get("softcap") or None,
        sinks=kwargs.get("s_aux"),
    )
    return row_pass.attend(query, key, value, settings).transpose(1, 2).contiguous(), None


def _mask(mask_function: Callable[..., Tensor], **_: Any) -> Mask:
    return Mask(mask_function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _implementations(config: Any) -> str | dict[str, Any]:
    """The attention of a config and of those in it, as ``set_attn_implementation`` takes it.

    Parts that have none, for what the model does not use, are left out.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: _implementations(part) for name, part in parts.items() if part is not None}
    inner = {name: found for name, found in inner.items() if found is not None}
    own: str = config._attn_implementation
    return {"": own, **inner} if inner else own


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model's layers attend through the pass of `_attending`.

    Raises:
        MatryoshkaError: The model has layers of another kind, or an attention that cannot be replaced.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds or not getattr(model, "_supports_attention_backend", False):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "an attention that cannot be exchanged"
        raise MatryoshkaError(f"{type(model).__name__} has {what}, so its ranks cannot share a batch: {WAY_OUT}")
    before = _implementations(model.config)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
