"""PEFT's layers, and its model, where the slot for variants is not enough.

Two layers ignore variants in one of their paths. For the third, a linear layer in training, the variant would come too
late: the base layer's product and the update are one operation in `matryoshka_lora.ops`. The model combines adapters by
their factors.

`nest` makes an existing object an instance of the subclass, as torch's own parametrizations do. Without a nested
adapter it behaves as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.adapter.gate import RowCount
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.ops import full_precision, low_rank_linear, low_rank_linear_reference
from matryoshka_lora.unofficial import has_hooks

T = TypeVar("T", bound=type)


def _named_as_its_base(kind: T) -> T:
    """PEFT and what prints its models know some classes by their names."""
    kind.__name__ = kind.__mro__[1].__name__
    return kind


@_named_as_its_base
class NestedParamWrapper(ParamWrapper):
    """LoRA on a bare parameter, such as a stack of experts: its delta is the only place where p can stand."""

    _merging = _unmerging = False

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        variant = self.lora_variant.get(adapter_name)
        if not isinstance(variant, NestedVariant):
            delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
            return delta
        if self._merging or self._unmerging:
            return variant.merged_delta(self, adapter_name, again=self._unmerging).to(self.get_param().dtype)
        gate = variant.checked_gate(self, self.get_param().device)
        if gate.diagonal.ndim > 1:
            raise MatryoshkaError(
                f"{self.parameter_name!r} is a parameter that all rows share (target_parameters): it cannot have a "
                "rank per row. Use one rank for the whole batch, and a rule other than 'stratified'"
            )
        return variant.delta(self, adapter_name, gate).to(self.get_param().dtype)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        factors: tuple[Tensor, Tensor, float] = super().get_delta_factors(adapter_name)
        variant = self.lora_variant.get(adapter_name)
        if not isinstance(variant, NestedVariant):
            return factors
        gate = variant.checked_gate(self, self.get_param().device)
        if gate.diagonal.ndim > 1:
            self.get_delta_weight(adapter_name)  # raises the reason
        left, right, _ = factors
        scale = variant.ratio(self, adapter_name) * (1.0 if gate.scale is None else gate.scale.item())
        return (left * full_precision(gate.diagonal, left.dtype)).to(left.dtype), right, scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self._merging = True
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._merging = False

    def unmerge(self) -> None:
        self._unmerging = True
        try:
            super().unmerge()
        finally:
            self._unmerging = False


@_named_as_its_base
class NestedEmbedding(Embedding):
    """LoRA on an embedding, whose batches of mixed adapters would apply the raw factors."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        _check_read(self, adapter)
        delta: Tensor = super().get_delta_weight(adapter)
        return delta

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        nested = {name: self.lora_variant.get(name) for name in adapter_names}
        nested = {name: variant for name, variant in nested.items() if isinstance(variant, NestedVariant)}
        others = ["__base__" if name in nested else name for name in adapter_names]
        result: Tensor = super()._mixed_batch_forward(x, *args, adapter_names=others, **kwargs)
        for name, variant in nested.items():
            rows = [row for row, given in enumerate(adapter_names) if given == name]
            result[rows] = variant.forward(self, name, x[rows], result[rows]).to(result.dtype)
        return result


