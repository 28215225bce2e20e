"""Nested adapters on bases that HQQ and torchao have quantised, on a CPU.

`make test-quantized` installs both. bitsandbytes is tested with the other layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.examples import collate, lookup_examples
from helpers.models import lora_config, randomize, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest

NESTING = Nesting((1, 2, 4), "none", 1.0)
BATCH = collate(lookup_examples(4))


def quantized_llama(kind: str) -> Any:
    quantize = pytest.importorskip(
        {"hqq": "hqq.core.quantize", "torchao": "torchao.quantization"}[kind],
        reason=f"{kind} is not installed",
    )
    model = tiny_llama()
    if kind == "torchao":
        quantize.quantize_(model.model, quantize.Int8WeightOnlyConfig())
        return model
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, layer)
    return model


def adapter_on(kind: str) -> NestedAdapter:
    config = lora_config(NESTING, target_modules=["q_proj", "down_proj"])
    adapter = nest(get_peft_model(quantized_llama(kind), config).eval())
    randomize(adapter.model, size=0.1)
    return adapter


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**BATCH).logits
    return result


@pytest.mark.parametrize("kind", ["hqq", "torchao"])
def test_every_rank_of_an_adapter_on_a_quantised_base(tmp_path: Path, kind: str) -> None:
    adapter = adapter_on(kind)
    expected = logits(adapter.model)
    adapter.reorder()
    torch.testing.assert_close(logits(adapter.model), expected, atol=1e-4, rtol=1e-4)
    assert adapter.train_ranks(lookup_examples(64), max_examples=64).losses_before
    torch.testing.assert_close(logits(adapter.model), expected, atol=1e-4, rtol=1e-4)
    adapter.export(tmp_path / "rank-3", 3)
    factors = adapter.factors.copy()
    truncated = {name: (A, B * (torch.arange(4) < 3)) for name, (A, B) in factors.items()}
    adapter.factors.write(truncated)
    expected = logits(adapter.model)
    adapter.factors.write(factors)
    adapter.model.load_adapter(str(tmp_path / "rank-3"), "plain")
    adapter.model.set_adapter("plain")
    torch.testing.assert_close(logits(adapter.model), expected, atol=1e-4, rtol=1e-4)


def test_hqq_computes_and_merges_every_rank(tmp_path: Path) -> None:
    adapter = adapter_on("hqq")
    adapter.reorder()
    adapter.export(tmp_path / "rank-2", 2)
    adapter.set_rank(2)
    adapter.model.load_adapter(str(tmp_path / "rank-2"), "plain")
    nested_logits = logits(adapter.model)
    adapter.model.set_adapter("plain")
    torch.testing.assert_close(nested_logits, logits(adapter.model), atol=1e-4, rtol=1e-4)
    adapter.model.set_adapter("default")
    plain = PeftModel.from_pretrained(quantized_llama("hqq"), tmp_path / "rank-2").eval()
    for model in (adapter.model, plain):
        model.merge_adapter()
    torch.testing.assert_close(logits(adapter.model), logits(plain), atol=1e-3, rtol=1e-3)


def test_torchao_computes_rank_r_only() -> None:
    adapter = adapter_on("torchao")
    adapter.reorder()
    with pytest.raises(MatryoshkaError, match="torchao"):
        adapter.set_rank(2)
    with pytest.raises(MatryoshkaError, match="torchao"), adapter.rows([1, 4, 4, 4]):
        pass
    model = get_peft_model(quantized_llama("torchao"), lora_config(NESTING))
    with pytest.raises(MatryoshkaError, match="torchao"):
        nest(model, rule="matryoshka")
