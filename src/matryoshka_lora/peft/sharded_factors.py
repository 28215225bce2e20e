"""Train the first components of factors that are sharded over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.peft.lora_layers import (
    factor_parameters,
    set_small_factors,
    small_factors,
)
from matryoshka_lora.training.factors import FactorMatrices, FactorParameters, ModelFactors


class ShardedFactors(ModelFactors):
    """Factors of a nested adapter of which each process has a part.

    The shards stay as they are. While the first k components are trained, each process has all of
    their values, in the buffers of the small adapter, and the diagonal of the layers selects these
    instead of the first components of the shards. So neither FSDP nor DeepSpeed takes part in the
    gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoraLayer],
        adapter: str,
        use_diagonal: Callable[[Tensor], AbstractContextManager[None]],
    ) -> None:
        parameters = {name: factor_parameters(layer, adapter) for name, layer in layers.items()}
        super().__init__(model, parameters)
        self._layers = layers
        self._adapter = adapter
        self._use_diagonal = use_diagonal
        self._prefix: FactorParameters = {}

    def copy(self, rank: int | None = None) -> FactorMatrices:
        if not self._prefix:
            return super().copy(rank)
        matrices: FactorMatrices = {}
        for name, (A, B) in self._prefix.items():
            A, B = self.to_matrices(name, A.detach(), B.detach())
            matrices[name] = A[:rank].clone(), B[:, :rank].clone()
        return matrices

    def trained_parameters(self) -> FactorParameters:
        return self._prefix

    def write_prefix(self, matrices: FactorMatrices) -> None:
        for name, pair in matrices.items():
            A, B = self.from_matrices(name, *pair)
            like_A, like_B = self.parameters[name]
            A = A.to(like_A.device, like_A.dtype, copy=True).requires_grad_()
            B = B.to(like_B.device, like_B.dtype, copy=True).requires_grad_()
            set_small_factors(self._layers[name], self._adapter, A, B)
            self._prefix[name] = A, B

    @contextmanager
    def masked(self, q: Tensor) -> Iterator[None]:
        if self._prefix:
            A, _ = next(iter(self._prefix.values()))
            k = len(A)
            q = torch.cat([torch.zeros(k, dtype=q.dtype), q[k:], q[:k]])
        with self._use_diagonal(q):
            yield

    @contextmanager
    def restored(self, *, after_errors_only: bool = False) -> Iterator[None]:
        earlier = [(layer, small_factors(layer, self._adapter)) for layer in self._layers.values()]
        with super().restored(after_errors_only=after_errors_only):
            try:
                yield
            finally:
                for layer, pair in earlier:
                    set_small_factors(layer, self._adapter, *pair)
                self._prefix = {}