@_named_as_its_base
class NestedLinear(Linear):
    """LoRA on a linear layer: trains in one fused operation where nothing stands in its way.

    Elsewhere (quantised or sharded weights, autocast, several active adapters, dropout, hooks, eval mode unless its
    rows need not be exact) PEFT's own forward runs, with the variant.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In training mode with gradients or without: TRL compares the two, and they must be the same to the last bit.
        if args or kwargs:
            return self._by_variant(x, *args, **kwargs)
        variant = self._fusable_variant(x)
        if variant is None or (not self.training and variant.gate(training=False).exact):
            return self._by_variant(x)
        (adapter,) = self.active_adapters
        gate = variant.checked_gate(self, x.device, x)
        # A compiler fuses the plain formula, and chooses what to save, by itself.
        update = low_rank_linear_reference if torch.compiler.is_compiling() else low_rank_linear
        return update(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            gate.for_rows(x.shape) * self._factor(variant, gate, adapter),
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        _check_read(self, adapter)
        delta: Tensor = super().get_delta_weight(adapter)
        return delta

    def _by_variant(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _factor(self, variant: NestedVariant, gate: Any, adapter: str) -> Tensor | float:
        ratio = variant.ratio(self, adapter)
        return ratio if gate.scale is None else gate.scale * ratio

    def _fusable_variant(self, x: Tensor) -> NestedVariant | None:
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if self.disable_adapters or self.merged or autocast:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        variant = self.lora_variant.get(active[0]) if len(self.active_adapters) == len(active) == 1 else None
        if not isinstance(variant, NestedVariant) or variant.gate(self.training).learn is not None:
            return None
        base, A, B = self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]]
        if self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity):
            return None
        plain = type(base) is nn.Linear and all(_is_plain(module) for module in (base, A, B))
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        fits = base.weight.dtype == x.dtype and len(A.weight) == variant.state.nesting.max_rank
        return variant if plain and frozen and fits else None


def _is_plain(module: Any) -> bool:
    """Ordinary tensors on no hooks: a sharded module gathers its weights in hooks, or holds DTensors."""
    return not has_hooks(module) and "forward" not in vars(module) and type(module.weight) is nn.Parameter


def _check_read(module: LoraLayer, adapter: str) -> None:
    """Refuse PEFT's functions that take the product of the factors for the adapter, where it is not."""
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, NestedVariant) and not variant.is_plain():
        raise MatryoshkaError(
            f"PEFT would read adapter {adapter!r} at rank {variant.state.nesting.max_rank}, without its diagonal, and "
            f"it is used otherwise (rank {variant.rank}): export the rank that "
            "you need with adapter.export() and load that with PEFT"
        )


@_named_as_its_base
class NestedLoraModel(LoraModel):
    """PEFT's LoRA model, whose sums of adapters would be of the raw factors.

    Attributes:
        row_count: Its hooks leave the base model with the adapters.
    """

    row_count: RowCount

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        self._check_mergeable(adapter_names)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        self.row_count.remove()
        return merged

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        """PEFT goes from layer to layer: at the one that refuses, others would be merged, or gone."""
        for module in self.modules():
            if isinstance(module, LoraLayer):
                for name in set(module.active_adapters if adapter_names is None else adapter_names):
                    variant = module.lora_variant.get(name)
                    if isinstance(variant, NestedVariant) and name not in module.merged_adapters:
                        variant.check_mergeable(module)

    def unload(self) -> nn.Module:
        base: nn.Module = super().unload()
        self.row_count.remove()
        return base

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for module in self.modules():
            for variant in module.lora_variant.values() if isinstance(module, LoraLayer) else ():
                if isinstance(variant, NestedVariant):
                    variant.apart.discard(adapter_name)  # the next one of this name may be a copy

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        with _as_plain(self, adapters):
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)


@contextmanager
def _as_plain(model: LoraModel, adapters: Sequence[str]) -> Iterator[None]:
    """A context in which the nested ones of some adapters are ordinary ones that compute the same in eval mode."""
    # PEFT itself refuses bare parameters.
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not isinstance(m, ParamWrapper)]
    found = [(module, name, module.lora_variant.get(name)) for module in layers for name in dict.fromkeys(adapters)]
    nested = [(module, name, variant) for module, name, variant in found if isinstance(variant, NestedVariant)]
    factors = [get_parameters(module, name) for module, name, _ in nested]
    before = [(A.data, B.data, module.scaling[name]) for (A, B), (module, name, _) in zip(factors, nested, strict=True)]
    configs = {name: model.peft_config[name] for _, name, _ in nested}
    try:
        for (A, B), (module, name, variant) in zip(factors, nested, strict=True):
            A.data, B.data, module.scaling[name] = variant.exported(module, name)
            del module.lora_variant[name]
        for name, config in configs.items():
            # PEFT copies the first one's config and means the result to have the scale 1: alpha / r, not rsLoRA's.
            model.peft_config[name] = replace(config, use_rslora=False)
        yield
    finally:
        for (A, B), (module, name, variant), old in zip(factors, nested, before, strict=True):
            module.lora_variant[name] = variant
            A.data, B.data, module.scaling[name] = old
        model.peft_config.update(configs)


SUBCLASSES: dict[type, type] = {
    Linear: NestedLinear,
    ParamWrapper: NestedParamWrapper,
    Embedding: NestedEmbedding,
    LoraModel: NestedLoraModel,
}
