"""Two of PEFT's layers ignore variants in one of their paths; these subclasses close the gap.

`nest` makes an existing layer an instance of the subclass, as torch's own parametrizations do. A layer without a nested
adapter behaves as before.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor

from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError


class NestedParamWrapper(ParamWrapper):
    """LoRA on a bare parameter, such as a stack of experts: its delta is the only place where p can stand."""

    _merging = False

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        variant = self.lora_variant.get(adapter_name)
        if not isinstance(variant, NestedVariant):
            delta: Tensor = super().get_delta_weight(adapter_name, *args, **kwargs)
            return delta
        gate = variant.deployed if self._merging else variant.gate(self.training)
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
        gate = variant.gate(self.training)
        if gate.diagonal.ndim > 1:
            self.get_delta_weight(adapter_name)  # raises the reason
        left, right, _ = factors
        diagonal = gate.diagonal if gate.scale is None else gate.diagonal * gate.scale
        return left * diagonal.to(left.device, left.dtype), right, variant.ratio(self, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self._merging = True
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._merging = False

    def unmerge(self) -> None:
        self._merging = True
        try:
            super().unmerge()
        finally:
            self._merging = False


class NestedEmbedding(Embedding):
    """LoRA on an embedding, whose batches of mixed adapters would apply the raw factors."""

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        nested = [name for name in adapter_names if isinstance(self.lora_variant.get(name), NestedVariant)]
        if nested:
            raise MatryoshkaError(
                f"PEFT applies no LoRA variant to an embedding in a batch of mixed adapters, and adapter {nested[0]!r} "
                "is nested on one: export the rank that you need and load it as an ordinary adapter"
            )
        result: Tensor = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return result


SUBCLASSES: dict[type, type] = {ParamWrapper: NestedParamWrapper, Embedding: NestedEmbedding}
