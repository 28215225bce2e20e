"""Represent a LoRA file in memory: layers are read, cut and written one at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.factors import checksum, reorder_factors, singular_values
from matryoshka_lora.files.tensors import Stored, file_size, new_tensors
from matryoshka_lora.nesting import Nesting

T = TypeVar("T")

NOTE = "matryoshka_lora"
"""The key of the nesting in the metadata of the weights."""


@dataclass(frozen=True)
class Layer:
    """Describe one pair of factors in a file.

    Attributes:
        name: The module's name in the base model, or the name of the pair in a single file.
        A, B: The tensors, with the shapes that they have in the file.
        scale: The scale s of ``s B A``.
        experts: The number of stacked pairs.
        key_alpha: The key of its alpha, where a single file has one.
    """

    name: str
    key_A: str
    key_B: str
    A: Stored
    B: Stored
    rank: int
    scale: float
    experts: int = 1
    key_alpha: str | None = None

    @property
    def width(self) -> int:
        """The number of parameters per rank: in + out, times the experts."""
        return (math.prod(self.A.shape) + math.prod(self.B.shape)) // self.rank

    def at(self, rank: int, scale: float) -> Layer:
        """Return the layer at another rank and scale. Its tensors cannot be read."""
        rows = rank * self.experts
        A = self.A._replace(shape=(rows, *self.A.shape[1:]))
        B = self.B._replace(shape=(self.B.shape[0], rows, *self.B.shape[2:]))
        return replace(self, A=A, B=B, rank=rank, scale=scale)

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the file's tensors as A (..., R, in) and B (..., out, R).

        Kernels of convolutions are flattened. PEFT's stacks of experts have A (experts * R, in) and
        B (out, R * experts), where the expert runs fastest.
        """
        if self.experts == 1:
            return A.flatten(1), B.flatten(1)
        B = B.reshape(len(B), self.rank, self.experts).permute(2, 0, 1)
        return A.reshape(self.experts, self.rank, -1), B

    def tensors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrices of this layer's rank as the file's tensors: the inverse of `matrices`."""
        B = B if self.experts == 1 else B.permute(1, 2, 0)
        return A.reshape(self.A.shape), B.reshape(self.B.shape)


@dataclass(frozen=True)
class AdapterFile:
    """Describe an opened adapter. Tensors are read on use.

    Attributes:
        name: Its path, for messages.
        layers: Its layers, sorted by name.
        others: Its tensors that are no factors, by key: biases, modules_to_save and the like.
        config: PEFT's ``adapter_config.json``; a single file has none.
        nesting, order: Ranks and scales of a nested adapter, and how its factors were reordered;
            None where they were not.
        files: Its files with tensors; empty for an adapter in memory.
    """

    name: str
    layers: tuple[Layer, ...]
    others: Mapping[str, Stored]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    nesting: Nesting | None = None
    order: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether the adapter is a single file, not a PEFT folder."""
        return not self.config

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The nested ranks; those of an adapter that is not nested are 1, 2, 4, ... R."""
        return (self.nesting or Nesting.powers_of_two(self.max_rank)).ranks

    @property
    def available(self) -> Sequence[int]:
        """The ranks that may be cut: all, but the paper's deployment has the nested ones alone."""
        return self.ranks if self.order == "paper" else range(1, self.max_rank + 1)

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    def base_model(
        self, model: str | None = None, revision: str | None = None
    ) -> tuple[str, str | None]:
        """Return name and revision of the base model: those given, or what the config names."""
        name = model or self.config.get("base_model_name_or_path")
        if not name:
            raise MatryoshkaError(f"{self.name} names no base model: give it with --model")
        if (task := self.config.get("task_type") or "CAUSAL_LM") != "CAUSAL_LM":
            raise MatryoshkaError(
                f"{self.name} is for {task}, and base models are loaded as CAUSAL_LM: without the "
                "base model there are `reorder` by svd, and `export` as PEFT's folder"
            )
        return str(name), revision or (None if model else self.config.get("revision"))

    def several(self, ranks: Sequence[int] | None) -> tuple[int, ...]:
        """Return some ranks, or the nested ones; MatryoshkaError unless there are such ranks."""
        chosen = Nesting(tuple(ranks or self.ranks)).ranks
        for rank in chosen:
            self.check_rank(rank)
        return chosen

    def check_rank(self, rank: int) -> None:
        """Raise MatryoshkaError unless there is such a rank."""
        if rank not in self.available:
            is_paper, top = self.order == "paper", self.max_rank
            several = ", ".join(map(str, self.ranks)) if is_paper else f"1 to {top}"
            raise MatryoshkaError(f"{self.name} has no rank {rank!r}: choose one of {several}")

    def scale_at(self, layer: Layer, rank: int) -> float:
        """Return the scale of a rank of an ordered layer."""
        if self.nesting and self.order == "paper":
            return self.nesting.scale_at(rank)
        return layer.scale

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return a layer's factors as `Layer.matrices`.

        Raises:
            NotFiniteError: A factor holds NaN or infinity.
        """
        A, B = layer.matrices(layer.A.read(), layer.B.read())
        if not (A.isfinite().all() and B.isfinite().all()):
            raise NotFiniteError(
                f"{self.name}: the factors of {layer.name} hold NaN or infinity. If the training "
                "diverged, train again with a lower learning rate"
            )
        return A, B

    def singular_values(self, layer: Layer) -> Tensor:
        """Return those of a layer's update, shape (..., R), float64."""
        A, B = self.factors(layer)
        return singular_values(A.double() * layer.scale, B)

    def cut(self, layer: Layer, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's factors at a rank, rescaled for another scale.

        Factors without an order are reordered by SVD first. Ranks above its own get zeros.

        Returns:
            A of shape (..., r, in), B of shape (..., out, r), with experts in front, and what each
            rank from 0 to R leaves out: squared Frobenius norms, shape (R + 1,), float64.

        Raises:
            NotFiniteError: A factor holds NaN or infinity.
        """
        A, B = self.factors(layer)
        if self.order is None:
            missing = max(rank - layer.rank, 0)
            A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
            p = torch.full((A.shape[-2],), layer.scale, dtype=torch.float64)
            A, B, values = reorder_factors(A, B, p, scale)
            lost = left_out(values)
        else:
            scales = [self.scale_at(layer, r) for r in range(1, layer.rank + 1)]
            lost, factor = _lost(A, B, scales), scales[rank - 1] / scale
            B = B if factor == 1 else (B.double() * factor).to(B.dtype)
        return A[..., :rank, :], B[..., :rank], lost

    def lost(self, layer: Layer) -> Tensor:
        """Return what each rank from 0 to R leaves out of a layer, as `cut`, for less work."""
        if self.order in (None, "svd"):
            return left_out(self.singular_values(layer))
        scales = [self.scale_at(layer, r) for r in range(1, layer.rank + 1)]
        return _lost(*self.factors(layer), scales)


def left_out(values: Tensor) -> Tensor:
    """Return the squared error of each rank from 0 to R, of singular values (..., R)."""
    squares = pad(values.double() ** 2, (0, 1)).reshape(-1, values.shape[-1] + 1).sum(0)
    return squares.flip(0).cumsum(0).flip(0)


def _lost(A: Tensor, B: Tensor, scales: list[float]) -> Tensor:
    """Return the squared error of each rank from 0 to R; ``scales`` are those of 1 to R."""
    # |B diag(d) A|^2 = d^T G d with G = (B^T B) * (A A^T), so no dense matrix is formed. A row of d
    # is the difference of the diagonals at rank R and at a rank from 0 on.
    A, B, rank = A.double(), B.double(), len(scales)
    gram = ((B.mT @ B) * (A @ A.mT)).reshape(-1, rank, rank).sum(0)
    diagonals = torch.tensor([0.0, *scales], dtype=torch.float64)[:, None].expand(-1, rank).tril(-1)
    missing = diagonals[-1] - diagonals
    squares: Tensor = ((missing @ gram) * missing).sum(-1)
    return squares.clamp(min=0)  # clamp cancellation noise


def rank_and_scale(config: Mapping[str, Any], name: str, where: str) -> tuple[int, float]:
    """Return what PEFT's config says of a layer: its rank and its scale."""

    def of(pattern: str, field: str) -> Any:
        # PEFT matches patterns at the end of a name, from a dot on; the first one counts.
        found = (config.get(pattern) or {}).items()
        return next((x for key, x in found if re.match(rf"(.*\.)?({key})$", name)), config[field])

    try:
        rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (re.error, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        rank, scale = 0, 0.0
    if not (isinstance(rank, int) and 0 < scale < math.inf):
        raise MatryoshkaError(
            f"{where}: the rank or the alpha of {name[:200]} is no positive number, or a pattern "
            "of them is damaged: save the adapter again"
        )
    return rank, scale


@dataclass(frozen=True)
class Plan:
    """Describe an output before its tensors are computed.

    Attributes:
        layers: Each layer as it is, and as it will be, sorted by name.
        others: All tensors of the output that are no factors, by their keys there.
        metadata: The metadata; `write` puts the checksum into the nesting there.
        lost: What each rank from 0 to R leaves out of each layer, once `each` has computed it.
    """

    adapter: AdapterFile
    layers: tuple[tuple[Layer, Layer], ...]
    others: Mapping[str, Stored]
    metadata: dict[str, str]
    lost: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(new.rank for _, new in self.layers)

    @property
    def stored(self) -> dict[str, Stored]:
        """Dtype and shape of each tensor; factors cannot be read from here."""
        found = dict(self.others)
        for _, new in self.layers:
            found |= {new.key_A: new.A, new.key_B: new.B}
        return found

    @property
    def size(self) -> int:
        """The output file's size in bytes."""
        return file_size(self.stored, self.metadata)

    def error(self, rank: int | None = None) -> float:
        """Return the relative error of the output, or of a rank."""
        whole = left = 0.0
        for _, new in self.layers:
            own = self.lost[new.name]
            whole += float(own[0])
            left += float(own[min(rank or new.rank, len(own) - 1)])
        return math.sqrt(left / whole) if whole > 0 else 0.0

    def each(self) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """Compute the layers one by one."""
        for old, new in in_turn(self.layers, "cutting"):
            A, B, self.lost[new.name] = self.adapter.cut(old, new.rank, new.scale)
            yield new, A.to(new.A.dtype), B.to(new.B.dtype)

    def write(self, file: Path) -> None:
        """Write a safetensors file, with one layer in memory at a time."""
        metadata = dict(self.metadata)
        with new_tensors(file, self.stored, metadata) as put:

            def written() -> Iterator[tuple[Tensor, Tensor]]:
                for layer, *factors in self.each():
                    A, B = layer.tensors(*factors)
                    put(layer.key_A, A)
                    put(layer.key_B, B)
                    yield A, B

            found = checksum(written())
            for key, each in self.others.items():
                put(key, each.read())
            if NOTE in metadata:
                note = json.loads(metadata[NOTE])
                metadata[NOTE] = json.dumps({**note, "checksum": found})


def in_turn(layers: Sequence[T], doing: str) -> Iterator[T]:
    """Yield layers with a progress bar after a second, while torch is held to one thread."""
    with one_thread():
        yield from tqdm(layers, doing, leave=False, unit=" layers", disable=None, delay=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: on small matrices several threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
