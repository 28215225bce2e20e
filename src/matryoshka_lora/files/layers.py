"""What a LoRA file is in memory: layers that are read one at a time, cut, and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.factors import checksum, reorder_factors
from matryoshka_lora.files.tensors import Stored, TensorWriter, file_size
from matryoshka_lora.nesting import Nesting

NOTE = "matryoshka_lora"
"""The key of the nesting in the metadata of the weights."""

OnLayer = Callable[[], object] | None
"""Called after each layer."""


@dataclass(frozen=True)
class Layer:
    """One pair of factors in a file.

    Attributes:
        name: The module's name in the base model, or the name of the pair in a single file.
        key_A, key_B: The keys of A and B.
        shape_A, shape_B: Their shapes in the file.
        rank: The rank of this layer.
        scale: The number before ``B A``.
        experts: How many pairs are stacked in it.
        key_alpha: The key of its alpha, where a single file has one.
    """

    name: str
    key_A: str
    key_B: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    rank: int
    scale: float
    experts: int = 1
    key_alpha: str | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether its kernel is larger than one point."""
        return math.prod(self.shape_A[2:]) > 1

    @property
    def width(self) -> int:
        """How many numbers one more rank adds: in + out, times the experts."""
        return (math.prod(self.shape_A) + math.prod(self.shape_B)) // self.rank

    def at(self, rank: int, scale: float) -> Layer:
        """Return the layer with another rank and scale."""
        shape_A = (rank * self.experts, *self.shape_A[1:])
        shape_B = (self.shape_B[0], rank * self.experts, *self.shape_B[2:])
        return replace(self, shape_A=shape_A, shape_B=shape_B, rank=rank, scale=scale)

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
        return A.reshape(self.shape_A), B.reshape(self.shape_B)


