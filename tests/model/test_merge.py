"""Merged exports of adapters whose layers share weights or replace them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LINEAR_LAYERS, randomize, tiny_llama
from helpers.plain_peft import distance, logits
from helpers.tiny_chat import save_tiny_chat
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from matryoshka_lora import export

REPLICATION = [[0, 2], [0, 2]]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"layer_replication": REPLICATION},
        {"layer_replication": REPLICATION, "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=str,
)
def test_a_merged_model_computes_what_the_adapter_does(
    options: dict[str, Any], is_tied: bool, tmp_path: Path
) -> None:
    tiny_llama(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    save_tiny_chat(tmp_path / "chat")
    AutoTokenizer.from_pretrained(tmp_path / "chat").save_pretrained(tmp_path / "base")
    base_model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR_LAYERS, **options)
    model = get_peft_model(base_model, config)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "lora")
    export(tmp_path / "lora", tmp_path / "merged", 4, "merged", base_model=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), logits(model)) < 1e-4
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    replaces_embeddings = "norm" not in str(options) and "modules_to_save" in options
    if replaces_embeddings or "lm_head" in str(options):
        assert not written["tie_word_embeddings"]  # runtimes would not read the head
    assert written["num_hidden_layers"] == (4 if "layer_replication" in options else 2)
