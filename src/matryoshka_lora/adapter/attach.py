"""Attach a nesting to a PEFT LoRA adapter, or say why that cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.adapter.gates import begin, lora_layers, nested_layers
from matryoshka_lora.adapter.layers import SUBCLASSES
from matryoshka_lora.adapter.copies import COPIES, nest_copies
from matryoshka_lora.adapter.saving import with_our_files
from matryoshka_lora.adapter.variant import PLACES, Gate, NestedVariant, check_rows_apart
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import check_config
from matryoshka_lora.rules import Rule
from matryoshka_lora.state import State

# By exact class: PEFT's other layers ignore a variant in forward (AWQ, AQLM, EETQ, Megatron, ...) or in merge (torchao,
# INC), and a subclass may do anything. By name, because importing PEFT's bitsandbytes layers imports bitsandbytes.
_SUPPORTED = {
    *(
        f"peft.tuners.lora.layer.{name}"
        for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")
    ),
    *(f"peft.tuners.lora.bnb.{name}" for name in ("Linear4bit", "Linear8bitLt")),
    *(f"{kind.__module__}.{kind.__name__}" for kind in SUBCLASSES.values()),
}

def attach(model: PeftModel, state: State, adapter: str) -> None:
    """Put a `NestedVariant` into every LoRA layer of an adapter, then make sure that each kind of layer obeys it.

    Raises:
        MatryoshkaError: Something about the model or the adapter cannot be nested. The model is left as it was.
    """
    layers = _checked_layers(model, state, adapter)
    before = [(module, type(module), module.lora_variant.get(adapter)) for _, module in layers]
    try:
        for _, module in layers:
            module.__class__ = SUBCLASSES.get(type(module), type(module))
            module.lora_variant[adapter] = NestedVariant(state, module, adapter)
        probed: set[tuple[type, type]] = set()
        for name, module in layers:
            kind = (type(module), type(module.get_base_layer()))
            if kind not in probed:
                probed.add(kind)
                _probe(name, module, adapter)
        begin(model, adapter)
        model.__class__ = with_our_files(type(model))
    except BaseException:
        for module, original, variant in before:
            module.__class__ = original
            module.lora_variant.pop(adapter, None)
            if variant is not None:
                module.lora_variant[adapter] = variant
        raise
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def _before_forward(model: PeftModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if model.active_adapter in COPIES:
        for adapter in list(model.peft_config):
            nest_copies(model, adapter)
    if model.training and any(kwargs.get(name) is not None for name in PLACES):
        _check_rows(model, kwargs)


def _check_rows(model: PeftModel, inputs: Mapping[str, Any]) -> None:
    for _, _, variant in nested_layers(model, model.active_adapter):
        if variant.state.per_row and len(variant.gate(True).diagonal) > 1:
            check_rows_apart(inputs, variant.state.rule.name)
        return


def _checked_layers(model: Any, state: State, adapter: str) -> list[tuple[str, Any]]:
    config = check_config(model.peft_config[adapter].to_dict(), f"adapter {adapter!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        if config[field]:
            raise MatryoshkaError(f"{field} gives layers ranks or scales of their own: remove it, then use set_rank")
    if config.r != state.nesting.max_rank:
        raise MatryoshkaError(
            f"LoraConfig has r={config.r}, and the largest nested rank is {state.nesting.max_rank}: end the ranks with "
            f"{config.r}, or write LoraConfig(r={state.nesting.max_rank}, ...)"
        )
    layers = list(lora_layers(model, adapter))
    if not layers:
        raise MatryoshkaError(f"adapter {adapter!r} has no LoRA layer in this model")
    seen: dict[int, str] = {}
    for name, module in layers:
        reason = _why_not(module, state.rule, adapter, name)
        shared = seen.setdefault(id(get_parameters(module, adapter)[0]), name)
        if shared != name:
            reason = f"it shares its factors with layer {shared}"
        if reason:
            raise MatryoshkaError(f"layer {name} cannot be nested: {reason}")
    return layers


def _why_not(module: Any, rule: Rule, adapter: str, name: str) -> str | None:
    variant = module.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, NestedVariant):
        return f"{type(variant).__name__} (DoRA or another LoRA variant) holds PEFT's only slot for variants"
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind not in _SUPPORTED:
        return (
            f"{kind} takes no LoRA variant in all its paths; the kinds "
            "that work are Linear, Embedding, convolutions, bitsandbytes 4-bit and 8-bit, and target_parameters"
        )
    if module.merged:
        return "an adapter is merged into it: call unmerge_adapter() first"
    parameters = get_parameters(module, adapter)
    if any(p.is_meta for p in parameters):
        return "its adapter has no data yet (device meta): load the weights first"
    if getattr(module.get_base_layer(), "groups", 1) > 1:
        return "a grouped convolution ties columns of B to groups of outputs, so no prefix of columns is an adapter"
    dilated = any(d != 1 for d in getattr(module.get_base_layer(), "dilation", ()))
    if dilated or getattr(module.get_base_layer(), "padding_mode", "zeros") != "zeros":
        return "PEFT's A follows neither the dilation nor the padding mode of a convolution"
    if isinstance(module, lora.ParamWrapper) and (rule.per_row or rule.name == "dylora-frozen"):
        return f"target_parameters give one delta to all rows and all columns; rule {rule.name!r} needs them apart"
    if rule.per_row and ".experts." in f".{name}.":
        return f"tokens that are routed to experts have left their rows; rule {rule.name!r} needs them"
    return None


def _probe(name: str, module: Any, adapter: str) -> None:
    """See by behaviour that the layer obeys its diagonal: NaN must reach the output, and zeros must leave the base's.

    NaN shows it even while B is all zeros, so no weight is touched.
    """
    variant: NestedVariant = module.lora_variant[adapter]
    rank = variant.state.nesting.max_rank
    active, disabled = module._active_adapter, module._disable_adapters
    module._active_adapter, module._disable_adapters = [adapter], False
    try:
        with torch.no_grad():
            variant.override = Gate.on(variant.device, torch.full((rank,), math.nan))
            obeys = bool(_output(module, adapter).isnan().all())
            variant.override = Gate.on(variant.device, torch.zeros(rank))
            obeys = obeys and torch.equal(*_with_and_without(module, adapter))
    finally:
        variant.override = None
        module._active_adapter, module._disable_adapters = active, disabled
    if not obeys:
        raise MatryoshkaError(
            f"layer {name} ({type(module).__name__} on {type(module.get_base_layer()).__name__}) does not obey a LoRA "
            "variant in this version of PEFT: leave it out of target_modules"
        )


def _output(module: Any, adapter: str) -> Tensor:
    if isinstance(module, lora.ParamWrapper):  # its forward takes whatever its module takes; p only enters the delta
        delta: Tensor = module.get_delta_weight(adapter)
        if module.num_experts > 1 and hasattr(lora.ParamWrapper, "get_delta_factors"):
            left, right, scale = module.get_delta_factors(adapter)
            delta = delta + left @ right * scale
        return delta
    output: Tensor = module(_sample(module, adapter))
    return output


def _with_and_without(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    output = _output(module, adapter)
    if isinstance(module, lora.ParamWrapper):
        return output, torch.zeros_like(output)
    return output, module.base_layer(_sample(module, adapter))


def _sample(module: Any, adapter: str) -> Tensor:
    """The smallest input that the layer takes."""
    base = module.get_base_layer()
    device = get_parameters(module, adapter)[0].device
    if isinstance(module, lora.Embedding):
        return torch.zeros(1, 1, dtype=torch.long, device=device)
    weight = base.weight
    dtype = weight.dtype if weight.is_floating_point() else getattr(base, "compute_dtype", None) or torch.float32
    if isinstance(module, lora._ConvNd):
        size = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.ones(1, base.in_channels, *size, dtype=dtype, device=device)
    # With a gradient, because bitsandbytes repacks 4-bit weights for a CPU at the first input without one.
    return torch.ones(1, 1, module.in_features, dtype=dtype, device=device).requires_grad_()
