"""What `nest` leaves as it is, and what it rejects."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import lora_config, nest_as, randomize, tiny_llama, tiny_mixtral
from helpers.plain_peft import logits
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from matryoshka_lora import MatryoshkaError, Nesting, nest

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)


def test_nesting_changes_no_class_name_config_or_parameter() -> None:
    plain = get_peft_model(tiny_llama(), lora_config(NESTING))
    nested = get_peft_model(tiny_llama(), lora_config(NESTING))
    nest_as(nested, NESTING)
    nested_types = [type(module) for module in nested.modules()]
    assert nested_types == [type(module) for module in plain.modules()]
    assert repr(nested) == repr(plain)
    assert nested.peft_config["default"].to_dict() == plain.peft_config["default"].to_dict()
    assert nested.state_dict().keys() == plain.state_dict().keys()
    trainable = [name for name, p in nested.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in plain.named_parameters() if p.requires_grad]


def test_rule_lora_accepts_a_trained_adapter() -> None:
    model = peft_llama().eval()
    randomize(model)
    before = logits(model)
    adapter = nest(model, rule="lora")
    assert torch.equal(logits(model), before)
    adapter.reorder()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert adapter.order == "svd"


def peft_llama(**lora: Any) -> PeftModel:
    return get_peft_model(tiny_llama(num_hidden_layers=1), lora_config(NESTING, **lora))


def peft_mixtral() -> PeftModel:
    config = lora_config(
        NESTING, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    return get_peft_model(tiny_mixtral(), config)


def ia3_llama() -> PeftModel:
    return get_peft_model(
        tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )


def peft_of_module(module: nn.Module) -> PeftModel:
    return get_peft_model(nn.Sequential(module), LoraConfig(r=8, target_modules=["0"]))


def trained_llama() -> PeftModel:
    model = peft_llama()
    randomize(model)
    return model


def nested_llama_model() -> PeftModel:
    return nest(peft_llama()).model


def merged_llama() -> PeftModel:
    model = peft_llama()
    model.merge_adapter()
    return model


REJECTED_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "not a PEFT model": (tiny_llama, "get_peft_model"),
    "no LoRA": (ia3_llama, "default"),
    "DoRA": (lambda: peft_llama(use_dora=True), "DoRA"),
    "lora_bias": (lambda: peft_llama(lora_bias=True), "bias"),
    "pissa": (lambda: peft_llama(init_lora_weights="pissa"), "pissa"),
    "rank_pattern": (lambda: peft_llama(rank_pattern={"q_proj": 4}), "rank_pattern"),
    "alpha_pattern": (lambda: peft_llama(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
    "experts": (peft_mixtral, "ParamWrapper"),
    "grouped": (lambda: peft_of_module(nn.Conv1d(4, 4, 1, groups=2)), "grouped"),
    "attention": (lambda: peft_of_module(nn.MultiheadAttention(8, 2)), "MultiheadAttention"),
    "trained": (trained_llama, "rule='lora'"),
    "nested": (nested_llama_model, "NestedAdapter"),
    "merged": (merged_llama, "unmerge_adapter"),
}


@pytest.mark.parametrize("case", REJECTED_MODELS)
def test_models_that_cannot_be_nested_stay_as_they_are(case: str) -> None:
    build, keyword = REJECTED_MODELS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about these configs
        model = build()
    assert_nest_rejects(model, keyword, rule="matryoshka")


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        ({"adapter_name": "mine"}, "mine"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [1, 4]}, "8"),
        ({"ranks": [4, 1, 8]}, "increasing"),
        ({"rule": "dyloro"}, "dylora"),
        ({"scaling": "rslora"}, "scaling"),
        ({"deploy": "papers"}, "deploy"),
        ({"deploy": "paper", "rule": "lora"}, "deploy"),
    ],
    ids=str,
)
def test_options_that_cannot_be_nested(options: dict[str, Any], keyword: str) -> None:
    assert_nest_rejects(peft_llama(), keyword, **options)


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
def test_factors_without_values_cannot_be_nested(rule: str) -> None:
    model = get_peft_model(tiny_llama(), lora_config(NESTING), low_cpu_mem_usage=True)
    with pytest.raises(MatryoshkaError, match="meta"):
        nest(model, rule=rule)


def assert_nest_rejects(model: Any, keyword: str, **options: Any) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    variants = [dict(getattr(module, "lora_variant", {})) for module in model.modules()]
    with pytest.raises(MatryoshkaError, match=keyword):
        nest(model, **options)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert [dict(getattr(module, "lora_variant", {})) for module in model.modules()] == variants