@dataclass(frozen=True)
class AdapterFile:
    """An opened adapter. Tensors are read when they are asked for.

    Attributes:
        name: Its path, for messages.
        layers: Its layers, sorted by name.
        stored: All its tensors by key.
        config: PEFT's ``adapter_config.json``; empty where a single file has none.
        metadata: The metadata of its file.
        nesting: Ranks and scales of a nested adapter; None is plain LoRA.
        order: How the factors of a nested adapter were reordered; None where they were not.
        rule: The rule it was trained with.
        files: Its files with tensors; none where it is in memory.
    """

    name: str
    layers: tuple[Layer, ...]
    stored: Mapping[str, Stored]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    nesting: Nesting | None = None
    order: str | None = None
    rule: str = "lora"
    files: tuple[Path, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether it is a single file and not PEFT's folder."""
        return not self.config

    @property
    def source(self) -> Path | None:
        """Where it lies on the disk, if it does."""
        return Path(self.name) if self.files else None

    @property
    def max_rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    @property
    def others(self) -> tuple[str, ...]:
        """The keys of tensors that are no factors: biases, modules_to_save and the like."""
        factors = {key for layer in self.layers for key in (layer.key_A, layer.key_B)}
        return tuple(sorted(self.stored.keys() - factors))

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return sum(file.stat().st_size for file in self.files)

    def check_rank(self, rank: int) -> None:
        """Raise MatryoshkaError unless the rank may be cut out.

        All ranks may, but in the paper's deployment the nested ones.
        """
        paper = self.nesting.ranks if self.nesting and self.order == "paper" else None
        if isinstance(rank, bool) or rank not in (paper or range(1, self.max_rank + 1)):
            nested = paper and f"{', '.join(map(str, paper))}, as the paper deploys it"
            several = nested or f"1 to {self.max_rank}"
            raise MatryoshkaError(f"{self.name} has no rank {rank!r}: choose one of {several}")

    def scale_at(self, layer: Layer, rank: int) -> float:
        """Return the number before the first ``rank`` columns of a layer that is in order."""
        is_paper = self.nesting and self.order == "paper"
        return self.nesting.scale_at(rank) if self.nesting and is_paper else layer.scale

    def read(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return A of shape (..., R, in) and B of shape (..., out, R), with experts in front.

        Raises:
            NotFiniteError: A factor holds NaN or infinity.
        """
        A, B = (self.stored[key].read() for key in (layer.key_A, layer.key_B))
        if not (A.isfinite().all() and B.isfinite().all()):
            raise NotFiniteError(
                f"{self.name}: the factors of {layer.name} hold NaN or infinity. If the training "
                "diverged, train again with a lower learning rate"
            )
        return layer.matrices(A, B)

    def cut(self, layer: Layer, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer at a rank, as factors before which another scale stands.

        Factors without an order are reordered by SVD first. A rank above the layer's own is filled
        up with directions of size 0.

        Returns:
            A of shape (..., r, in), B of shape (..., out, r), and what each rank from 0 to R leaves
            out of the layer: squared Frobenius norms, shape (R + 1,), float64.
        """
        A, B = self.read(layer)
        if self.order is None:
            missing = max(rank - layer.rank, 0)
            A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
            p = torch.full((A.shape[-2],), layer.scale, dtype=torch.float64)
            A, B, _ = reorder_factors(A, B, p, scale)
            lost = _lost(A, B, [scale] * len(p))
        else:
            scales = [self.scale_at(layer, r) for r in range(1, layer.rank + 1)]
            lost, factor = _lost(A, B, scales), scales[rank - 1] / scale
            B = B if factor == 1 else (B.double() * factor).to(B.dtype)
        return A[..., :rank, :], B[..., :rank], lost


def _lost(A: Tensor, B: Tensor, scales: list[float]) -> Tensor:
    """Return what each rank from 0 to R leaves out, where ``scales`` stand before ranks 1 to R."""
    # |B diag(d) A|^2 = d^T G d with G = (B^T B) * (A A^T), so no dense matrix is formed. A row of d
    # is the difference of the diagonals at rank R and at a rank from 0 on.
    A, B, rank = A.double(), B.double(), len(scales)
    gram = ((B.mT @ B) * (A @ A.mT)).reshape(-1, rank, rank).sum(0)
    diagonals = torch.tensor([0.0, *scales], dtype=torch.float64)[:, None].expand(-1, rank).tril(-1)
    missing = diagonals[-1] - diagonals
    squares: Tensor = ((missing @ gram) * missing).sum(-1)
    return squares.clamp(min=0)  # clamp cancellation noise


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return what PEFT's config says of a layer: its rank and the number before ``B A``."""

    def of(kind: str, default: Any) -> Any:
        # PEFT matches patterns at the end of a name, from a dot on; the first one counts.
        found = (config.get(kind) or {}).items()
        return next((x for key, x in found if re.match(rf"(.*\.)?({key})$", name)), default)

    try:
        rank = of("rank_pattern", config.get("r", 8))
        alpha = of("alpha_pattern", config.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except re.error as error:
        raise MatryoshkaError(f"a pattern of ranks or alphas is damaged: {error}") from error


@dataclass
class Lost:
    """Squared Frobenius norms of what an output leaves out of the update, summed over the layers.

    Attributes:
        by_rank: At each rank from 0 to R, shape (R + 1,); the first is the whole update.
        here: At the ranks of the output.
    """

    by_rank: Tensor
    here: float = 0.0

    def error(self, rank: int | None = None) -> float:
        """Return the norm of what is left out over that of the update: here, or at a rank."""
        size = float(self.by_rank[0])
        here = self.here if rank is None else float(self.by_rank[rank])
        return math.sqrt(here / size) if size > 0 else 0.0


@dataclass(frozen=True)
class Plan:
    """An output before a number of it is computed.

    Attributes:
        adapter: What the output is made of.
        layers: Each layer as it is, and as it will be, sorted by name.
        others: All tensors of the output that are no factors, by their keys there.
        metadata: The metadata; `write` puts the checksum into the nesting there.
    """

    adapter: AdapterFile
    layers: tuple[tuple[Layer, Layer], ...]
    others: Mapping[str, Stored]
    metadata: dict[str, str]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(new.rank for _, new in self.layers)

    @property
    def stored(self) -> dict[str, Stored]:
        """Dtype and shape of each tensor; factors cannot be read from here."""
        found, given = dict(self.others), self.adapter.stored
        for old, new in self.layers:
            found[new.key_A] = given[old.key_A]._replace(shape=new.shape_A)
            found[new.key_B] = given[old.key_B]._replace(shape=new.shape_B)
        return found

    @property
    def size(self) -> int:
        """How many bytes a file of it will have."""
        return file_size(self.stored, self.metadata)

    def new_lost(self) -> Lost:
        """Return the sums that `each` adds to."""
        return Lost(torch.zeros(max(self.rank, self.adapter.max_rank) + 1).double())

    def each(self, lost: Lost, on_layer: OnLayer = None) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """Compute one layer after the other, with its A and B as matrices."""
        with one_thread():
            for given, new in self.layers:
                A, B, own = self.adapter.cut(given, new.rank, new.scale)
                lost.by_rank[: len(own)] += own
                lost.here += float(own[new.rank])
                yield new, A, B
                if on_layer is not None:
                    on_layer()

    def write(self, file: Path, on_layer: OnLayer = None) -> Lost:
        """Write a safetensors file, with one layer in memory at a time."""
        lost = self.new_lost()

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for layer, *factors in self.each(lost, on_layer):
                A, B = layer.tensors(*factors)
                out.put(layer.key_A, A)
                out.put(layer.key_B, B)
                yield A, B

        with TensorWriter(file, self.stored, dict(self.metadata)) as out:
            found = checksum(pairs())
            for key, each in self.others.items():
                out.put(key, each.read())
            if NOTE in out.metadata:
                note = json.loads(out.metadata[NOTE])
                out.metadata[NOTE] = json.dumps({**note, "checksum": found})
        return lost


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: on small matrices its threads cost ten times what they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
