"""`nest`: make a LoRA adapter a nested one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft import PeftModel

from matryoshka_lora.adapter.attach import attach
from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.adapter.gates import nested_layers
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import check_config
from matryoshka_lora.nesting import Nesting, Scaling
from matryoshka_lora.rules import Rule, get_rule
from matryoshka_lora.state import Deploy, State


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
        rule: One of `matryoshka_lora.rules.RULES`, or its name.
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
