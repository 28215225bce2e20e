"""State dicts hold plain LoRA with the function of eval mode: what Trainers save and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import lora_config, nested_llama, randomize, tiny_llama
from helpers.plain_peft import IDS, is_close
from helpers.rules import DECREASING, RANK_PER_ROW
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor

from matryoshka_lora import Nesting, Rule
from matryoshka_lora.rules import RULES

NESTING = Nesting((1, 3, 6), "sqrt", 1.7 / 6**0.5)


def logits(model: Any) -> Tensor:
    """Return the logits in the model's current mode."""
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS).logits
    return output


def plain_llama() -> PeftModel:
    return get_peft_model(tiny_llama(), lora_config(NESTING)).eval()


@pytest.mark.parametrize(
    "rule", [*RULES.values(), RANK_PER_ROW, DECREASING], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("form", ["paper", "unordered", "svd"])
def test_a_state_dict_in_plain_peft(rule: Rule, form: str) -> None:
    if (rule.name, form) == ("lora", "paper"):
        return  # rejected: there is no P to drop
    adapter = nested_llama(NESTING, rule, deploy="paper" if form == "paper" else "reordered")
    if form == "svd":
        adapter.reorder()
    expected = logits(adapter.model)
    plain_model = plain_llama()
    set_peft_model_state_dict(plain_model, get_peft_model_state_dict(adapter.model))
    is_folded = form == "unordered" and rule.name in ("matryoshka", "decreasing")
    if is_folded:
        assert is_close(logits(plain_model), expected, 1e-5)
    else:
        assert torch.equal(logits(plain_model), expected)
    assert torch.equal(logits(adapter.model), expected)


@pytest.mark.parametrize(
    "function", ["load_adapter", "set_peft_model_state_dict", "load_state_dict"]
)
def test_a_plain_state_dict_in_a_nested_adapter(function: str, tmp_path: Path) -> None:
    """The best model, moving averages and checkpoints are loaded like this."""
    plain_model = plain_llama()
    randomize(plain_model, seed=7)
    adapter = nested_llama(NESTING)
    factors = adapter.factors.copy()
    state_dict = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    if function == "load_adapter":
        plain_model.save_pretrained(tmp_path)
        adapter.model.load_adapter(str(tmp_path), "default", is_trainable=True)
    elif function == "load_state_dict":
        adapter.model.load_state_dict(plain_model.state_dict())
    else:
        set_peft_model_state_dict(adapter.model, get_peft_model_state_dict(plain_model))
    for training in (True, False):
        assert is_close(logits(adapter.model.train(training)), logits(plain_model), 1e-5)
    adapter.model.load_state_dict(state_dict)
    for name, (A, B) in adapter.factors.copy().items():
        assert is_close(A, factors[name][0], 1e-6)
        assert is_close(B, factors[name][1], 1e-6)


def test_each_adapter_of_a_layer_is_folded_by_itself() -> None:
    adapter = nested_llama(NESTING)
    adapter.model.add_adapter("plain", lora_config(NESTING))
    randomize(adapter.model, seed=2)
    parameters = dict(adapter.model.named_parameters())
    for key, value in adapter.model.state_dict().items():
        is_folded = "lora_B.default" in key
        if key in parameters:
            assert torch.equal(value, parameters[key]) != is_folded
