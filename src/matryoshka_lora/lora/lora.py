"""A LoRA as a value: its layers, other tensors and metadata.

A verb, such as `Lora.truncate`, returns another LoRA and computes nothing yet. The factors are
computed layer by layer when `Lora.save` writes them, so one layer is in memory at a time::

    import matryoshka_lora as ml

    lora = ml.open("flux.safetensors")
    small = lora.drop("lora_te*").truncate(error="10%").convert("diffusers").cast("bf16")
    result = small.save("small.safetensors")
    print(result.errors, result.ranks)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import squared_tails
from matryoshka_lora.lora import convert, save, transforms, truncate
from matryoshka_lora.lora.layer import Factors, Layer, StoredTensor
from matryoshka_lora.lora.results import Scores
from matryoshka_lora.nesting import Deploy, Nesting, Order, check_rank, check_ranks
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.registry import FORMATS, DtypeName, FormatName, KeyFormat
from matryoshka_lora.text import format_ranks

Container = Literal["peft", "single"]
"""A PEFT folder, or a single file."""


@dataclass(frozen=True)
class Lora:
    """A LoRA. `matryoshka_lora.open` returns one.

    Attributes:
        name: Its path, for messages.
        layers: Its layers, sorted by name.
        other_tensors: Its tensors that are not factors, by key: biases, modules_to_save and others.
        metadata: The metadata of its safetensors file.
        container: ``"peft"`` for a PEFT folder, or ``"single"`` for a single file. `save` writes
            the same by default.
        config: The content of ``adapter_config.json``; empty for a single file.
        files: The weights files that it was read from; empty for an adapter in memory.
        nesting: The ranks and scales of a nested adapter.
        order: How the factors are ordered, or None if they are not.
        small: The small adapter, if the low ranks were trained: its prefixes are the ranks up to
            its own, and larger ranks are prefixes of the layers. It has the same layer names.
        deploy: ``"paper"`` if each nested rank has its own scale and nothing is reordered, as in
            arXiv 2605.07850.
        original_error: The relative error of its largest rank against the LoRA, or the change of a
            model, that it was truncated from; 0 if it was not truncated.
        scores: The scores of its ranks from an evaluation, for the model card. A verb that changes
            what a rank computes drops them.
        notes: What the user should know of an output, one sentence each.
        changes: What was done to the layers, such as ``"left out 2 layers of 14"``.
    """

    name: str
    layers: tuple[Layer, ...]
    other_tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    container: Container = "peft"
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    nesting: Nesting | None = None
    order: Order | None = None
    small: Lora | None = None
    deploy: Deploy = "reordered"
    original_error: float = 0.0
    scores: tuple[Scores, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        ranks = format_ranks(self.ranks.values())
        return f"Lora({self.name!r}, {self.container}, {len(self.layers)} layers, {ranks})"

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer by its name."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's weight by its name: outputs, inputs, and the kernel."""
        return {layer.name: (layer.out_features, *layer.in_shape) for layer in self.layers}

    @property
    def nested_ranks(self) -> tuple[int, ...]:
        """The nested ranks; 1, 2, 4, ... R if the adapter is not nested."""
        return (self.nesting or Nesting.powers_of_two(self.max_rank)).ranks

    @property
    def available_ranks(self) -> Sequence[int]:
        """The ranks at which it can be used: all, or the nested ones in the paper's deployment."""
        if self.deploy == "paper":
            return self.nested_ranks
        return range(1, self.max_rank + 1)

    @property
    def small_rank(self) -> int:
        """The largest rank of the small adapter; 0 if there is none."""
        return 0 if self.small is None else self.small.max_rank

    @property
    def can_choose_ranks(self) -> bool:
        """Whether its components have singular values, or weighted ones, to choose ranks by.

        Trained ranks have none, and neither has the paper's deployment.
        """
        return self.order != "trained" and self.deploy != "paper"

    @property
    def size(self) -> int:
        """The size in bytes of the weights files that it was read from."""
        small_size = 0 if self.small is None else self.small.size
        return small_size + sum(file.stat().st_size for file in self.files)

    @property
    def file_size(self) -> int:
        """The size in bytes of the weights file that `save` writes by default."""
        return FORMATS[self.container].file_size(self)

    @property
    def sources(self) -> tuple[PathLike, ...]:
        """The paths that an output must not overwrite: weights, configs and the base model."""
        configs = [file.with_name("adapter_config.json") for file in self.files if self.config]
        base_model = self.config.get("base_model_name_or_path")
        small = () if self.small is None else self.small.sources
        return (*self.files, *configs, *small, *([str(base_model)] if base_model else []))

    @property
    def new_scale(self) -> float:
        """The scale of new factors: 1, or near the scales of the layers where fp16 needs it."""
        exponents = [math.log2(layer.scale) for layer in self.layers]
        middle = round((min(exponents) + max(exponents)) / 2)
        has_fp16 = any(layer.dtype == np.float16 for layer in self.layers)
        return 2.0**middle if has_fp16 and abs(middle) > 8 else 1.0

    def check_rank(self, rank: int) -> int:
        """Return a rank as an int; raise MatryoshkaError unless it is available."""
        rank = check_rank(rank)
        if rank not in self.available_ranks:
            choices = f"from 1 to {self.max_rank}"
            if self.deploy == "paper":
                choices = f"one of {', '.join(map(str, self.nested_ranks))}"
            raise MatryoshkaError(f"{self.name}: `rank` must be {choices}, got {rank}.")
        return rank

    def check_ranks(self, ranks: Iterable[int] | None) -> tuple[int, ...]:
        """Return ranks as a tuple; the nested ones by default.

        Raises:
            MatryoshkaError: A rank is not available, or they are not strictly increasing.
        """
        if ranks is None:
            return self.nested_ranks
        return tuple(self.check_rank(rank) for rank in check_ranks(ranks))

    def squared_errors(self) -> dict[str, Float64Array]:
        """Return the squared error of each rank from 0 to R by layer, shape (R + 1,).

        It is the squared norm of the difference that truncation to a rank makes. All factors are
        read.
        """
        errors: dict[str, Float64Array] = {}
        small_layers = () if self.small is None else self.small.layers
        with single_threaded():
            for layer in progress_bar(self.layers, "computing errors"):
                errors[layer.name] = truncate.squared_errors(self, layer)
            for layer in small_layers:
                small_errors = layer.read().squared_errors
                assert small_errors is not None  # see `with_small`
                errors[layer.name] = truncate.with_small_errors(errors[layer.name], small_errors)
        return errors

    def weighted_squared_errors(self) -> dict[str, Float64Array]:
        """Return the squared weighted error of each rank from 0 to R by layer, shape (R + 1,).

        It is the sum of the squares of the weighted values that a rank leaves out. Without the
        order ``"weighted"`` it is empty.
        """
        errors: dict[str, Float64Array] = {}
        for layer in self.layers:
            if self.order == "weighted" and layer.weighted_values is not None:
                errors[layer.name] = squared_tails(layer.weighted_values)
        return errors

    def map(self, function: Callable[[Factors], Factors]) -> Lora:
        """Return a LoRA whose factors are computed from the factors of each layer.

        It has no order and no nesting, because the components may have changed, and the errors of
        further verbs are relative to it.

        Args:
            function: Maps the factors of a layer to factors of the same shapes.
        """

        def new_factors(factors: Factors) -> Factors:
            A, B, *_ = function(Factors(factors.A, factors.B))
            if A.shape != factors.A.shape or B.shape != factors.B.shape:
                raise MatryoshkaError(
                    f"The function returned factors of the shapes {list(A.shape)} and "
                    f"{list(B.shape)}, expected {list(factors.A.shape)} and "
                    f"{list(factors.B.shape)}."
                )
            return Factors(A, B)

        layers = tuple(layer.map(new_factors) for layer in self.layers)
        return replace(
            self,
            layers=layers,
            nesting=None,
            order=None,
            small=None,
            deploy="reordered",
            original_error=0.0,
            scores=(),
        )

    def _both(self, verb: Callable[[Lora], Lora]) -> Lora:
        """Return the LoRA after a verb that keeps the components, with its small adapter."""
        new = verb(replace(self, small=None, scores=()))
        return new if self.small is None else replace(new, small=verb(self.small))

    # The verbs

    def reorder(self) -> Lora:
        """Return a nested LoRA: each prefix of its factors is the best one of its rank.

        See `matryoshka_lora.lora.truncate.reorder`.
        """
        return truncate.reorder(self)

    def nested(self) -> Lora:
        """Return a nested LoRA; unlike `reorder`, factors that have an order keep it."""
        return truncate.nested(self)

    def truncate(
        self,
        rank: int | None = None,
        *,
        keep: float | str | None = None,
        error: float | str | None = None,
        max_bytes: int | str | None = None,
    ) -> Lora:
        """Return a LoRA of smaller ranks. See `matryoshka_lora.lora.truncate.truncate`."""
        return truncate.truncate(self, rank, keep=keep, error=error, max_bytes=max_bytes)

    def at_rank(self, rank: int) -> Lora:
        """Return the LoRA at a rank. Layers of a smaller rank keep theirs."""
        return truncate.truncate(self, rank)

    def drop(self, *patterns: str) -> Lora:
        """Return a LoRA without the layers whose names match a pattern.

        See `matryoshka_lora.lora.transforms.drop`.
        """
        return self._both(lambda lora: transforms.drop(lora, patterns))

    def scale(self, factors: Mapping[str, float]) -> Lora:
        """Return a LoRA whose updates are multiplied by factors.

        See `matryoshka_lora.lora.transforms.scale`.
        """
        return self._both(lambda lora: transforms.scale(lora, factors))

    def cast(self, dtype: DtypeName) -> Lora:
        """Return a LoRA whose factors are written in another dtype.

        See `matryoshka_lora.lora.transforms.cast`.
        """
        return self._both(lambda lora: transforms.cast(lora, dtype))

    def pad(self, rank: int) -> Lora:
        """Return a LoRA of a larger rank with the same update, to train on.

        See `matryoshka_lora.lora.transforms.pad`.
        """
        return transforms.pad(self, rank)

    def convert(self, key_format: KeyFormat) -> Lora:
        """Return a LoRA with the keys of another format.

        See `matryoshka_lora.lora.convert.convert`.
        """
        return self._both(lambda lora: convert.convert(lora, key_format))

    def save(
        self,
        path: PathLike,
        format: FormatName | None = None,
        *,
        base_model: str | None = None,
        base_revision: str | None = None,
        ranks: Iterable[int] | None = None,
        force: bool = False,
    ) -> save.SaveResult:
        """Write the LoRA. See `matryoshka_lora.lora.save.save`."""
        return save.save(
            self,
            path,
            format,
            base_model=base_model,
            base_revision=base_revision,
            ranks=ranks,
            force=force,
        )
