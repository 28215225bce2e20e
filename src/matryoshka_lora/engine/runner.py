"""Forward passes over rows, each of which has a rank of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.engine.attention import KeyValues, Pass, Prefill
from matryoshka_lora.engine.exchange import attending, row_attention
from matryoshka_lora.engine.memory import Room, measure_room
from matryoshka_lora.engine.packing import Tokens
from matryoshka_lora.models import evaluation_mode, pad_token


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
    _wanted: list[Tensor]

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
        self._wanted[:] = [wanted]
        with attending(row_pass):
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
    wanted: list[Tensor] = []

    def gather(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        index = wanted[0][..., None].expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:])

    # Before the output layer, so that whatever a model does to its logits afterwards still happens.
    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    room = measure_room(model, token_bytes, batch_size)
    try:
        with torch.inference_mode(), evaluation_mode(adapter.model), row_attention(model):
            yield Runner(adapter, model, room, pad_token(tokenizer, model), wanted)
    finally:
        hook.remove()
