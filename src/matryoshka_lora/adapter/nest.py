"""`nest`: make a LoRA adapter a nested one, or say why that cannot work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_parameters, get_weight
from matryoshka_lora.adapter.gate import PLACES, Gate, RowCount, check_rows_apart
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.in_model import (
    COPIES,
    begin,
    check_names,
    lora_layers,
    nest_copies,
    nested_layers,
    no_copies,
)
from matryoshka_lora.adapter.layers import SUBCLASSES
from matryoshka_lora.adapter.saving import with_our_files
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import AdapterConfig, check_config
from matryoshka_lora.formats.layout import factor_keys, layer_name
from matryoshka_lora.nesting import Nesting, Scaling
from matryoshka_lora.rules import Rule, get_rule
from matryoshka_lora.state import Deploy, State
from matryoshka_lora.unofficial import is_conv, only_active


def nest(
    peft_model: PeftModel,
    ranks: Sequence[int] | None = None,
    scaling: Scaling = "none",
    rule: str | Rule = "matryoshka",
    deploy: Deploy = "reordered",
    adapter: str = "default",
    seed: int = 0,
) -> NestedAdapter:
    """Nest a LoRA adapter: train it by a rule, use it at any rank.

    The model stays an ordinary PEFT model with an ordinary ``LoraConfig``; everything else that PEFT does with an
    adapter goes on working. R is the config's ``r``, and the scale of rank R is the config's: ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora``. In training mode the rule's diagonal stands between the factors. In
    eval mode the adapter has the rank of `NestedAdapter.set_rank`, at first the largest.

    Example::

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        adapter = nest(model)
        SFTTrainer(model=model, ..., callbacks=[adapter.callback()]).train()
        adapter.save("my-adapter")

    Args:
        peft_model: From ``peft.get_peft_model`` or ``PeftModel.from_pretrained``.
        ranks: The ranks that training prepares, increasing; the last one is R. None: the powers of two up to R.
        scaling: The scale of a rank r below R. ``"none"``: that of R. ``"rank"``: R / r times that. ``"sqrt"``:
            sqrt(R / r) times that. See `matryoshka_lora.Nesting`.
        rule: One of `matryoshka_lora.rules.RULES`, or its name. No file can hold a rule of your own: train it without
            checkpoints. What `NestedAdapter.save` writes is reordered, and needs none.
        deploy: ``"reordered"``: what is saved serves every rank well. ``"paper"``: factors that were not reordered are
            saved and used without P, as arXiv 2605.07850 does; low ranks are poor then.
        adapter: PEFT's name of the adapter.
        seed: Of the ranks that the rule draws.

    Raises:
        MatryoshkaError: The model, the config or a layer cannot be nested; the message gives the reason and the way
            out, and the model is unchanged.
    """
    if not isinstance(peft_model, PeftModel):
        raise MatryoshkaError(
            f"nest() takes a PEFT model, not {type(peft_model).__name__}: "
            "call peft.get_peft_model(model, LoraConfig(...)) first"
        )
    if adapter not in peft_model.peft_config:
        known = ", ".join(peft_model.peft_config)
        raise MatryoshkaError(f"the model has no adapter {adapter!r}; its adapters are {known}")
    config = check_config(peft_model.peft_config[adapter].to_dict(), f"adapter {adapter!r}")
    if ranks is None:
        nesting = Nesting.powers_of_two(config.r, scaling, config.scale)
    else:
        nesting = Nesting(ranks, scaling, config.scale)
    chosen = rule if isinstance(rule, Rule) else get_rule(rule)
    if peft_model.peft_config[adapter].init_lora_weights == "orthogonal" and chosen.name != "lora":
        raise MatryoshkaError(
            "init_lora_weights='orthogonal' starts from columns that cancel out under one scale only: use True or "
            f"'gaussian'. An adapter that is trained already is nested by rule 'lora', not {chosen.name!r}"
        )
    state = State(nesting, chosen, seed, deploy)
    attach(peft_model, state, adapter)
    _warn_if_trained(peft_model, adapter, state)
    return NestedAdapter(peft_model, adapter)


def _warn_if_trained(model: PeftModel, adapter: str, state: State) -> None:
    """A trained adapter goes on as another function where something else than its scale stands between its factors."""
    if not state.draws and bool((state.trained_diagonal() == state.nesting.scale).all()):
        return
    factors = (get_parameters(module, adapter)[1] for _, module, _ in nested_layers(model, adapter))
    if any(bool(torch.count_nonzero(B.detach())) for B in factors):
        warnings.warn(
            f"adapter {adapter!r} has been trained already, and rule {state.rule.name!r} puts another diagonal between "
            "its factors: it is another function from now on. To go on from what it is, use rule='lora'",
            stacklevel=3,
        )


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
    apart = no_copies(model, layers, adapter)
    scale = AdapterConfig(model.peft_config[adapter].to_dict()).scale
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
            module.lora_variant[adapter].apart = apart
        _find_sharing(model, layers, adapter)
        probed: set[tuple[type, type]] = set()
        for name, module in layers:
            kind = (type(module), type(module.get_base_layer()))
            if kind not in probed:
                probed.add(kind)
                _probe(name, module, adapter)
        begin(model, adapter)
        model.__class__ = with_our_files(type(model))
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
    check_names(model, model.peft_config)
    seen: dict[int, str] = {}
    unreadable = _unreadable(model, adapter)
    for name, module in layers:
        reason = _why_not(module, state.rule, adapter, name) or _why_not_in(model.get_base_model(), name)
        if name in unreadable:
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
    try:
        saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    except KeyError as error:
        raise MatryoshkaError(
            f"PEFT cannot write adapter {adapter!r} to a file (it misses {error}), as where two adapters train the "
            "tokens of different layers: name the same layers in the trainable_token_indices of both"
        ) from error
    names = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[adapter], dict(saved), adapter)
    return {layer_name(module) for module, key_A, key_B in factor_keys(saved) if not {key_A, key_B} <= names.keys()}


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
        return (
            f"target_parameters give one delta to all rows and all columns; rule {rule.name!r} needs them apart: take "
            "another"
        )
    if rule.per_row and ".experts." in f".{name}.":
        return (
            f"tokens that are routed to experts have left their rows, and rule {rule.name!r} needs them: take another"
        )
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
    error = None
    try:
        with torch.no_grad(), only_active(module, adapter):
            variant.override = Gate.on(variant.device, torch.full((rank,), math.nan))
            obeys = bool(_output(module, adapter).isnan().all())
            variant.override = Gate.on(variant.device, torch.zeros(rank))
            obeys = obeys and torch.equal(*_with_and_without(module, adapter))
    except (RuntimeError, TypeError, AttributeError) as failure:  # of a layer that is linear by its class only
        obeys, error = False, failure
    finally:
        variant.override = None
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
    if is_conv(module):
        size = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return torch.ones(1, base.in_channels, *size, dtype=dtype, device=device)
    # With a gradient, because bitsandbytes repacks 4-bit weights for a CPU at the first input without one.
    return torch.ones(1, 1, module.in_features, dtype=dtype, device=device).requires_grad_()
