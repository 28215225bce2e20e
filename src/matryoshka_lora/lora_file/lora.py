"""A LoRA file: its layers, and what a truncated output will be before it is written."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.allocation import LayerSpectrum
from matryoshka_lora.linalg.arrays import Array, Float64Array
from matryoshka_lora.linalg.factors import (
    Checksum,
    pad_end,
    relative_error,
    relative_errors,
    reorder_factors,
    rescale_factors,
    singular_values,
    squared_tails,
    truncation_errors,
)
from matryoshka_lora.linalg.kronecker import KroneckerSVD
from matryoshka_lora.lora_file.atomic import PathLike
from matryoshka_lora.lora_file.safetensors_io import (
    StoredTensor,
    create_safetensors,
    safetensors_size,
)
from matryoshka_lora.nesting import Deploy, Nesting, Order, check_rank, check_ranks
from matryoshka_lora.progress import progress_bar, single_threaded

LayerKind = Literal["LoRA", "LoHa", "LoKr"]
"""The parametrizations of a layer's update."""

Ranks = int | Mapping[str, int]
"""One rank for all layers, or a rank for each by its name."""

NESTING_KEY = "matryoshka_lora"
"""The key of ranks, order and checksum in the metadata of the weights."""


@dataclass(frozen=True)
class Layer:
    """A pair of factors in a file.

    Attributes:
        name: The module's name in the base model, or the name of the pair in a single file.
        key_A, key_B: The keys of the factors in the file.
        A, B: The factors, with the shapes that they have in the file.
        rank: The rank of the factors.
        scale: The scale s of the update ``s B A``.
        num_experts: The number of stacked pairs.
        key_alpha: The key of the layer's alpha, if a single file has one.
        kind: LoRA, or the parametrization from which the factors are computed when they are read.
        read_svd: Returns the singular value decomposition of ``B A``, if it is known without A
            and B.
    """

    name: str
    key_A: str
    key_B: str
    A: StoredTensor
    B: StoredTensor
    rank: int
    scale: float
    num_experts: int = 1
    key_alpha: str | None = None
    kind: LayerKind = "LoRA"
    read_svd: Callable[[], KroneckerSVD] | None = None

    @property
    def parameters_per_rank(self) -> int:
        """in + out, times the number of experts."""
        return (math.prod(self.A.shape) + math.prod(self.B.shape)) // self.rank

    def with_rank(self, rank: int, scale: float) -> Layer:
        """Describe this layer as LoRA of another rank and scale. The tensors cannot be read."""
        rows = rank * self.num_experts
        A = replace(self.A, shape=(rows, *self.A.shape[1:]))
        B = replace(self.B, shape=(self.B.shape[0], rows, *self.B.shape[2:]))
        return replace(self, A=A, B=B, rank=rank, scale=scale, kind="LoRA", read_svd=None)

    def with_factors(self, A: StoredTensor, B: StoredTensor) -> Layer:
        """Return the layer with other factors of the same rank, and so with another update."""
        return replace(self, A=A, B=B, read_svd=None)

    def to_matrices(self, A: Array, B: Array) -> tuple[Array, Array]:
        """Return the file's tensors as A (..., R, in) and B (..., out, R).

        Kernels of convolutions are flattened. PEFT's stacks of experts have A (experts * R, in) and
        B (out, R * experts), with the expert index varying fastest.
        """
        if self.num_experts == 1:
            return A.reshape(len(A), -1), B.reshape(len(B), -1)
        B = B.reshape(len(B), self.rank, self.num_experts).transpose(2, 0, 1)
        return A.reshape(self.num_experts, self.rank, -1), B

    def from_matrices(self, A: Array, B: Array) -> tuple[Array, Array]:
        """Return matrices of this layer's rank as the file's tensors, inverse of `to_matrices`."""
        if self.num_experts > 1:
            B = B.transpose(1, 2, 0)
        return A.reshape(self.A.shape), B.reshape(self.B.shape)


