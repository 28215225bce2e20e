"""contrib/peft: conversion of LoRA layers from their factors, against dense computations."""

from __future__ import annotations

import copy
from typing import Any

import factor_conversion
import numpy as np
import peft
import pytest
import torch
from helpers import models
from helpers.layers import best_matrix
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

needs_conversion = pytest.mark.skipif(
    factor_conversion.conversion is None, reason="this PEFT has no convert_to_lora"
)


class TwoLayers(nn.Module):
    """A linear layer and its transposed kind, of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 24)
        self.conv1d = Conv1D(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv1d(x)


def lora_model(layer: str = "linear", rank: int = 6, **changes: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    options = {
        "r": rank,
        "lora_alpha": 5,
        "target_modules": [layer],
        "fan_in_fan_out": layer == "conv1d",
        "init_lora_weights": False,
    }
    return peft.get_peft_model(TwoLayers(), peft.LoraConfig(**{**options, **changes}))


def layer_of(model: peft.PeftModel, layer: str = "linear") -> Any:
    return getattr(model.base_model.model, layer)


def dense_update(module: Any, scaling: float) -> np.ndarray:
    lora_A = module.lora_A.default.weight.detach().double().numpy()
    lora_B = module.lora_B.default.weight.detach().double().numpy()
    return scaling * lora_B @ lora_A


@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6, 10, 24])
def test_a_layer_is_the_truncated_dense_update(layer: str, use_rslora: bool, rank: int) -> None:
    module = layer_of(lora_model(layer, use_rslora=use_rslora), layer)
    lora_A, lora_B, new_rank = factor_conversion.convert_module_to_lora(module, rank)
    assert new_rank == rank
    assert lora_A.shape == (rank, 40)
    assert lora_B.shape == (24, rank)
    scaling = 5 / 6**0.5 if use_rslora else 5 / 6
    expected = best_matrix(dense_update(module, scaling), rank)
    np.testing.assert_allclose((lora_B @ lora_A).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose((lora_A @ lora_A.T).numpy(), np.eye(rank), atol=1e-5)


def test_more_rank_than_the_weight_has() -> None:
    module = layer_of(lora_model(rank=30))
    lora_A, lora_B, _ = factor_conversion.convert_module_to_lora(module, 24)
    expected = dense_update(module, 5 / 30)
    np.testing.assert_allclose((lora_B @ lora_A).numpy(), expected, atol=2e-5)


@needs_conversion
def test_a_rank_above_the_weight_is_peft_s_error() -> None:
    with pytest.raises(ValueError, match="25"):
        factor_conversion.convert_module_to_lora(layer_of(lora_model()), 25)


@needs_conversion
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_a_threshold_chooses_peft_s_rank(layer: str, threshold: float) -> None:
    module = layer_of(lora_model(layer, rank=16), layer)
    expected = factor_conversion.original_convert_module(module, threshold)
    lora_A, lora_B, rank = factor_conversion.convert_module_to_lora(module, threshold)
    assert rank == expected[2]
    product = expected[1] @ expected[0]
    np.testing.assert_allclose((lora_B @ lora_A).numpy(), product.numpy(), atol=2e-5)


@needs_conversion
def test_bfloat16_is_kept_and_no_less_exact() -> None:
    module = layer_of(lora_model().to(torch.bfloat16))
    expected = best_matrix(dense_update(module, 5 / 6), 3)
    errors = {}
    for name in ("convert_module_to_lora", "original_convert_module"):
        lora_A, lora_B, _ = getattr(factor_conversion, name)(module, 3)
        assert lora_A.dtype == lora_B.dtype == torch.bfloat16
        product = lora_B.double() @ lora_A.double()
        errors[name] = np.linalg.norm(product.numpy() - expected)
    assert errors["convert_module_to_lora"] <= 1.1 * errors["original_convert_module"]


@needs_conversion
def test_other_types_are_converted_by_peft() -> None:
    torch.manual_seed(0)
    config = peft.LoKrConfig(r=4, target_modules=["linear"], init_weights=False)
    module = layer_of(peft.get_peft_model(TwoLayers(), config))
    expected = factor_conversion.original_convert_module(module, 4)
    lora_A, lora_B, rank = factor_conversion.convert_module_to_lora(module, 4)
    assert rank == 4
    torch.testing.assert_close(lora_A, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(lora_B, expected[1], rtol=0, atol=0)


@pytest.fixture
def patched_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch PEFT for one test, and let the dense functions fail."""

    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("the dense update was computed")

    name = "_svd_generalized_task_arithmetic_weighted_adapter"
    monkeypatch.setattr(peft.LoraModel, name, getattr(peft.LoraModel, name))
    if factor_conversion.conversion is not None:
        name = "_convert_module_to_lora"
        original = getattr(factor_conversion.conversion, name)
        monkeypatch.setattr(factor_conversion.conversion, name, original)
    monkeypatch.setattr(factor_conversion, "original_convert_module", fail)
    monkeypatch.setattr(factor_conversion, "original_combine", fail)
    factor_conversion.patch_peft()


@needs_conversion
@pytest.mark.usefixtures("patched_peft")
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_a_model_at_its_own_rank_has_the_same_logits() -> None:
    base_model = models.tiny_llama()
    config = peft.LoraConfig(r=6, target_modules=models.LINEAR_LAYERS, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base_model), config).eval()
    new_config, state_dict = peft.convert_to_lora(model, rank=6)
    converted = peft.get_peft_model(base_model, new_config).eval()
    peft.set_peft_model_state_dict(converted, state_dict)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        logits = converted(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("patched_peft")
@pytest.mark.parametrize("svd_rank", [3, 5, 9, 20])
def test_a_weighted_sum_of_adapters(svd_rank: int) -> None:
    model = lora_model(rank=4, lora_alpha=8)
    config = peft.LoraConfig(r=7, lora_alpha=7, target_modules=["linear"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.add_weighted_adapter(
        ["default", "other"], [0.6, -1.5], "sum", combination_type="svd", svd_rank=svd_rank
    )
    module = layer_of(model)
    other = module.lora_B.other.weight.double() @ module.lora_A.other.weight.double()
    update = 0.6 * dense_update(module, 2.0) - 1.5 * other.detach().numpy()
    product = module.lora_B["sum"].weight @ module.lora_A["sum"].weight
    expected = best_matrix(update, svd_rank)
    np.testing.assert_allclose(product.detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("combination_type", ["ties_svd", "svd"])
def test_sums_without_factors_are_computed_by_peft(
    combination_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = factor_conversion.original_combine
    name = "_svd_generalized_task_arithmetic_weighted_adapter"
    monkeypatch.setattr(peft.LoraModel, name, factor_conversion.combine_adapters)

    def record(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1])
        return original(*arguments, **options)

    monkeypatch.setattr(factor_conversion, "original_combine", record)
    model = lora_model(use_dora=combination_type == "svd")
    model.add_adapter("other", model.peft_config["default"])
    model.add_weighted_adapter(
        ["default", "other"], [1.0, 1.0], "sum", combination_type=combination_type, density=0.5
    )
    assert calls == [combination_type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reproduce_factor_conversion", "reproduce_dora_conversion"])
def test_the_scripts_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = __import__(name)
    size = ["--size", "64", "--rank", "16"] if name == "reproduce_factor_conversion" else []
    monkeypatch.setattr("sys.argv", [name, *size])
    script.main()
    assert f"PEFT {peft.__version__}" in capsys.readouterr().out
