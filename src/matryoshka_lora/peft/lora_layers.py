"""PEFT's LoRA layers of an adapter, and their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol, cast

from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.sharding import reshard
from matryoshka_lora.training.factors import ModelFactors


class LoraModule(Protocol):
    """The part of PEFT's ``LoraLayer`` that nesting uses. Mappings are by the adapter's name."""

    base_layer: nn.Linear
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_embedding_A: Mapping[str, nn.Parameter]
    lora_embedding_B: Mapping[str, nn.Parameter]
    lora_dropout: Mapping[str, nn.Module]
    lora_variant: MutableMapping[str, LoraVariant]
    r: Mapping[str, int]
    scaling: Mapping[str, float]
    training: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    num_experts: int
    forward: Callable[..., Tensor]
    _state_dict_hooks: Mapping[int, object]

    def get_base_layer(self) -> nn.Module:
        """Return the base layer, without wrappers."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``s B A`` in the shape of the base layer's weight."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool) -> None:
        """See ``torch.nn.Module``."""

    def register_state_dict_post_hook(self, hook: Callable[..., None]) -> None:
        """See ``torch.nn.Module``."""

    def register_load_state_dict_pre_hook(self, hook: Callable[..., None]) -> object:
        """See ``torch.nn.Module``."""


class EmbeddingModule(LoraModule, Protocol):
    """The part of PEFT's ``Embedding`` that nesting uses in addition."""

    def _embed(self, input: Tensor, weight: Tensor) -> Tensor: ...

    def _get_embed_scale(self) -> Tensor | None: ...


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraModule]]:
    """Yield the LoRA layers of an adapter with their names in the base model."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_A or adapter in module.lora_embedding_A:
            yield name.removeprefix(PEFT_PREFIX), cast(LoraModule, module)


def model_factors(model: nn.Module, layers: Mapping[str, LoraModule], adapter: str) -> ModelFactors:
    """Return the factors of an adapter's layers, by the names of the layers.

    Raises:
        MatryoshkaError: FSDP 1 has flattened them.
    """
    reshard(model)
    parameters = {name: factor_parameters(layer, adapter) for name, layer in layers.items()}
    num_experts = {
        name: layer.num_experts
        for name, layer in layers.items()
        if getattr(layer, "num_experts", 1) > 1
    }
    factors = ModelFactors(model, parameters, num_experts)
    factors.check_shapes()
    return factors


def check_not_padded(name: str, module: LoraModule, adapter: str) -> None:
    """Raise MatryoshkaError if PEFT has padded the factors of a layer to another rank."""
    if adapter not in module.lora_A:
        return  # embeddings are not padded
    lora_A: Any = module.lora_A[adapter]
    # Sharding changes the shape of the weight.
    rank = lora_A.out_channels if hasattr(lora_A, "out_channels") else lora_A.out_features
    rank //= getattr(module, "num_experts", 1)
    if rank != module.r[adapter]:
        raise MatryoshkaError(
            f"The factors of layer {name} are padded from rank {module.r[adapter]} to {rank}, as "
            "by prepare_model_for_compiled_hotswap(). Use the adapter before that call: reorder, "
            "train and save it; or create it with this rank, so that it needs no padding."
        )


def set_small_factors(module: LoraModule, adapter: str, A: Tensor | None, B: Tensor | None) -> None:
    """Store the factors of the small adapter of a layer, in PEFT's own layout; None removes them.

    They are buffers, so they follow the layer to another device or dtype. They are not persistent,
    so PEFT's state dicts do not change.
    """
    for factor, values in zip("AB", (A, B), strict=True):
        module.register_buffer(f"small_{factor}_{adapter}", values, persistent=False)


def small_factors(module: LoraModule, adapter: str) -> tuple[Any, Any]:
    """Return A and B of the small adapter of a layer, in PEFT's own layout, or two times None."""
    names = f"small_A_{adapter}", f"small_B_{adapter}"
    return getattr(module, names[0], None), getattr(module, names[1], None)


def factor_parameters(module: LoraModule, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the parameters A and B of an adapter in a LoRA layer, in PEFT's own layout."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight
