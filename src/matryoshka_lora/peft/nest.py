"""`nest`: make an adapter of a PEFT model nested."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from peft.tuners.lora import LoraLayer
from torch import nn

from matryoshka_lora.errors import MatryoshkaError, check_choice, short
from matryoshka_lora.formats.lora_config import check_plain_lora
from matryoshka_lora.nesting import Deploy, Nesting, Scaling, check_ranks
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.forward_check import ForwardCheck
from matryoshka_lora.peft.lora_layers import (
    factor_parameters,
    lora_layers,
)
from matryoshka_lora.peft.order import FactorOrder
from matryoshka_lora.peft.state import NestingState
from matryoshka_lora.peft.variant import NestedVariant, attach
from matryoshka_lora.rules import RULES, Rule, get_rule

# By name, because importing PEFT's bitsandbytes layers imports bitsandbytes.
_SUPPORTED_LAYERS = (
    "layer.Linear",
    "layer.Embedding",
    "layer.Conv1d",
    "layer.Conv2d",
    "layer.Conv3d",
    "bnb.Linear4bit",
    "bnb.Linear8bitLt",
    "hqq.HqqLoraLinear",
)
# They ignore a variant in forward (AQLM, AWQ, EETQ, and the experts of `target_parameters`) or in
# merging (INC, torchao), or were not run (GPTQ). Their factors are reordered and trained at rank R
# as others are.
_LAYERS_AT_MAX_RANK = (
    "aqlm.AqlmLoraLinear",
    "awq.AwqLoraLinear",
    "eetq.EetqLoraLinear",
    "gptq.GPTQLoraLinear",
    "inc.IncLoraLinear",
    "layer.ParamWrapper",
    "torchao.TorchaoLoraLinear",
)


def nest(
    model: nn.Module,
    ranks: Iterable[int] | None = None,
    *,
    scaling: Scaling = "none",
    rule: str | Rule = "lora",
    deploy: Deploy = "reordered",
    adapter_name: str = "default",
    seed: int = 0,
) -> NestedAdapter:
    """Make a LoRA adapter nested.

    An adapter is nested if every prefix of its factors, the first r rows of A and columns of B, is
    an adapter of rank r: one training run then serves every rank.

    Rule ``"lora"`` is plain LoRA in training, so the adapter may be nested after it::

        trainer.train()
        adapter = nest(trainer.model)
        adapter.train_ranks(trainer)
        adapter.save("my-adapter")

    Other rules are in effect while training::

        adapter = nest(get_peft_model(base, LoraConfig(r=32)), rule="matryoshka")
        trainer.add_callback(adapter.callback())
        trainer.train()
        adapter.save("my-adapter")

    Args:
        model: A model with a LoRA adapter, untrained, except with rule ``"lora"``: a `PeftModel`,
            or a model of diffusers or transformers after ``model.add_adapter(LoraConfig(...))``.
        ranks: The nested ranks, which the rule trains and results are reported at. They are
            increasing, and the last one is R, the config's ``r``. Defaults to the powers of two up
            to R.
        scaling: The scale of a rank below R in training, and with ``deploy="paper"``; see
            `Nesting`.
        rule: A `Rule`, or the name of a built-in one. ``"lora"`` is plain LoRA, and accepts an
            adapter that is trained already. ``"matryoshka"`` has the paper's fixed P
            (arXiv 2605.07850). ``"dylora"`` draws a nested rank for each step.
        deploy: ``"reordered"`` keeps P, folded into B, so that the saved adapter can be truncated
            to any rank. ``"paper"`` drops P after training and reorders nothing, as in the paper;
            low ranks are poor then. It needs a rule other than ``"lora"``.
        adapter_name: PEFT's name of the adapter.
        seed: The seed of the rule's random numbers.

    Raises:
        MatryoshkaError: The model, the config or a layer cannot be nested. The model is unchanged.
    """
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not configs:
        raise MatryoshkaError(
            f"`model` must be a model with a LoRA adapter, got {type(model).__name__}. Call "
            "peft.get_peft_model(model, LoraConfig(...)) or model.add_adapter(LoraConfig(...)) "
            "first. Of a trainer pass trainer.model, and of a pipeline pipeline.unet."
        )
    layers = dict(lora_layers(model, adapter_name))
    if not layers:
        adapters = ", ".join(map(repr, configs))
        raise MatryoshkaError(
            f"The model has no LoRA adapter {short(adapter_name)}; its adapters are {adapters}."
        )
    check_plain_lora(configs[adapter_name].to_dict(), f"adapter {adapter_name!r}")
    rule = get_rule(rule)
    check_deploy(deploy, rule)
    classes = {_class_name(layer) for layer in layers.values()}
    max_rank_layers = ", ".join(sorted(classes.intersection(_LAYERS_AT_MAX_RANK)))
    if max_rank_layers and rule != RULES["lora"]:
        raise MatryoshkaError(
            f"PEFT's layers {max_rank_layers} compute plain LoRA only, and rule {rule.name!r} "
            "does not. Pass `rule='lora'`, or use another quantization, such as bitsandbytes."
        )
    first_layer = next(iter(layers.values()))
    max_rank, scale = first_layer.r[adapter_name], first_layer.scaling[adapter_name]
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name, max_rank, scale)
        if rule != RULES["lora"]:
            # PEFT initializes B to zero, and in embeddings A.
            A, B = factor_parameters(layer, adapter_name)
            if bool(A.count_nonzero()) and bool(B.count_nonzero()):
                raise MatryoshkaError(
                    f"Layer {name} cannot be nested with rule {rule.name!r}, because its update is "
                    "not zero, and the rule would change it. Use `rule='lora'` for an adapter that "
                    "is already trained."
                )
    if ranks is None:
        ranks = Nesting.powers_of_two(max_rank).ranks
    nesting = Nesting(check_ranks(ranks), scaling, scale)
    if nesting.max_rank != max_rank:
        raise MatryoshkaError(
            f"The largest nested rank must be the r of LoraConfig, {max_rank}, got "
            f"{nesting.max_rank}. End `ranks` with {max_rank}, or use "
            f"LoraConfig(r={nesting.max_rank})."
        )
    order = FactorOrder(model, layers, adapter_name)
    state = NestingState(nesting, rule, order, seed, deploy, max_rank_layers)
    for layer in layers.values():
        attach(layer, adapter_name, state)
    adapter = NestedAdapter(model, adapter_name)
    ForwardCheck(adapter)
    return adapter


def check_deploy(deploy: Deploy, rule: Rule) -> None:
    """Raise MatryoshkaError if a rule has no such deployment."""
    check_choice("deploy", deploy, get_args(Deploy))
    if deploy == "paper" and rule == RULES["lora"]:
        raise MatryoshkaError(
            "`deploy='paper'` drops P after training, but rule 'lora' trains without P, and its "
            "ranks below R would be useless. Pass `rule='matryoshka'`, or omit `deploy`."
        )


def _class_name(layer: LoraLayer) -> str:
    """Return the name of a layer's class in ``peft.tuners.lora``, with its module."""
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    return name.removeprefix("peft.tuners.lora.")


