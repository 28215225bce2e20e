"""The handle of one nested adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from matryoshka_lora.adapter.in_model import InModel, checked_layers, nest_copies, unmerge
from matryoshka_lora.adapter.saving import export_rank, opened_from, save_adapter, writes
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.reorder import reorder
from matryoshka_lora.reordering.sources import data_from
from matryoshka_lora.rules import Rule
from matryoshka_lora.state import By, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback


class NestedAdapter:
    """One adapter of a PEFT model, at every rank.

    Made by `nest` or `load`. It holds no state of its own: what it knows is kept in the model's layers, so
    ``NestedAdapter(copy.deepcopy(adapter.model))`` is the handle of a copy.

    Args:
        model: A PEFT model with a nested adapter.
        adapter: Its name.

    Attributes:
        model: The PEFT model.
        name: PEFT's name of the adapter.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        self.model = model
        self.name = adapter
        self.layers()

    def layers(self) -> list[tuple[str, Any, NestedVariant]]:
        """Each nested layer: its name in the base model, PEFT's module, and what stands between its factors.

        Raises:
            MatryoshkaError: There is none, or PEFT has made the adapter anew in one of them.
        """
        return checked_layers(self.model, self.name)

    @property
    def state(self) -> State:
        """What all layers share: nesting, rule, seed, and how it is deployed."""
        return self.layers()[0][2].state

    @property
    def nesting(self) -> Nesting:
        """The ranks and scales."""
        return self.state.nesting

    @property
    def rule(self) -> Rule:
        """The training rule."""
        return self.state.rule

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that may be chosen: those that were trained, or all from 1 to R after `reorder`."""
        return self.state.ranks

    @property
    def has_base(self) -> bool:
        """Whether rank 0 is the base model. Not where parts of it were trained whole, such as ``modules_to_save``."""
        return not self._config.trained_besides

    @property
    def _config(self) -> AdapterConfig:
        return AdapterConfig(self.model.peft_config[self.name].to_dict())

    @property
    def reordered(self) -> bool:
        """Whether the factors are ordered by `reorder`."""
        return self.state.reordered is not None

    @property
    def rank(self) -> int | dict[str, int]:
        """The rank in eval mode: one number, or one for each layer where they differ."""
        return InModel(self.model, self.name).rank

    def set_rank(self, rank: int | Mapping[str, int]) -> None:
        """Choose the rank in eval mode; costs nothing and may be changed between any two calls.

        Args:
            rank: One rank, or a mapping from a pattern to a rank. A pattern is a regular expression that matches the
                end of a module's name from a dot on, as in PEFT's ``rank_pattern``; the first that matches counts,
                and layers that none matches keep their rank.

        Raises:
            MatryoshkaError: A rank was not trained, a pattern matches no layer, or the adapter is merged.
        """
        state = self.state
        patterns = dict(rank) if isinstance(rank, Mapping) else {".*": rank}
        for value in patterns.values():
            state.check_rank(value)
        self._check_unmerged("change its rank")
        layers = list(self.layers())
        for pattern in patterns:
            if not any(_matches(pattern, name) for name, _, _ in layers):
                raise MatryoshkaError(f"no layer's name ends in {pattern!r}; layers are named like {layers[0][0]}")
        chosen: list[tuple[NestedVariant, int]] = []
        for name, _, variant in layers:
            match = next((pattern for pattern in patterns if _matches(pattern, name)), None)
            if match is not None:
                chosen.append((variant, patterns[match]))
        for variant, value in chosen:
            variant.set_rank(value)

    @contextmanager
    def rows(self, ranks: Sequence[int], exact: bool = True) -> Iterator[None]:
        """A context in which row j of every batch has rank ``ranks[j]``: in forward, in backward and in ``generate``.

        In ``generate``, beams and several returned sequences of a row share its rank. A backward pass belongs inside
        the context: with gradient checkpointing it runs the forward again.

        No other thread or asyncio task may open one or call the model meanwhile. ``asyncio.to_thread`` and tasks that
        begin in the context belong to it.

        Args:
            ranks: One for each row. Rank 0 is the base model without the adapter, see `has_base`.
            exact: Whether eval mode computes as PEFT does, in the dtype of the factors. False computes the update of
                plain linear layers in the dtype of the activations, which beside a bfloat16 base is much faster and
                rounds otherwise; it makes no difference where both dtypes are the same.

        Raises:
            MatryoshkaError: A rank was not trained, the adapter is merged or not the active one, another thread or
                task has one open, or (from the forward) the batch has another number of rows.
        """
        state = self.state
        try:
            ranks = list(ranks)
        except TypeError as error:
            raise MatryoshkaError(
                f"rows() takes a rank for each row of the batch, as [1, 8] for two, and not {ranks!r}: for one rank of "
                "all rows, use set_rank"
            ) from error
        for rank in ranks:
            if rank != 0 or isinstance(rank, bool):
                state.check_rank(rank)
        if not ranks:
            raise MatryoshkaError("rows() needs one rank for each row of the batch; the list is empty")
        if 0 in ranks and not self.has_base:
            raise MatryoshkaError(
                f"rank 0 is not the base model here: {' and '.join(self._config.trained_besides)} changed parts of it "
                "that no rank takes out. Load the base model by itself"
            )
        self._check_unmerged("give each row a rank")
        self._check_routing()
        diagonals = {rank: state.diagonal(rank) for rank in set(ranks)}
        with InModel(self.model, self.name).standing(torch.stack([diagonals[rank] for rank in ranks]), exact):
            yield

    def draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Apply the rule's draw for an optimizer step. `callback` does it in a Hugging Face Trainer.

        A pure function of the adapter's seed and ``step``. Call it once before each optimizer step, not for each
        micro-batch.

        Args:
            step: The number of optimizer steps done so far.
            rows: The rows of one batch of this process, for a rule with a rank per row.
            share: ``(index, count)`` of the processes: each gets its own part of one draw over all their rows.
        """
        InModel(self.model, self.name).draw(step, rows, share)

    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``: draws the ranks of each step and completes every checkpoint."""
        from matryoshka_lora.adapter.callback import NestingCallback  # transformers' Trainer is slow to import

        return NestingCallback(InModel(self.model, self.name))

    def reorder(
        self,
        by: By = "svd",
        data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rows: int | None = None,
        seed: int = 0,
        checkpoint: str | PathLike[str] | None = None,
    ) -> dict[str, Tensor]:
        """Put each layer's directions into an order in which every prefix is good.

        The full-rank function of training is unchanged, up to rounding, but for ``"trained"``. From then on any rank
        from 1 to R may be chosen. Training on, with `callback` or `draw`, is plain LoRA and ends the order. Under
        torch.distributed every process calls it; under DDP they share the rows that ``"learned"`` and ``"trained"``
        take of a Trainer.

        Args:
            by: ``"svd"``: each prefix is the closest matrix of its rank (Eckart-Young); needs no data.
                ``"activations"``: it changes each layer's outputs least. ``"loss"``: it changes the loss least, to
                second order. ``"learned"``: some steps of training find the order by the loss of the prefixes.
                ``"trained"``: each nested rank is trained by itself for some steps; rank R changes by its smallest
                directions.
            data: For all but ``"svd"``: the Trainer that has trained the adapter, a dataset, or rows with ``prompt``
                and ``completion``.
            tokenizer: The base model's, where the data are rows.
            rows: How many rows are used; None is 128, 480 for ``"learned"``, and for ``"trained"`` half
                as many as the Trainer has trained on, or 3200.
            seed: Of which rows are taken, and of their ranks.
            checkpoint: A file in which ``"trained"`` keeps what it has done, twice a minute. After a kill, the same
                call goes on from there, to the same bits. It stays: delete it when the adapter is saved.

        Returns:
            Each layer's singular values in the sense of ``by``, decreasing, shape (R,) or (experts, R), float64; for
            ``"learned"`` and ``"trained"``, those of the SVD.

        Raises:
            MatryoshkaError: A factor is not finite, the adapter is merged, or the data do not go with ``by``. The
                adapter is as it was then, or reordered by SVD where the data were at fault.
        """
        self._check_unmerged("reorder it")
        nest_copies(self.model, self.name)  # while the factors are what they are copies of
        source = None if data is None else data_from(self.model, data, tokenizer)
        return reorder(InModel(self.model, self.name), by, source, rows, seed, checkpoint)

    def merge(self, rank: int) -> None:
        """Add the adapter at a rank to the base weights, in place. `unmerge` takes it out again.

        ``model.merge_and_unload()`` after `set_rank` gives a plain model instead.
        """
        self._check_mergeable()
        self.set_rank(rank)
        self.model.merge_adapter(adapter_names=[self.name])

    def unmerge(self) -> None:
        """Undo `merge`. Other adapters that are merged stay so.

        Raises:
            MatryoshkaError: An adapter of another kind was merged on top of it.
        """
        self._check_mergeable()
        unmerge([module for _, module, _ in self.layers()], self.name)

    def save(self, path: str | PathLike[str], is_main_process: bool | None = None) -> None:
        """Write the adapter so that every rank is good: PEFT's files, and a sidecar with the nesting.

        Factors that were never reordered are written reordered by SVD, with a warning; the adapter in memory stays as
        it is trained. PEFT without this package reads the folder as the full-rank adapter; `load` reads every rank. The
        files are written beside the target and moved.

        Args:
            path: The directory to write.
            is_main_process: Whether this process writes; None is yes for the first of torch.distributed, or the only
                one. Where FSDP2 has sharded the adapter, every process must call.

        Raises:
            MatryoshkaError: The path cannot be written, or a weight is not finite.
        """
        opened = opened_from(self.model, self.name)
        if writes(is_main_process):
            save_adapter(opened, path)

    def export(
        self, path: str | PathLike[str], rank: int, is_main_process: bool | None = None, *, overwrite: bool = False
    ) -> None:
        """Write one rank as an ordinary LoRA adapter, for PEFT or any engine that serves PEFT's files.

        Factors that were never reordered are reordered by SVD on the way, with a warning.

        Args:
            path: The directory to write.
            rank: From 1 to R.
            is_main_process: As for `save`.
            overwrite: Whether the directory may hold an adapter, a model or an evaluation, of which nothing is left
                then. Without it they are refused.

        Raises:
            MatryoshkaError: There is no such rank, the path cannot be written or holds something that may not be
                overwritten, or a weight is not finite.
        """
        opened = opened_from(self.model, self.name)
        if writes(is_main_process):
            export_rank(opened, path, rank, overwrite)

    def _check_unmerged(self, what: str) -> None:
        if any(self.name in module.merged_adapters for _, module, _ in self.layers()):
            raise MatryoshkaError(f"adapter {self.name!r} is merged into the base weights: unmerge it to {what}")

    def _check_mergeable(self) -> None:
        for _, module, variant in self.layers():
            variant.check_mergeable(module)

    def _check_routing(self) -> None:
        for name, _, _ in self.layers():
            if ".experts." in f".{name}.":
                raise MatryoshkaError(
                    f"tokens of {name} are routed to experts and have left their rows: use set_rank. To evaluate, "
                    "export the ranks and run lm-evaluation-harness on each"
                )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise MatryoshkaError(f"{pattern!r} is no regular expression: {error}") from error
