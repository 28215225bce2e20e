"""Attach a nesting to a PEFT LoRA adapter, or say why that cannot work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as lora
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_parameters, get_weight, has_adapter
from matryoshka_lora.adapter.layers import SUBCLASSES
from matryoshka_lora.adapter.rows import PLACES, RowCount, check_rows_apart
from matryoshka_lora.adapter.slicing import factor_keys
from matryoshka_lora.adapter.state import Inference, NestedState
from matryoshka_lora.adapter.variant import Gate, NestedVariant
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.rules import Rule

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

# These start from factors that are only right when p is the constant s_R.
INITS_THAT_ASSUME_A_SCALE = ("pissa", "corda", "olora", "lora_ga", "loftq")

COPIES = ("ref", "teacher")
"""What TRL names a copy of the adapter that it trains: as it was before training, and its moving average."""


def nested_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The LoRA layers that hold an adapter, by their names in the base model."""
    for name, module in model.named_modules():
        if has_adapter(module, adapter):
            yield name.removeprefix("base_model.model."), module


def attach(model: PeftModel, state: NestedState, adapter: str) -> None:
    """Put a `NestedVariant` into every LoRA layer of an adapter, then make sure that each kind of layer obeys it.

    Raises:
        MatryoshkaError: Something about the model or the adapter cannot be nested. The model is left as it was.
    """
    layers = _checked_layers(model, state, adapter)
    scale = _initial_scale(model.peft_config[adapter])
    before = [(module, module.lora_variant.get(adapter)) for _, module in layers]
    classes = [(module, type(module)) for module in (model.base_model, *(module for _, module in layers))]
    counted = vars(model.base_model).get("row_count")
    rows = RowCount(model) if counted is None else counted
    try:
        for module, own in classes:
            module.__class__ = SUBCLASSES.get(own, own)
        model.base_model.row_count = rows
        for _, module in layers:
            module.lora_variant[adapter] = NestedVariant(state, module, adapter, scale, rows)
        _find_sharing(model, layers, adapter)
        probed: set[tuple[type, type]] = set()
        for name, module in layers:
            kind = (type(module), type(module.get_base_layer()))
            if kind not in probed:
                probed.add(kind)
                _probe(name, module, adapter)
    except BaseException:
        for module, own in classes:
            module.__class__ = own
        for module, variant in before:
            module.lora_variant.pop(adapter, None)
            if variant is not None:
                module.lora_variant[adapter] = variant
        if counted is None:
            rows.remove()
            vars(model.base_model).pop("row_count", None)
        raise
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def nest_copies(model: PeftModel, adapter: str) -> dict[str, NestedState]:
    """Nest the copies that TRL keeps of a nested adapter, as far as they are not, and return their states by name.

    DPO, KTO, GRPO and RLOO measure how far training has gone from adapter "ref"; SDFT and SDPO learn from "teacher".
    TRL adds both by the nested adapter's own config and fills in its factors. Without p between them, they would be
    another function than what they are copies of.
    """
    config = model.peft_config[adapter]
    states: dict[str, NestedState] = {}
    for name in COPIES:
        if name == adapter or model.peft_config.get(name) != config:
            continue
        for _, module in nested_layers(model, name):
            original, copy = module.lora_variant.get(adapter), module.lora_variant.get(name)
            if copy is None and isinstance(original, NestedVariant):
                # A state of their own, since the adapter may be reordered and its copies are not.
                copy = original.copied(states.get(name) or replace(original.state), module, name)
                module.lora_variant[name] = copy
            if isinstance(copy, NestedVariant):
                states[name] = copy.state
    return states