def _check_layer(
    name: str, layer: LoraLayer, adapter_name: str, max_rank: int, scale: float
) -> None:
    """Raise MatryoshkaError if a layer cannot be nested correctly."""
    layer_class = _class_name(layer)
    if layer_class not in _SUPPORTED_LAYERS + _LAYERS_AT_MAX_RANK:
        raise MatryoshkaError(
            f"Layer {name} cannot be nested, because PEFT's {layer_class} is not supported. Omit "
            "it from target_modules; or train with PEFT alone, and truncate the saved adapter "
            "with matryoshka_lora.export."
        )
    if any(factor.is_meta for factor in factor_parameters(layer, adapter_name)):
        raise MatryoshkaError(
            f"Layer {name} cannot be nested, because its factors are on the meta device. Load the "
            "adapter, or call get_peft_model without low_cpu_mem_usage=True."
        )
    if (layer.r[adapter_name], layer.scaling[adapter_name]) != (max_rank, scale):
        raise MatryoshkaError(
            f"Layer {name} cannot be nested, because rank_pattern or alpha_pattern gives it "
            "another rank or scale. Omit them; or train with PEFT alone, and reorder the saved "
            "adapter with matryoshka_lora.reorder."
        )
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise MatryoshkaError(
            f"Layer {name} cannot be nested, because a grouped convolution ties columns of B to "
            "groups. Omit it from target_modules."
        )
    if isinstance(layer.lora_variant.get(adapter_name), NestedVariant):
        raise MatryoshkaError(
            f"Layer {name} is already nested. Use NestedAdapter(model, {adapter_name!r})."
        )
    if layer.merged:
        raise MatryoshkaError(
            f"Layer {name} cannot be nested, because an adapter is merged into it. Call "
            "unmerge_adapter() first."
        )
