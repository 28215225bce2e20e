"""Forward passes in which each row of a batch has its own rank, with copied key-value caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka_lora.errors import check_integer
from matryoshka_lora.evaluation.kv_cache import BatchRows, Tokens, common_prefix
from matryoshka_lora.peft.adapter import NestedAdapter

MAX_BATCH_TOKENS = 2**15
_MAX_LOGITS = 2**27  # of one forward: 512 MiB in float32
_MAX_NEW_TOKENS_CPU = 512  # small forwards have less padding and stay in the CPU's caches


class Row(NamedTuple):
    """A row to compute.

    Attributes:
        tokens: The tokens of the row.
        rank: The rank that they are computed at; 0 is the base model.
        num_logits: The number of last positions whose logits are needed.
        source: The index of the prompt or the tree that the row comes from.
    """

    tokens: Tokens
    rank: int
    num_logits: int
    source: int


class MultiRankModel:
    """A causal language model with a nested adapter, for batches of rows with different ranks.

    Args:
        adapter: The nested adapter, on a model in eval mode.
        ranks: The ranks to evaluate; 0 is the base model.
        max_batch_tokens: The maximum number of tokens, over all rows, whose keys and values a batch
            holds. Defaults to 32,768.

    Raises:
        MatryoshkaError: The adapter is merged or not active, a rank is not available, or
            max_batch_tokens is not positive.
    """

    def __init__(
        self, adapter: NestedAdapter, ranks: Sequence[int], max_batch_tokens: int | None = None
    ) -> None:
        with adapter.rows(ranks):  # checks the adapter and the ranks
            pass
        self.adapter = adapter
        self.ranks = list(ranks)
        self.max_batch_tokens = MAX_BATCH_TOKENS
        if max_batch_tokens is not None:
            self.max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens)
        self.model = adapter.model
        self.device = self.model.device
        # The forward passes skip the checks of rows(), which look at every factor.
        self._diagonals = {rank: adapter.state.deployed_q(rank) for rank in ranks}
        forward = self.model.get_base_model().forward
        self._forward_parameters = set(inspect.signature(forward).parameters)
        self._vocab_size = self.model.config.get_text_config().vocab_size
        self._max_new_tokens = max(1, self.max_batch_tokens // 8)
        if self.device.type == "cpu":
            self._max_new_tokens = _MAX_NEW_TOKENS_CPU

    @contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """Set a rank for the whole model, and restore the previous one at the end."""
        previous_rank = self.adapter.rank
        self.adapter.set_rank(rank)
        try:
            yield
        finally:
            self.adapter.set_rank(previous_rank)

    @contextmanager
    def at_ranks(self, ranks: Sequence[int]) -> Iterator[None]:
        """Give each row of a batch a rank. `forward` runs in this context."""
        with self.adapter.use_diagonal(torch.stack([self._diagonals[rank] for rank in ranks])):
            yield

    def forward(self, batch: BatchRows, inputs: Sequence[Sequence[int]], num_logits: int) -> Tensor:
        """Compute more tokens of the rows in the current context; their cache grows.

        Args:
            batch: The rows.
            inputs: The new tokens of each row, as many for all.
            num_logits: The number of last positions whose logits are returned.

        Returns:
            Logits of shape (rows, num_logits, vocabulary).
        """
        input_ids = torch.tensor(inputs, device=self.device)
        past_length = batch.length
        positions = torch.arange(past_length + input_ids.shape[1], device=self.device)
        padding = torch.tensor(batch.padding, device=self.device)[:, None]
        attention_mask = None
        if any(batch.padding):
            attention_mask = (positions >= padding).long()
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": (positions[past_length:] - padding).clamp(min=0),
            "logits_to_keep": num_logits,
        }
        # transformers has renamed the argument.
        is_renamed = "cache" in self._forward_parameters
        arguments["cache" if is_renamed else "past_key_values"] = batch.cache
        supported = {
            name: value for name, value in arguments.items() if name in self._forward_parameters
        }
        logits: Tensor = self.model(input_ids, use_cache=True, **supported).logits
        return logits[:, -num_logits:]

    def extend(self, batch: BatchRows, inputs: Sequence[Sequence[int]], num_logits: int) -> Tensor:
        """Compute more tokens of the rows at their ranks; see `forward`."""
        with self.at_ranks(batch.ranks):
            return self.forward(batch, inputs, num_logits)

    def prefill(self, prefix: BatchRows | None, rows: Sequence[Row]) -> tuple[BatchRows, Tensor]:
        """Compute rows so that they end at the same position.

        All rows compute as many new tokens as the longest one needs. Shorter rows compute some
        tokens of the prefix again, rather than padding, and are left-padded.

        Args:
            prefix: What all rows begin with, from `compute_prefix`.
            rows: The rows.

        Returns:
            The rows, and the logits of the largest ``num_logits``.
        """
        length = max(len(row.tokens) for row in rows)
        ranks = [row.rank for row in rows]
        padding = [length - len(row.tokens) for row in rows]
        batch = BatchRows(ranks, padding) if prefix is None else prefix.expand(ranks, padding)
        past_length = batch.length
        inputs: list[Tokens] = []
        for row, count in zip(rows, padding, strict=True):
            padded = (0,) * count + row.tokens
            inputs.append(padded[past_length:])
        num_logits = max(row.num_logits for row in rows)
        return batch, self.extend(batch, inputs, num_logits)

    def compute_prefix(self, contexts: Sequence[Tokens]) -> BatchRows | None:
        """Compute what all contexts begin with, once per rank.

        Returns:
            One row per rank, or None if nothing would be computed twice.
        """
        prefix = common_prefix(contexts)
        if not prefix or len(contexts) == 1:
            return None
        rows = [Row(prefix, rank, num_logits=1, source=0) for rank in self.ranks]
        batch, _ = self.prefill(None, rows)
        return batch

    def split_rows(self, rows: Sequence[Row], prefix: BatchRows | None) -> Iterator[list[Row]]:
        """Yield rows in batches for `prefill`, the longest ones first."""
        rows = sorted(rows, key=lambda row: -len(row.tokens))
        prefix_length = prefix.length if prefix is not None else 0
        new_tokens = [len(row.tokens) - prefix_length for row in rows]
        num_logits = [row.num_logits for row in rows]
        for start, stop in self.split(new_tokens, num_logits, prefix_length):
            yield rows[start:stop]

    def split(
        self, new_tokens: Sequence[int], num_logits: Sequence[int], past_length: int
    ) -> Iterator[tuple[int, int]]:
        """Split rows into forward passes of limited memory.

        Args:
            new_tokens: The number of new tokens of each row.
            num_logits: The number of positions of each row whose logits are needed.
            past_length: The number of positions in the cache.

        Yields:
            The first row of a forward pass, and the one after its last.
        """
        start = 0
        while start < len(new_tokens):
            stop = start + 1
            while stop < len(new_tokens) and self._fits(
                new_tokens[start : stop + 1], num_logits[start : stop + 1], past_length
            ):
                stop += 1
            yield start, stop
            start = stop

    def _fits(self, new_tokens: Sequence[int], num_logits: Sequence[int], past_length: int) -> bool:
        num_rows = len(new_tokens)
        longest = max(new_tokens)
        return (
            num_rows * (past_length + longest) <= self.max_batch_tokens
            and num_rows * longest <= self._max_new_tokens
            and num_rows * max(num_logits) * self._vocab_size <= _MAX_LOGITS
        )

    @torch.no_grad()
    def supports_rank_per_row(self, tokens: Tokens) -> bool:
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
            logits = self.extend(batch.select([1, 0]), [tokens[6:10], tokens[9:13]], 1)[:, 0]
        except Exception:  # the type depends on the architecture
            return False
        expected = torch.stack(
            [self._plain_logits(tokens[:10], first_rank), self._plain_logits(tokens, last_rank)]
        )
        tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
        largest_difference = (logits - expected).abs().max()
        return bool(largest_difference <= tolerance * expected.abs().max())

    def _plain_logits(self, tokens: Tokens, rank: int) -> Tensor:
        """Return the logits after the last token, from a forward pass at one rank."""
        with self.at_rank(rank):
            logits: Tensor = self.model(torch.tensor([tokens], device=self.device)).logits
        return logits[0, -1]
