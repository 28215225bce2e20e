"""A nested layer in PEFT's other functions: merging, scaling, mixed batches, quantized layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.formula import (
    FORMS,
    KINDS,
    ROWS,
    Form,
    deployed_p,
    is_close,
    layer_in_form,
    matches,
    random_input,
    trained_p,
)
from helpers.models import lora_config, nest_as, nested_layer, randomize, tiny_llama
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unmerge_each_rank(kind: str, form: Form, safe_merge: bool) -> None:
    nested = layer_in_form(kind, Nesting((1, 3, 6), "rank", 0.7), form)
    adapter, layer = nested.adapter, nested.layer
    adapter.model.eval()
    x = nested.kind.batch(ROWS)
    base_weight = layer.base_layer.weight.detach().clone()
    ranks = {"paper": (1, 6, 3), "trained": (6,), "reordered": (1, 5, 6)}
    for rank in ranks[form]:
        adapter.set_rank(rank)
        expected = layer(x)
        adapter.model.merge_adapter(safe_merge=safe_merge)
        p = deployed_p(adapter.nesting, rank, form)
        delta = nested.kind.delta(layer.base_layer, *nested.factors, p)
        assert is_close(layer.base_layer.weight, base_weight + delta)
        assert is_close(layer(x), expected)
        with pytest.raises(MatryoshkaError, match="merged"):
            adapter.set_rank(6)
        with pytest.raises(MatryoshkaError, match="merged"):
            adapter.reorder()
        with pytest.raises(MatryoshkaError, match="merged"), adapter.rows([6]):
            pytest.fail("the context must not open")
        adapter.model.unmerge_adapter()
        assert is_close(layer.base_layer.weight, base_weight)
        assert is_close(layer(x), expected)
    adapter.set_rank(6)
    expected = layer(x)
    assert is_close(adapter.model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("training", [False, True])
def test_functions_that_scale_the_adapter(kind: str, training: bool) -> None:
    nesting = Nesting((1, 3, 6), "sqrt", 0.8)
    nested = nested_layer(kind, nesting)
    nested.adapter.model.train(training)
    layer, x, p = nested.layer, random_input(nested), trained_p(nesting)
    layer.set_scale("default", 0.5)
    assert matches(nested, p * 0.5, x)
    if kind != "Embedding":  # PEFT's embeddings ignore the others
        layer.scale_layer(3.0)
        assert matches(nested, p * 1.5, x)
        layer.unscale_layer(None)
        assert matches(nested, p, x)
    layer.set_scale("default", 1.0)
    with rescale_adapter_scale(nested.adapter.model, multiplier=0.25):
        assert matches(nested, p * 0.25, x)
        nested.adapter.model.merge_adapter()
        delta = nested.kind.delta(layer.base_layer, *nested.factors, p * 0.25)
        merged_weight = layer.base_layer.weight.detach().clone()
        nested.adapter.model.unmerge_adapter()
        assert is_close(merged_weight, layer.base_layer.weight + delta)
    assert matches(nested, p, x)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_mixed_adapters(kind: str) -> None:
    """Nested, plain and base rows in a batch, at a rank below R."""
    nested = layer_in_form(kind, Nesting((1, 3, 6), "sqrt", 0.8), "reordered")
    adapter, layer = nested.adapter, nested.layer
    adapter.model.add_adapter("plain", adapter.model.peft_config["default"])
    randomize(adapter.model, seed=4)
    adapter.reorder()
    adapter.set_rank(2)
    x = nested.kind.batch(4)
    output = layer(x, adapter_names=["default", "__base__", "plain", "default"])
    expected = nested.expected(deployed_p(adapter.nesting, 2, "reordered"), x)
    assert is_close(output[[0, 3]], expected[[0, 3]])
    assert is_close(output[1], layer.base_layer(x)[1])
    with adapter.rows([1, 2, 1, 2]), pytest.raises(MatryoshkaError, match="row"):
        layer(x, adapter_names=["default", "__base__", "plain", "default"])
    adapter.model.set_adapter("plain")
    assert is_close(output[2], layer(x)[2])


# Quantized layers.


def nested_quantized(folder: Path, bits: int, nesting: Nesting) -> NestedAdapter:
    tiny_llama(num_hidden_layers=1, intermediate_size=128).save_pretrained(folder)
    base_model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        dtype=torch.float32,
        device_map="cpu",
    )
    model = get_peft_model(base_model, lora_config(nesting))
    adapter = nest_as(model, nesting, deploy="paper")
    randomize(model)
    return adapter


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora", "ignore:Unmerge lora")
def test_quantized_layers(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nesting = Nesting((1, 2, 6), "sqrt", 1.25)
    adapter = nested_quantized(tmp_path, bits, nesting)
    adapter.model.train()  # in eval mode bitsandbytes packs 4-bit weights for the CPU
    layer: Any = adapter.model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(0)
    x, G = torch.randn(3, 4, 64), torch.randn(3, 4, 128)
    p = trained_p(nesting).float()
    layer(x).backward(G)
    expected_gradient = torch.einsum("r,or,bto,bti->ri", p, B, G, x).detach()
    torch.testing.assert_close(A.grad, expected_gradient, rtol=1e-4, atol=1e-4)

    def update(p: Tensor) -> Tensor:
        return (x.double() @ A.double().T * p @ B.double().T).float()

    with torch.no_grad():
        base_output = layer.base_layer(x)
        torch.testing.assert_close(layer(x) - base_output, update(p), rtol=1e-4, atol=1e-4)
        adapter.set_rank(2)
        adapter.model.train()
        update_2 = update(deployed_p(nesting, 2, "paper"))
        assert update_2.norm() > 0.5 * base_output.norm()
        layer.merge()
        error = layer.base_layer(x) - base_output - update_2
        assert error.norm() < 0.2 * (base_output + update_2).norm()
        layer.unmerge()
        assert (layer.base_layer(x) - base_output).norm() < 0.3 * base_output.norm()
        adapter.model.eval()
        base_output = layer.base_layer(x)
        for rank in nesting.ranks:
            adapter.set_rank(rank)
            expected = update(deployed_p(nesting, rank, "paper"))
            torch.testing.assert_close(layer(x) - base_output, expected, rtol=1e-4, atol=1e-4)
        p_of_rows = torch.stack([deployed_p(nesting, rank, "paper") for rank in (6, 1, 2)])
        with adapter.rows([6, 1, 2]):
            updates = layer(x) - base_output
        torch.testing.assert_close(updates, update(p_of_rows[:, None]), rtol=1e-4, atol=1e-4)
