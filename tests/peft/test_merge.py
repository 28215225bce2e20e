"""Merged exports of adapters whose layers share weights or replace them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LINEAR_LAYERS, randomize, tiny_llama
from helpers.plain_peft import distance, logits, plain_adapter
from helpers.tiny_chat import TEMPLATE, save_tiny_chat, tiny_tokenizer
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
    export(
        tmp_path / "lora",
        tmp_path / "merged",
        4,
        format="merged",
        base_model=str(tmp_path / "base"),
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), logits(model)) < 1e-4
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    replaces_embeddings = "norm" not in str(options) and "modules_to_save" in options
    if replaces_embeddings or "lm_head" in str(options):
        assert not written["tie_word_embeddings"]  # runtimes would not read the head
    assert written["num_hidden_layers"] == (4 if "layer_replication" in options else 2)


WORD_PIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
}


@pytest.mark.parametrize(
    ("file_name", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "vocab": "../secret"}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "init_inputs": ["../secret"]},
        ),
        ("special_tokens_map.json", {"vocab": "../secret"}),
        ("tokenizer.json", {"added_tokens": [], "model": {**WORD_PIECE, "vocab": "../secret"}}),
    ],
    ids=str,
)
def test_a_merged_model_has_no_line_of_a_file_that_a_tokenizer_names(
    file_name: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads a vocabulary from any path."""
    (tmp_path / "secret").write_text("[UNK]\nAKIASECRET\n")
    base_model = str(save_tiny_chat(tmp_path / "base"))
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    (tmp_path / "lora" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "lora" / file_name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path / "lora")
    export(tmp_path / "lora", tmp_path / "merged", 2, format="merged", base_model=base_model)
    for file in (tmp_path / "merged").rglob("*.*"):
        assert b"AKIASECRET" not in file.read_bytes()
    assert (tmp_path / "merged" / file_name).is_file()


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_tokenizer_with_a_link_to_another_folder_is_not_used(
    is_folder: bool, tmp_path: Path
) -> None:
    base_model = str(save_tiny_chat(tmp_path / "base"))
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.jinja").write_text("secret")
    templates = tmp_path / "lora" / "additional_chat_templates"
    if is_folder:
        templates.symlink_to(tmp_path / "private")
    else:
        templates.mkdir()
        (templates / "x.jinja").symlink_to(tmp_path / "private" / "x.jinja")
    with pytest.warns(UserWarning, match="symbolic link"):
        export(tmp_path / "lora", tmp_path / "merged", 2, format="merged", base_model=base_model)
    assert not (tmp_path / "merged" / "additional_chat_templates").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


@pytest.mark.parametrize("content", [None, "{"])
def test_a_base_model_without_a_tokenizer_is_merged(content: str | None, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    if content is not None:
        (tmp_path / "base" / "tokenizer.json").write_text(content)
    model = plain_adapter(tmp_path / "lora")
    with pytest.warns(UserWarning, match="no tokenizer"):
        export(
            tmp_path / "lora", tmp_path / "merged", 8, "merged", base_model=str(tmp_path / "base")
        )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), logits(model)) < 1e-5
