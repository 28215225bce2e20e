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

    def copy(self) -> FactorMatrices:
        """Return copies of A, shape (R, in), and B, shape (out, R), of each layer."""
        return {
            name: (A.detach().flatten(1).clone(), B.detach().flatten(1).clone())
            for name, (A, B) in self.parameters.items()
        }

    @torch.no_grad()
    def write(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Overwrite the factors of some layers.

        Args:
            matrices: By layer, A of shape (R, in) and B of shape (out, R), any dtype and device.
        """
        for name, (new_A, new_B) in matrices.items():
            A, B = self.parameters[name]
            A.copy_(new_A.reshape(A.shape))
            B.copy_(new_B.reshape(B.shape))

    @contextmanager
    def restored_after_error(self) -> Iterator[None]:
        """Restore the factors after any exception, including KeyboardInterrupt."""
        matrices = self.copy()
        try:
            yield
        except BaseException:
            self.write(matrices)
            raise

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

    def svd(self, q: Float64Array) -> tuple[FactorMatrices, dict[str, Float64Array]]:
        """Return the SVD of ``B diag(q) A`` of each layer as new factors; see `reorder_factors`.

        Args:
            q: Shape (R,).

        Returns:
            The new factors, on the CPU in the dtype of the old ones, and the singular values of
            each layer, decreasing, shape (R,).

        Raises:
            NotFiniteError: A factor is NaN or infinite.
        """
        matrices: FactorMatrices = {}
        singular_values: dict[str, Float64Array] = {}
        with single_threaded():
            for name, parameters in self.parameters.items():
                A, B = [to_numpy(parameter.flatten(1)) for parameter in parameters]
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise NotFiniteError(
                        f"The factors of layer {name} are NaN or infinite: training diverged. "
                        "Train again with a lower learning rate."
                    )
                A, B, singular_values[name] = reorder_factors(A, B, q)
                matrices[name] = to_torch(A), to_torch(B)
        return matrices, singular_values

    def check_not_sharded(self) -> None:
        """Raise MatryoshkaError if this process has only a part of the factors."""
        for A, _ in self.parameters.values():
            if hasattr(A, "device_mesh"):
                raise MatryoshkaError(
                    "The factors are sharded over processes. Let the Trainer save the adapter, "
                    "then reorder its folder in one process."
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
