"""Architectures with mechanisms of their own: what is right, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_checks import difference
from conftest import lora_config, randomize
from lm_checks import inputs
from peft import PeftModel, get_peft_model
from tiny_architectures import tiny_causal_lm

from matryoshka_lora import MatryoshkaError, Nesting, nest

NESTING = Nesting([1, 2, 4])


def peft_model(architecture: str, **changes: Any) -> PeftModel:
    return get_peft_model(tiny_causal_lm(architecture), lora_config(NESTING, **changes))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_layers_that_peft_takes_for_experts_are_refused_with_the_way_out(architecture: str) -> None:
    """PEFT gives some of them twice the rank, in a rank_pattern that the user has not written."""
    with pytest.raises(MatryoshkaError, match=r"PEFT takes 'all-linear'.*experts.*target_parameters"):
        nest(peft_model(architecture, target_modules="all-linear"), NESTING)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft_model(architecture, target_modules=["o_proj"], target_parameters=experts)
    layers = {module.__class__.__name__ for module in model.modules() if hasattr(module, "lora_A")}
    assert layers == {"Linear", "ParamWrapper"}
    nest(model, NESTING)


@pytest.mark.parametrize(
    ("architecture", "layer"), [("deepseek_v4", "self_attn.o_a_proj"), ("llama4", "feed_forward.router")]
)
def test_a_layer_that_is_linear_by_its_class_only_is_refused(architecture: str, layer: str) -> None:
    """A grouped linear layer, and a router that returns two tensors: PEFT's own forward fails on them."""
    with pytest.raises(MatryoshkaError, match=rf"{layer}.*leave it out of target_modules"):
        nest(peft_model(architecture, target_modules="all-linear"), NESTING)


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("laguna", "mlp.shared_experts.gate_proj"), ("inkling2_text", "k_proj.sconv.weight_proj")],
)
def test_a_layer_whose_factors_peft_could_not_read_again_is_refused(
    architecture: str, layer: str, tmp_path: Any
) -> None:
    model = peft_model(architecture, target_modules="all-linear").eval()
    with pytest.raises(MatryoshkaError, match=rf"{layer}.*PEFT would lose its factors"):
        nest(model, NESTING)
    # That PEFT loses them is seen without this package.
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_causal_lm(architecture), tmp_path).eval()
    with torch.no_grad():
        assert difference(again(**inputs(2, 8)).logits, model(**inputs(2, 8)).logits) > 0.01