def _before_forward(model: PeftModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if model.active_adapter in COPIES:
        for adapter in list(model.peft_config):
            nest_copies(model, adapter)
    if model.training and any(kwargs.get(name) is not None for name in PLACES):
        _check_rows(model, kwargs)


def _check_rows(model: PeftModel, inputs: Mapping[str, Any]) -> None:
    for _, module in nested_layers(model, model.active_adapter):
        variant = module.lora_variant.get(model.active_adapter)
        if isinstance(variant, NestedVariant) and variant.state.per_row and len(variant.gate(True).diagonal) > 1:
            check_rows_apart(inputs, variant.state.rule.name)
        return


def _find_sharing(model: PeftModel, layers: list[tuple[str, Any]], adapter: str) -> None:
    """Tell each variant which other modules have its layer's base weight, as tied embeddings and shared blocks do."""
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.get_base_model().named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[name.replace(".base_layer", "")] = module
    for name, module in layers:
        others = dict(owners.get(id(get_weight(module)), {}))
        others.pop(name.replace(".base_layer", ""), None)
        module.lora_variant[adapter].sharing = others


def check_config(config: Any, state: NestedState) -> None:
    """Whether a PEFT config and a nesting describe the same adapter.

    Raises:
        MatryoshkaError: They contradict each other, or the config asks for something that cannot be nested.
    """
    nesting = state.nesting
    if state.inference not in get_args(Inference):
        raise MatryoshkaError(f"inference is {state.inference!r}; write 'prefix' or 'keep'")
    if state.inference == "keep" and not state.rule.fixed:
        raise MatryoshkaError(f"rule {state.rule.name!r} has no fixed diagonal to keep: write inference='prefix'")
    if type(config) is not LoraConfig:
        raise MatryoshkaError(f"only a LoRA adapter can be nested, not {type(config).__name__}: use peft.LoraConfig")
    if type(config.r) is not int or type(config.lora_alpha) not in (int, float):
        raise MatryoshkaError(
            f"LoraConfig's r={config.r!r} and lora_alpha={config.lora_alpha!r} must be an integer and a number: write "
            f"LoraConfig(r={nesting.max_rank}, lora_alpha={nesting.lora_alpha:g})"
        )
    if config.r != nesting.max_rank:
        raise MatryoshkaError(
            f"LoraConfig says r={config.r}, but the largest nested rank is {nesting.max_rank}: columns beyond it would "
            f"never be trained. Write LoraConfig(r={nesting.max_rank}, ...) or end the ranks with {config.r}"
        )
    scale = _initial_scale(config)
    if not math.isclose(scale, nesting.scale(nesting.max_rank), rel_tol=1e-9):
        raise MatryoshkaError(
            f"LoraConfig's lora_alpha={config.lora_alpha:g} and use_rslora={config.use_rslora} scale the adapter by "
            f"{scale:g}, but the nesting's scale at rank {config.r} is {nesting.scale(config.r):g}. Write "
            f"LoraConfig(r={config.r}, lora_alpha={nesting.lora_alpha:g}), or {_suggest(config)}"
        )
    if any(str(key).removeprefix(r".*\.") in (config.target_parameters or ()) for key in config.rank_pattern or ()):
        raise MatryoshkaError(
            "PEFT takes 'all-linear', and names such as gate_proj, up_proj and w1, for this model's routed experts, "
            "which transformers 5 has stacked, and gives some of them twice the rank. Name the other layers in "
            "target_modules, as in ['q_proj', 'v_proj'], and the experts in target_parameters, as in "
            "['experts.gate_up_proj']"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(config, field, None):
            raise MatryoshkaError(f"{field} gives layers ranks or scales of their own: remove it, then use set_rank")
    if getattr(config, "layer_replication", None):
        raise MatryoshkaError(
            "layer_replication is not supported: replicate the layers in the base model, then leave it out"
        )
    if config.bias not in ("none", "all", "lora_only"):
        raise MatryoshkaError(f"bias is {config.bias!r}; write 'none', 'all' or 'lora_only'")
    if config.lora_bias:
        raise MatryoshkaError("lora_bias=True adds a bias that belongs to no rank: set it to False")
    if getattr(config, "ensure_weight_tying", False):
        raise MatryoshkaError(
            "ensure_weight_tying shares factors between layers, which cannot be reordered: turn it off"
        )
    init = str(config.init_lora_weights)
    if init.startswith(INITS_THAT_ASSUME_A_SCALE):
        raise MatryoshkaError(f"init_lora_weights={init!r} assumes plain LoRA's scale: use True or 'gaussian'")


def trained_besides(config: LoraConfig) -> list[str]:
    """The fields of a config by which parts of the base model are trained whole, beside the factors."""
    fields = [field for field in ("modules_to_save", "trainable_token_indices") if getattr(config, field)]
    return fields if config.bias == "none" else [*fields, "bias"]


def _initial_scale(config: Any) -> float:
    """What PEFT multiplies an adapter by before `scale_layer` and its like."""
    scale: float = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return scale


def _suggest(config: Any) -> str:
    scaling = "sqrt" if config.use_rslora else "rank"
    return f"Nesting(ranks, scaling={scaling!r}, alpha={config.lora_alpha:g})"


def _checked_layers(model: Any, state: NestedState, adapter: str) -> list[tuple[str, Any]]:
    if not isinstance(model, PeftModel):
        raise MatryoshkaError(
            f"nest() takes a PEFT model, not {type(model).__name__}: "
            "call peft.get_peft_model(model, LoraConfig(...)) first"
        )
    if adapter not in model.peft_config:
        raise MatryoshkaError(f"the model has no adapter {adapter!r}; its adapters are {', '.join(model.peft_config)}")
    check_config(model.peft_config[adapter], state)
    layers = list(nested_layers(model, adapter))
    if not layers:
        raise MatryoshkaError(f"adapter {adapter!r} has no LoRA layer in this model")
    seen: dict[int, str] = {}
    unreadable = _unreadable(model, adapter)
    for name, module in layers:
        reason = _why_not(module, state.rule, adapter, name) or _why_not_in(model.get_base_model(), name)
        if f"base_model.model.{name}" in unreadable:
            reason = (
                "PEFT would lose its factors when it reads them from a file: it renames them as transformers has "
                "renamed weights of this model. Leave the layer out of target_modules"
            )
        shared = seen.setdefault(id(get_parameters(module, adapter)[0]), name)
        if shared != name:
            reason = f"it shares its factors with layer {shared}"
        if reason:
            raise MatryoshkaError(f"layer {name} cannot be nested: {reason}")
    return layers


def _unreadable(model: PeftModel, adapter: str) -> set[str]:
    """The layers whose factors PEFT saves under one name and looks for under another."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    names = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[adapter], dict(saved), adapter)
    return {module for module, key_A, key_B in factor_keys(saved) if not {key_A, key_B} <= names.keys()}


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


def _why_not_in(base: nn.Module, name: str) -> str | None:
    """Modules of torch that take the weight of a layer and never call it, so that they pass over the adapter."""
    parent = base.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "torch's MultiheadAttention takes its weight without calling it, so that PEFT has no effect"
    fast = isinstance(parent, nn.TransformerEncoderLayer) and getattr(parent.self_attn, "batch_first", True)
    if fast and torch.backends.mha.get_fastpath_enabled():
        return (
            "torch's TransformerEncoderLayer takes its weight without calling it in eval mode, so that PEFT has no "
            "effect: call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    return None


def _probe(name: str, module: Any, adapter: str) -> None:
    """See by behaviour that the layer obeys its diagonal: NaN must reach the output, and zeros must leave the base's.

    NaN shows it even while B is all zeros, so no weight is touched.
    """
    variant: NestedVariant = module.lora_variant[adapter]
    rank = variant.state.nesting.max_rank
    active, disabled = module._active_adapter, module._disable_adapters
    module._active_adapter, module._disable_adapters = [adapter], False
    error = None
    try:
        with torch.no_grad():
            variant.override = Gate.on(variant.device, torch.full((rank,), math.nan))
            obeys = bool(_output(module, adapter).isnan().all())
            variant.override = Gate.on(variant.device, torch.zeros(rank))
            obeys = obeys and torch.equal(*_with_and_without(module, adapter))
    except (RuntimeError, TypeError, AttributeError) as failure:  # of a layer that is linear by its class only
        obeys, error = False, failure
    finally:
        variant.override = None
        module._active_adapter, module._disable_adapters = active, disabled
    if not obeys:
        where = f"layer {name} ({type(module).__name__} on {type(module.get_base_layer()).__name__})"
        why = (
            "does not obey a LoRA variant in this version of PEFT"
            if error is None
            else f"takes no LoRA: {error!r:.200}"
        )
        raise MatryoshkaError(f"{where} {why}; leave it out of target_modules") from error


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