class TruncatedLayer(NamedTuple):
    """A layer at a rank.

    Attributes:
        layer: The layer of the output.
        A: Shape (..., rank, in).
        B: Shape (..., out, rank).
        squared_errors: The squared error of each rank from 0 to R, shape (R + 1,), float64.
        singular_values: The singular values of the layer's update, shape (..., R), float64, if the
            factors had to be reordered.
    """

    layer: Layer
    A: Array
    B: Array
    squared_errors: Float64Array
    singular_values: Float64Array | None


@dataclass(frozen=True)
class LoraFile(ABC):
    """An opened LoRA: a PEFT folder or a single file. Tensors are loaded lazily.

    Attributes:
        name: Its path, for messages.
        layers: Its layers, sorted by name.
        other_tensors: Its tensors that are not factors, by key: biases, modules_to_save and others.
        metadata: The metadata of its safetensors file.
        files: Its files with tensors; empty for an adapter in memory.
        nesting: The ranks and scales of a nested adapter.
        order: How the factors are ordered, or None if they are not.
        deploy: ``"paper"`` if each nested rank has its own scale and nothing is reordered, as in
            arXiv 2605.07850.
        changes: What was done to the layers, such as ``"left out 2 layers of 14"``.
    """

    name: str
    layers: tuple[Layer, ...]
    other_tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    nesting: Nesting | None = None
    order: Order | None = None
    deploy: Deploy = "reordered"
    changes: tuple[str, ...] = ()

    @abstractmethod
    def plan(self, ranks: Ranks) -> OutputPlan:
        """Return what an output at some ranks will hold.

        Args:
            ranks: Layers with a smaller rank keep theirs.

        Raises:
            MatryoshkaError: The ranks are not available.
        """

    @abstractmethod
    def plan_unchanged(self) -> OutputPlan:
        """Return what an output with the same ranks will hold, whose factors are only rescaled."""

    @abstractmethod
    def write_output(self, plan: OutputPlan, output: PathLike, force: bool) -> WrittenOutput:
        """Write a plan of this LoRA in its format; see `OutputPlan.write`."""

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The nested ranks; 1, 2, 4, ... R if the adapter is not nested."""
        return (self.nesting or Nesting.powers_of_two(self.max_rank)).ranks

    @property
    def available_ranks(self) -> Sequence[int]:
        """The ranks at which it can be used: all, or the nested ones in the paper's deployment."""
        return self.ranks if self.deploy == "paper" else range(1, self.max_rank + 1)

    @property
    def sources(self) -> tuple[PathLike, ...]:
        """The paths that an output must not overwrite."""
        return self.files

    @property
    def size(self) -> int:
        """The size of its files in bytes."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def output_scale(self) -> float:
        """The scale of an output: 1, or near those of the layers where fp16 needs it."""
        dtypes = {factor.dtype for layer in self.layers for factor in (layer.A, layer.B)}
        exponents = [math.log2(layer.scale) for layer in self.layers]
        middle = round((min(exponents) + max(exponents)) / 2)
        if np.dtype(np.float16) in dtypes and abs(middle) > 8:
            return 2.0**middle
        return 1.0

    def check_rank(self, rank: int) -> int:
        """Return a rank as an int; raise MatryoshkaError unless it is available."""
        rank = check_rank(rank)
        if rank not in self.available_ranks:
            choices = f"from 1 to {self.max_rank}"
            if self.deploy == "paper":
                choices = f"one of {', '.join(map(str, self.ranks))}"
            raise MatryoshkaError(f"{self.name}: `rank` must be {choices}, got {rank!r:.80}.")
        return rank

    def check_ranks(self, ranks: Sequence[int] | None) -> tuple[int, ...]:
        """Return ranks that are available as a tuple.

        Args:
            ranks: Defaults to the nested ranks.

        Raises:
            MatryoshkaError: A rank is not available, or they are not strictly increasing.
        """
        if ranks is None:
            return self.ranks
        return tuple(self.check_rank(rank) for rank in check_ranks(ranks))

    def ranks_by_layer(self, ranks: Ranks) -> dict[str, int]:
        """Return the rank of each layer of an output.

        Args:
            ranks: One rank, where layers with a smaller rank keep theirs; or the rank of each
                layer by its name, which may exceed its own.

        Raises:
            MatryoshkaError: The rank is not available.
        """
        if isinstance(ranks, Mapping):
            return dict(ranks)
        rank = self.check_rank(ranks)
        return {layer.name: min(rank, layer.rank) for layer in self.layers}

    def scale_at(self, layer: Layer, rank: int) -> float:
        """Return the scale of a layer at a rank."""
        if self.nesting and self.deploy == "paper":
            return self.nesting.scale_at(rank)
        return layer.scale

    def factors(self, layer: Layer) -> tuple[Array, Array]:
        """Return the factors of a layer as matrices; see `Layer.to_matrices`.

        Raises:
            NotFiniteError: A factor is NaN or infinite in float32.
        """
        A, B = layer.to_matrices(layer.A.read(), layer.B.read())
        with np.errstate(over="ignore"):  # norms of larger float64 factors would be infinite
            narrow_factors = [factor.astype(np.float32, copy=False) for factor in (A, B)]
        if not all(np.isfinite(factor).all() for factor in narrow_factors):
            raise NotFiniteError(
                f"{self.name}: the factors of {layer.name} are NaN or infinite. If training "
                "diverged, train again with a lower learning rate."
            )
        return A, B

    def singular_values(self, layer: Layer) -> Float64Array:
        """Return the singular values of a layer's update, shape (..., R), float64."""
        A, B = self.factors(layer)
        return layer.scale * singular_values(A, B)

    def spectra(self, max_ranks: Mapping[str, int]) -> dict[str, LayerSpectrum]:
        """Return what `ranks_for_size` and `ranks_for_error` need to know of each layer.

        Args:
            max_ranks: The largest rank that each layer may get, by its name.
        """
        spectra: dict[str, LayerSpectrum] = {}
        with single_threaded():
            for layer in progress_bar(self.layers, "singular values"):
                spectra[layer.name] = LayerSpectrum(
                    self.singular_values(layer), layer.parameters_per_rank, max_ranks[layer.name]
                )
        return spectra

    def truncate(self, layer: Layer, new: Layer, keep_factors: bool = False) -> TruncatedLayer:
        """Compute the factors of a layer at a rank.

        Factors without an order are reordered first. Ranks above the layer's own get zeros.

        Args:
            layer: The layer.
            new: The layer of the output, from `Layer.with_rank`.
            keep_factors: Whether the factors are only rescaled; the rank is their own.

        Raises:
            NotFiniteError: A factor is NaN or infinite.
        """
        A, B = self.factors(layer)
        missing = new.rank - layer.rank
        A, B = pad_end(A, missing, axis=-2), pad_end(B, missing, axis=-1)
        if self.order is None and self.deploy != "paper" and not keep_factors:
            p = np.full(A.shape[-2], layer.scale)
            A, B, singular_values = reorder_factors(A, B, p, new.scale)
            squared_errors = squared_tails(singular_values)
        else:
            singular_values = None
            scales = [self.scale_at(layer, rank) for rank in range(1, A.shape[-2] + 1)]
            squared_errors = truncation_errors(A, B, scales)
            ratio = scales[new.rank - 1] / new.scale
            A, B = rescale_factors(A, B, ratio)
        A, B = A[..., : new.rank, :], B[..., : new.rank]
        return TruncatedLayer(new, A, B, squared_errors, singular_values)

    def squared_errors(self, layer: Layer) -> Float64Array:
        """Return the squared error of each rank from 0 to R of a layer, shape (R + 1,)."""
        if self.deploy != "paper" and self.order is None:
            return squared_tails(self.singular_values(layer))
        scales = [self.scale_at(layer, rank) for rank in range(1, layer.rank + 1)]
        return truncation_errors(*self.factors(layer), scales)


