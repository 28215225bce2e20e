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
from matryoshka_lora.sharding import gather_parameter, is_sharded, local_shard, write_parameter
from matryoshka_lora.tensors import at_least_float32, to_numpy, to_torch

FactorParameters = dict[str, tuple[Tensor, Tensor]]
"""The parameters A and B of each layer, by the layer's name."""
FactorMatrices = dict[str, tuple[Tensor, Tensor]]
"""A, shape (R, in), and B, shape (out, R), of each layer, by the layer's name."""


class ModelFactors:
    """The factors of the LoRA layers of a model.

    Reordering and training the ranks only read and write these parameters, and call the model. So
    they work with every implementation of LoRA that computes ``B A x`` from them.

    Args:
        model: The model, whose forward uses the factors.
        parameters: The parameters A, shape (R, in, ...), and B, shape (out, R, ...), of each layer.
            The additional dimensions are the kernel of a convolution.
    """

    def __init__(self, model: nn.Module, parameters: FactorParameters) -> None:
        self.model = model
        self.parameters = parameters

    @property
    def max_rank(self) -> int:
        """``R``, the rank of the factors."""
        A, _ = next(iter(self.parameters.values()))
        return len(A)

    @property
    def are_sharded(self) -> bool:
        """Whether this process has only a part of the factors."""
        A, _ = next(iter(self.parameters.values()))
        return is_sharded(A)

    def copy(self, rank: int | None = None) -> FactorMatrices:
        """Return copies of A, shape (r, in), and B, shape (out, r), of each layer.

        Args:
            rank: The number of components, r. Defaults to R.
        """
        return {
            name: (
                gather_parameter(A)[:rank].flatten(1).clone(),
                gather_parameter(B)[:, :rank].flatten(1).clone(),
            )
            for name, (A, B) in self.parameters.items()
        }

    def write(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Overwrite the factors of some layers.

        Args:
            matrices: By layer, A of shape (R, in) and B of shape (out, R), any dtype and device.
        """
        for name, pair in matrices.items():
            for parameter, values in zip(self.parameters[name], pair, strict=True):
                write_parameter(parameter, values)

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
            A, B = self.parameters[name]
            k = len(new_A)
            A[:k].copy_(new_A.reshape(k, *A.shape[1:]))
            B[:, :k].copy_(new_B.reshape(len(B), k, *B.shape[2:]))

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
        all_B = [B for _, B in self.parameters.values()]
        originals = [B.detach().clone() for B in all_B]
        try:
            with torch.no_grad():
                for B, original in zip(all_B, originals, strict=True):
                    B.copy_(scale_columns(original, q))
            yield
        finally:
            with torch.no_grad():
                for B, original in zip(all_B, originals, strict=True):
                    B.copy_(original)

    def reorder(self, q: Float64Array) -> dict[str, Float64Array]:
        """Replace the factors of each layer by the SVD of ``B diag(q) A``; see `reorder_factors`.

        Args:
            q: Shape (R,).

        Returns:
            The singular values of each layer, decreasing, shape (R,).

        Raises:
            NotFiniteError: A factor is NaN or infinite. Factors of other layers may have changed.
        """
        singular_values: dict[str, Float64Array] = {}
        with single_threaded():
            for name, parameters in self.parameters.items():
                A, B = [to_numpy(gather_parameter(factor).flatten(1)) for factor in parameters]
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise NotFiniteError(
                        f"The factors of layer {name} are NaN or infinite: training diverged. "
                        "Train again with a lower learning rate."
                    )
                A, B, singular_values[name] = reorder_factors(A, B, q)
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
