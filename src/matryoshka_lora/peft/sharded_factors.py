"""Train the first components of factors that are sharded over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from matryoshka_lora.peft.lora_layers import (
    LoraModule,
    factor_parameters,
    set_small_factors,
    small_factors,
)
from matryoshka_lora.sharding import full_shape
from matryoshka_lora.training.factors import FactorMatrices, FactorParameters, ModelFactors


class ShardedFactors(ModelFactors):
    """Factors of a nested adapter of which each process has a part.

    The shards stay as they are. While the first k components are trained, each process has all of
    their values, in the buffers of the small adapter, and the diagonal of the layers selects these
    instead of the first components of the shards. So neither FSDP nor DeepSpeed takes part in the
    gradients.

    Args:
        model: The model.
        layers: Its LoRA layers, by name.
        adapter: PEFT's name of the adapter.
        use_diagonal: `NestedAdapter.use_diagonal`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoraModule],
        adapter: str,
        use_diagonal: Callable[[Tensor], AbstractContextManager[None]],
    ) -> None:
        parameters = {name: factor_parameters(layer, adapter) for name, layer in layers.items()}
        super().__init__(model, parameters)
        self._layers = layers
        self._adapter = adapter
        self._use_diagonal = use_diagonal
        self._prefix: FactorParameters = {}

    @property
    def max_rank(self) -> int:
        A, _ = next(iter(self.parameters.values()))
        return full_shape(A)[0]

    def copy(self, rank: int | None = None) -> FactorMatrices:
        if not self._prefix:
            return super().copy(rank)
        return {
            name: (A.detach()[:rank].flatten(1).clone(), B.detach()[:, :rank].flatten(1).clone())
            for name, (A, B) in self._prefix.items()
        }

    def trained_parameters(self) -> FactorParameters:
        return self._prefix

    def write_prefix(self, matrices: FactorMatrices) -> None:
        for name, (new_A, new_B) in matrices.items():
            A, B = self.parameters[name]
            k = len(new_A)
            shape_A, shape_B = (k, *full_shape(A)[1:]), (len(new_B), k, *full_shape(B)[2:])
            pair = (
                new_A.to(A.device, A.dtype).reshape(shape_A).clone().requires_grad_(),
                new_B.to(B.device, B.dtype).reshape(shape_B).clone().requires_grad_(),
            )
            set_small_factors(self._layers[name], self._adapter, *pair)
            self._prefix[name] = pair

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
