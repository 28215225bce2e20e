"""`NestedAdapter`: control one nested adapter of a PEFT model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.factors import checksum, reorder_factors
from matryoshka_lora.files.layers import AdapterFile
from matryoshka_lora.files.output import PathLike
from matryoshka_lora.files.peft import find_layers, write_nested, write_rank
from matryoshka_lora.files.tensors import Stored
from matryoshka_lora.models import source_of
from matryoshka_lora.nesting import Nesting, Rule, get_rule
from matryoshka_lora.reordering.data import read_data
from matryoshka_lora.reordering.trained import train_ranks
from matryoshka_lora.variant import Diagonal, NestedVariant, Shared, factor_parameters, lora_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

By = Literal["svd", "trained"]


class NestedAdapter:
    """Control one nested adapter of a PEFT model, by its name there. `nest` and `load` make it.

    All settings are stored in the model's layers. One model is used by one thread at a time.
    """

    def __init__(self, model: PeftModel, name: str = "default") -> None:
        self.model = model
        self.name = name
        self._found = dict(lora_layers(model, name))  # looking at all modules takes milliseconds
        self._layers()

    def _layers(self) -> dict[str, Any]:
        variants = [module.lora_variant.get(self.name) for module in self._found.values()]
        if not variants or not all(isinstance(variant, NestedVariant) for variant in variants):
            raise MatryoshkaError(
                f"adapter {self.name!r} is not nested in every layer: call nest() or load(). "
                "PEFT may have made it anew since"
            )
        return self._found

    @property
    def _shared(self) -> Shared:
        shared: Shared = next(iter(self._layers().values())).lora_variant[self.name].shared
        return shared

    @property
    def nesting(self) -> Nesting:
        """The ranks and scales."""
        return self._shared.nesting

    @property
    def rule(self) -> Rule:
        """The training rule; ``lora`` after `reorder`."""
        return self._shared.rule

    @property
    def order(self) -> str | None:
        """How the factors are ordered: ``svd`` or ``trained``.

        None where they never were reordered or have changed since, and ``paper`` where they are
        deployed as the paper does.
        """
        shared = self._shared
        if shared.deploy == "paper":
            return "paper"
        return shared.order if shared.order and shared.checksum == self._checksum() else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that may be chosen."""
        shared, order = self._shared, self.order
        if order is not None and order != "paper":
            return tuple(range(1, shared.nesting.max_rank + 1))
        if order == "paper" or not shared.rule.fixed:
            return shared.nesting.ranks
        return (shared.nesting.max_rank,)

    @property
    def holds_p(self) -> bool:
        """Whether the factors alone are another function than the one that is saved."""
        return self._shared.folded() is not None

    @property
    def rank(self) -> int:
        """The rank in eval mode."""
        return self._shared.rank

    def set_rank(self, rank: int) -> None:
        """Choose the rank, and put the model into eval mode. Merging takes the rank too.

        Args:
            rank: From 1 to R, or 0 for the base model without the update.

        Raises:
            MatryoshkaError: There is no such rank, or the adapter is merged.
        """
        self._refuse_ranks([rank])
        self._refuse_merged("change its rank")
        self._shared.set_rank(rank)
        self.model.eval()  # a Trainer leaves the model in train mode, where the rank is R

    @contextmanager
    def rows(self, ranks: Sequence[int]) -> Iterator[None]:
        """Give row j of every batch the rank ``ranks[j]``, in forward, backward and ``generate``.

        The layers must get inputs of shape (rows, length, features), or (rows, channels, ...) in a
        convolution. Without gradients a multiple of the rows is allowed, as for beams.

        Args:
            ranks: One for each row, from 0 to R; 0 switches the update off.

        Raises:
            MatryoshkaError: There is no such rank, the adapter is merged or not active, or (from
                the forward) a layer gets another number of rows.
        """
        if not len(ranks):
            raise MatryoshkaError("rows() needs one rank for each row of the batch")
        self._refuse_ranks(ranks)
        table = {rank: self._shared.at(rank) for rank in set(ranks)}
        with self.override(torch.stack([table[rank] for rank in ranks])):
            yield

    @contextmanager
    def override(self, q: Tensor) -> Iterator[None]:
        """Use another diagonal q in all layers, which compute ``W x + s B diag(q) A x`` then.

        It has the shape (R,), or (rows, R) for one diagonal per row.
        """
        self._refuse_merged("give it another diagonal")
        off = any(module.disable_adapters for module in self._found.values())
        if off or self.name not in self.model.active_adapters:
            raise MatryoshkaError(
                f"{self.name!r} is not active: call model.set_adapter({self.name!r}), or enable it"
            )
        again = (getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        if q.ndim > 1 and self.model.training and any(again):
            raise MatryoshkaError(
                "gradient checkpointing computes the layers again after the context has ended: "
                "call model.gradient_checkpointing_disable() before rows() in training mode"
            )
        shared, diagonal = self._shared, Diagonal(q.to(torch.float64))
        shared.overrides.append(diagonal)
        try:
            yield
        finally:
            shared.overrides.remove(diagonal)

    def draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Draw p for an optimizer step and set it. `callback` does it in a Trainer.

        Call it before each optimizer step, not for each micro-batch. It sets train mode and rank R.

        Args:
            step: The number of optimizer steps done so far.
            rows: The rows of one batch of this process, for a rule with a rank per row.
            share: ``(index, count)`` of the processes; each takes its slice of one draw.
        """
        shared, (index, count) = self._shared, share
        if self.rank != self.nesting.max_rank:
            self.set_rank(self.nesting.max_rank)  # smaller ones lose their order
        self.model.train()
        if shared.rule.fixed:
            return
        p = shared.rule.draw(shared.nesting, shared.seed, step, rows and rows * count)
        p = p.chunk(count)[index] if p.ndim > 1 else p
        shared.training = Diagonal(p / shared.nesting.scale, fewer=True)

    def callback(self) -> TrainerCallback:
        """Return the Trainer callback that draws the ranks of each step."""
        # transformers' Trainer is slow to import.
        from matryoshka_lora.callback import NestingCallback

        return NestingCallback(self)

    def parameters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the parameters A and B of each layer in PEFT's own layout, by the layer's name."""
        return {name: factor_parameters(m, self.name) for name, m in self._layers().items()}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return copies of A, shape (R, in), and B, shape (out, R), of each layer, by its name."""
        return {
            name: (A.detach().flatten(1).clone(), B.detach().flatten(1).clone())
            for name, (A, B) in self.parameters().items()
        }

    @torch.no_grad()
    def put_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write factors, with the shapes that `factors` returns, into the named layers."""
        parameters = self.parameters()
        for name, pair in factors.items():
            for parameter, value in zip(parameters[name], pair, strict=True):
                parameter.copy_(value.reshape(parameter.shape))

    def reorder(
        self,
        by: By = "svd",
        data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rows: int | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Order each layer's columns so that every prefix is good.

        What rank R has learned is unchanged up to rounding, except by ``"trained"``. From then
        on any rank from 1 to R may be chosen. Further training is plain LoRA and ends the order.

        Args:
            by: ``"svd"``: each prefix is the closest matrix of its rank (Eckart-Young).
                ``"trained"``: every rank from the smallest nested one on is trained, each step at
                another rank; rank R changes a little. Where that gives nothing, or a Trainer has
                too few rows, the order is that of ``"svd"``, with a warning.
            data: For ``"trained"``: the Trainer that has trained the adapter, a dataset, or rows
                with ``prompt`` and ``completion``.
            tokenizer: The base model's, where the data are rows.
            rows: How many rows are trained on. None is as many as the loss of the worst rank asks
                for, and at most half as many as the Trainer has trained on, or 3200.
            seed: The seed of the rows' order and of the ranks.

        Returns:
            The singular values of each layer's update before ``"trained"``, by its name,
            decreasing, shape (R,), float64.

        Raises:
            MatryoshkaError: The adapter is merged or sharded, or the data do not go with ``by``.
            NotFiniteError: A factor is not finite. The adapter is unchanged.
        """
        if by != ("svd" if data is None else "trained"):
            raise MatryoshkaError(
                f"order {by!r:.80}: 'trained' takes data, such as the Trainer, and 'svd' takes none"
            )
        self._refuse_merged("reorder it")
        if by == "svd":
            return self._reorder_by_svd()
        source = read_data(self.model, data, tokenizer)
        values = self._reorder_by_svd(keep=self.order == "trained")
        if train_ranks(self, source, rows, seed):
            self.mark_ordered(by)
        return values

    def _reorder_by_svd(self, keep: bool = False) -> dict[str, Tensor]:
        shared, new, values = self._shared, {}, {}
        for name, (A, B) in self.factors().items():
            if hasattr(A, "device_mesh"):
                raise MatryoshkaError(
                    "the factors are spread over processes: let the Trainer save the adapter, then "
                    "run `matryoshka reorder FOLDER -o nested`"
                )
            if not (A.isfinite().all() and B.isfinite().all()):
                raise NotFiniteError(
                    f"the factors of layer {name} are not finite: the training diverged. "
                    "Train with a smaller learning rate"
                )
            A, B, s = reorder_factors(A, B, shared.trained())
            new[name], values[name] = (A, B), s * shared.nesting.scale
        if not keep:
            self.put_factors(new)
            self.mark_ordered("svd")
        return values

    def mark_ordered(self, by: str) -> None:
        """Record that the current factors are ordered, and set rule ``lora``."""
        shared = self._shared
        rank = shared.rank
        shared.order, shared.checksum = by, self._checksum()
        shared.rule, shared.deploy = get_rule("lora"), "reordered"
        shared.begin()
        shared.set_rank(rank)

    def _checksum(self) -> str:
        return checksum(pair for _, pair in sorted(self.parameters().items()))

    def save(self, path: PathLike, force: bool = False) -> None:
        """Write a folder that serves every rank, and that PEFT alone reads as rank R.

        Factors without an order are written reordered by SVD; the adapter in memory stays as it is.

        Args:
            path: The folder to write.
            force: Whether to replace an existing folder and all its content.

        Raises:
            MatryoshkaError: The path exists or cannot be written, or a weight is not finite.
        """
        write_nested(self.opened(), path, force=force)

    def export(self, path: PathLike, rank: int, force: bool = False) -> None:
        """Write one rank of what `save` would write, as an ordinary LoRA adapter for any engine.

        Args:
            path: The folder to write.
            rank: From 1 to R.
            force: Whether to replace an existing folder and all its content.

        Raises:
            MatryoshkaError: There is no such rank, or the path exists or cannot be written.
        """
        write_rank(self.opened(), path, rank, force=force)

    def opened(self) -> AdapterFile:
        """Return the adapter in memory as an `AdapterFile`."""
        name, given = f"adapter {self.name!r}", self.model.peft_config[self.name].to_dict()
        plain = json.dumps(given, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
        config = json.loads(plain)
        base = config.get("base_model_name_or_path") or getattr(self.model, "name_or_path", None)
        config["base_model_name_or_path"] = base
        # "auto" keeps the embeddings if the vocabulary was enlarged, and if they are adapted.
        keep: Any = "auto"
        with suppress(AttributeError, OSError, TypeError, ValueError):  # no files or vocabulary
            own = self.model.config.from_pretrained(source_of(str(base)))
            now = self.model.config.get_text_config().vocab_size
            keep = own.get_text_config().vocab_size != now
        tensors = get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=keep
        )
        stored = {key: Stored.of(tensor) for key, tensor in tensors.items()}
        layers, others = find_layers(stored, config, name)
        if (order := self.order) is None and self._shared.order == "trained":
            text = f"{name} has changed, so its trained ranks are lost: reorder it again"
            warnings.warn(text, stacklevel=3)
        return AdapterFile(name, layers, others, config, {}, self.nesting, order)

    def _refuse_ranks(self, ranks: Sequence[int]) -> None:
        top = self.nesting.max_rank
        allowed = (top,) if {*ranks} <= {0, top} else self.ranks  # these read all factors
        for rank in dict.fromkeys(ranks):
            if rank != 0:
                self.nesting.scale_at(rank)  # it must be an integer from 1 to R
                if rank not in allowed:
                    raise MatryoshkaError(
                        f"rank {rank} is not available before reordering; the ranks are "
                        f"{', '.join(map(str, allowed))}. Call adapter.reorder() after training"
                    )

    def _refuse_merged(self, what: str) -> None:
        if any(self.name in module.merged_adapters for module in self._layers().values()):
            raise MatryoshkaError(f"adapter {self.name!r} is merged: unmerge it to {what}")
