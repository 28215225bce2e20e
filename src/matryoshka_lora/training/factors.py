"""The factors A and B of the LoRA layers of a model, whatever computes these layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import reorder_factors
from matryoshka_lora.progress import single_threaded
from matryoshka_lora.sharding import (
    full_shape,
    gather_parameter,
    is_sharded,
    local_shard,
    write_parameter,
)
from matryoshka_lora.tensors import at_least_float32, to_numpy, to_torch

FactorParameters = dict[str, tuple[Tensor, Tensor]]
"""The parameters A and B of each layer, by the layer's name."""
FactorMatrices = dict[str, tuple[Tensor, Tensor]]
"""A, shape (R, in), and B, shape (out, R), of each layer, by the layer's name."""


class ModelFactors:
    """The factors of the LoRA layers of a model.

    Reordering and training the ranks only read and write these parameters, and call the model. So
    they work with every implementation of LoRA that computes ``B A x`` from them.

    Methods take and return matrices: A, shape (R, in), and B, shape (out, R). The dimensions of a
    kernel are part of ``in``. Of a layer of experts, ``in`` and ``out`` are over all experts.

    Args:
        model: The model, whose forward uses the factors.
        parameters: The parameters A, shape (R, in, ...), and B, shape (out, R, ...), of each layer.
            The additional dimensions are the kernel of a convolution. Of n experts, A has the shape
            (n * R, in), expert by expert, and B (out, R * n), component by component.
        num_experts: The number of experts of the layers that have several.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: FactorParameters,
        num_experts: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.num_experts = num_experts or {}

    @property
    def max_rank(self) -> int:
        """``R``, the rank of the factors."""
        name, (A, _) = next(iter(self.parameters.items()))
        return full_shape(A)[0] // self.num_experts.get(name, 1)

    @property
    def are_sharded(self) -> bool:
        """Whether this process has only a part of the factors."""
        A, _ = next(iter(self.parameters.values()))
        return is_sharded(A)

    def copy(self, rank: int | None = None) -> FactorMatrices:
        """Return copies of A, shape (r, in), and B, shape (out, r), of each layer."""
        matrices: FactorMatrices = {}
        for name, pair in self.parameters.items():
            A, B = self.to_matrices(name, *map(gather_parameter, pair))
            matrices[name] = A[:rank].clone(), B[:, :rank].clone()
        return matrices

    def write(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Overwrite the factors of some layers.

        Args:
            matrices: By layer, A of shape (R, in) and B of shape (out, R), any dtype and device.
        """
        for name, pair in matrices.items():
            values = self.from_matrices(name, *pair)
            for parameter, value in zip(self.parameters[name], values, strict=True):
                write_parameter(parameter, value)

    def to_matrices(self, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return tensors in the shapes of a layer's parameters as matrices of its components."""
        num_experts = self.num_experts.get(name, 1)
        if num_experts == 1:
            return A.flatten(1), B.flatten(1)
        A = A.reshape(num_experts, -1, A.shape[1]).transpose(0, 1)
        B = B.reshape(len(B), -1, num_experts).permute(2, 0, 1)
        return A.flatten(1), B.flatten(0, 1)

    def from_matrices(self, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reverse of `to_matrices`, for any number of components."""
        num_experts = self.num_experts.get(name, 1)
        if num_experts == 1:
            shape_A, shape_B = map(full_shape, self.parameters[name])
            return A.reshape(len(A), *shape_A[1:]), B.reshape(*B.shape, *shape_B[2:])
        A = A.reshape(len(A), num_experts, -1).transpose(0, 1)
        B = B.reshape(num_experts, -1, B.shape[1]).permute(1, 2, 0)
        return A.flatten(0, 1), B.flatten(1)

    def gradients(self, rank: int) -> FactorMatrices:
        """Return the gradients of the first components: zeros in a layer that was not used."""
        gradients: FactorMatrices = {}
        for name, pair in self.trained_parameters().items():
            A, B = self.to_matrices(
                name, *[torch.zeros_like(p) if p.grad is None else p.grad for p in pair]
            )
            gradients[name] = A[:rank], B[:, :rank]
        return gradients

    def trained_parameters(self) -> FactorParameters:
        """Return the tensors that hold the first components while these are trained."""
        return self.parameters

    @torch.no_grad()
    def write_prefix(self, matrices: FactorMatrices) -> None:
        """Overwrite the first components of all layers.

        Args:
            matrices: By layer, A of shape (k, in) and B of shape (out, k), any dtype and device.
        """
        for name, (new_A, new_B) in matrices.items():
            k = len(new_A)
            A, B = self.to_matrices(name, *self.parameters[name])
            A[:k], B[:, :k] = new_A, new_B
            if name in self.num_experts:  # the matrices are copies
                self.write({name: (A, B)})

    @contextmanager
    def restored(self, *, after_errors_only: bool = False) -> Iterator[None]:
        """Restore the factors at the end, and after any exception, including KeyboardInterrupt."""
        shards = [local_shard(factor) for pair in self.parameters.values() for factor in pair]
        originals = [shard.clone() for shard in shards]
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not (is_done and after_errors_only):
                with torch.no_grad():
                    for shard, original in zip(shards, originals, strict=True):
                        shard.copy_(original)

    @contextmanager
    def masked(self, q: Tensor) -> Iterator[None]:
        """Replace each B by ``B diag(q)``.

        With ones followed by zeros, the model computes the prefix of a rank. Where q is 1, the
        gradients of A and B are the gradients of this prefix.

        Args:
            q: Shape (R,), float64.
        """
        originals = {name: B.detach().clone() for name, (_, B) in self.parameters.items()}
        try:
            with torch.no_grad():
                for name, (_, B) in self.parameters.items():
                    # Of experts, each column is repeated for each expert.
                    columns = q.repeat_interleave(self.num_experts.get(name, 1))
                    B.copy_(scale_columns(originals[name], columns))
            yield
        finally:
            with torch.no_grad():
                for name, (_, B) in self.parameters.items():
                    B.copy_(originals[name])

    def reorder(self, q: Float64Array) -> dict[str, Float64Array]:
        """Replace the factors of each layer by the SVD of ``B diag(q) A``; see `reorder_factors`.

        Args:
            q: Shape (R,).

        Returns:
            The singular values of each layer, decreasing, shape (R,). Of experts, the square is the
            sum of the squares over the experts.

        Raises:
            NotFiniteError: A factor is NaN or infinite. Factors of other layers may have changed.
        """
        singular_values: dict[str, Float64Array] = {}
        with single_threaded():
            for name, pair in self.parameters.items():
                matrices = self.to_matrices(name, *map(gather_parameter, pair))
                A, B = map(to_numpy, matrices)
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise NotFiniteError(
                        f"The factors of layer {name} are NaN or infinite: training diverged. "
                        "Train again with a lower learning rate."
                    )
                num_experts = self.num_experts.get(name, 1)
                experts = [
                    reorder_factors(*factors, q)
                    for factors in zip(
                        np.split(A, num_experts, axis=1), np.split(B, num_experts), strict=True
                    )
                ]
                A = np.concatenate([A for A, _, _ in experts], axis=1)
                B = np.concatenate([B for _, B, _ in experts])
                squares = [values**2 for _, _, values in experts]
                singular_values[name] = np.sqrt(np.sum(squares, axis=0))
                self.write({name: (to_torch(A), to_torch(B))})
        return singular_values

    def check_shapes(self) -> None:
        """Raise MatryoshkaError if the factors are pieces of a flat parameter, as FSDP 1's are."""
        for A, _ in self.parameters.values():
            if A.ndim < 2 and not is_sharded(A):
                raise MatryoshkaError(
                    "FSDP 1 has flattened the factors. Use FSDP 2: set `fsdp_version: 2` in the "
                    "fsdp_config. Or let the Trainer save the adapter, and reorder its folder."
                )


def scale_columns(B: Tensor, q: Tensor) -> Tensor:
    """Return ``B diag(q)`` in the dtype of B.

    Args:
        B: Shape (out, R, ...). It may be a DTensor.
        q: Shape (R,), any floating dtype.
    """
    q = at_least_float32(q, B.dtype).to(B.device)
    q = q.view(1, -1, *(1,) * (B.ndim - 2))
    if hasattr(B, "device_mesh"):
        from torch.distributed.tensor import Replicate, distribute_tensor

        q = distribute_tensor(q, B.device_mesh, [Replicate()] * B.device_mesh.ndim)
    return (B * q).to(B.dtype)


def without_wrapper(model: nn.Module) -> Any:
    """Return the model that has the layers, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