@dataclass(frozen=True)
class WrittenOutput:
    """What is known of an output once its factors have been computed.

    Attributes:
        ranks: The rank of each layer by its name.
        squared_errors: The squared error of each rank from 0 to R by layer, shape (R + 1,).
        singular_values: The singular values of the update of each layer that was reordered, shape
            (..., R).
    """

    ranks: Mapping[str, int]
    squared_errors: dict[str, Float64Array] = field(default_factory=dict)
    singular_values: dict[str, Float64Array] = field(default_factory=dict)

    def add(self, truncated: TruncatedLayer) -> None:
        """Add the errors and singular values of a layer."""
        name = truncated.layer.name
        self.squared_errors[name] = truncated.squared_errors
        if truncated.singular_values is not None:
            self.singular_values[name] = truncated.singular_values

    def relative_error(self, rank: int | None = None) -> float:
        """Return the norm of what a rank misses over the norm of the update.

        Args:
            rank: Defaults to the ranks of the output.
        """
        return relative_error(self.squared_errors, self.ranks if rank is None else rank)

    def relative_errors(self, ranks: Sequence[int]) -> dict[int, float]:
        """Return the relative error of each of several ranks."""
        return relative_errors(self.squared_errors, ranks)


@dataclass(frozen=True)
class OutputPlan:
    """What an output will hold, before its factors are computed.

    Attributes:
        lora: The LoRA that is truncated.
        layers: Each layer as it is, and as it will be, sorted by name.
        other_tensors: The output's tensors that are not factors, by key.
        metadata: The output's metadata; `write` adds the checksum to the nesting.
        keep_factors: Whether the factors are only rescaled.
    """

    lora: LoraFile
    layers: tuple[tuple[Layer, Layer], ...]
    other_tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    keep_factors: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(new.rank for _, new in self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer by its name."""
        return {new.name: new.rank for _, new in self.layers}

    @property
    def file_size(self) -> int:
        """The size of the output's weights file in bytes."""
        return safetensors_size(self._tensors(), self.metadata)

    def _tensors(self) -> dict[str, StoredTensor]:
        tensors = dict(self.other_tensors)
        for _, new in self.layers:
            tensors[new.key_A] = new.A
            tensors[new.key_B] = new.B
        return tensors

    def truncated_layers(self) -> Iterator[TruncatedLayer]:
        """Compute the factors of one layer after the other, in the dtypes of the output."""
        with single_threaded():
            for old, new in progress_bar(self.layers, "truncating"):
                with np.errstate(over="ignore"):
                    truncated = self.lora.truncate(old, new, self.keep_factors)
                    A, B = truncated.A.astype(new.A.dtype), truncated.B.astype(new.B.dtype)
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise NotFiniteError(
                        f"{self.lora.name}: the new factors of {new.name} are too large for "
                        f"{new.A.dtype}. Save it in fp32 first."
                    )
                yield truncated._replace(A=A, B=B)

    def write(self, output: PathLike, force: bool = False) -> WrittenOutput:
        """Write the output in the format of the LoRA: a PEFT folder or a single file.

        Args:
            output: The folder or file to write.
            force: Whether to overwrite the output.

        Raises:
            MatryoshkaError: The output already exists or cannot be written.
            NotFiniteError: A factor is NaN or infinite.
        """
        return self.lora.write_output(self, output, force)

    def write_weights(self, file: Path) -> WrittenOutput:
        """Write the safetensors file. One layer is in memory at a time."""
        written = WrittenOutput(self.ranks)
        with create_safetensors(file, self._tensors(), self.metadata) as writer:
            checksum = Checksum()
            for truncated in self.truncated_layers():
                layer = truncated.layer
                A, B = layer.from_matrices(truncated.A, truncated.B)
                writer.write(layer.key_A, A)
                writer.write(layer.key_B, B)
                checksum.update(A, B)
                written.add(truncated)
            for key, tensor in self.other_tensors.items():
                writer.write(key, tensor.read())
            if NESTING_KEY in self.metadata:
                nesting = json.loads(self.metadata[NESTING_KEY])
                nesting["checksum"] = checksum.hexdigest()
                writer.metadata[NESTING_KEY] = json.dumps(nesting)
        return written
