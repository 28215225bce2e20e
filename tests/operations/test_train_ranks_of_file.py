"""`train_ranks` of a PEFT folder: plain PEFT computes as well with the output as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_peft import plain_adapter
from helpers.single_files import save_pairs
from helpers.tiny_chat import save_tiny_chat, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, export, train_ranks
from matryoshka_lora.lora_file.open import open_lora
from matryoshka_lora.training.data import read_training_data

EXAMPLES = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(64)]


def save_trained_adapter(folder: Path, base: Path) -> None:
    """Train an adapter with ranks by layer with PEFT and PyTorch alone."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}
    lora = plain_adapter(folder, model, r=4, **options)
    data = read_training_data(lora, EXAMPLES, tiny_tokenizer())
    parameters = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for batch in data.batches(range(64)) * 8:
        optimizer.zero_grad()
        data.loss(batch).backward()
        optimizer.step()
    lora.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def mean_loss(folder: Path, base: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(base)
    data = read_training_data(PeftModel.from_pretrained(model, folder), EXAMPLES, tiny_tokenizer())
    with torch.no_grad():
        return float(data.loss(data.batches(range(64))[0]))


@pytest.mark.slow
def test_every_rank_of_a_folder_is_trained(tmp_path: Path) -> None:
    base = save_tiny_chat(tmp_path / "base")
    save_trained_adapter(tmp_path / "lora", base)
    options: dict[str, Any] = {"base_model": str(base), "dtype": torch.float32}
    with pytest.raises(MatryoshkaError, match="source"):
        train_ranks(tmp_path / "lora", base, EXAMPLES, **options, force=True)
    output = tmp_path / "nested"
    result = train_ranks(tmp_path / "lora", output, EXAMPLES, max_examples=160, **options)
    assert (result.path, result.kept, result.num_examples) == (output, True, 160)
    nested = open_lora(output)
    assert (nested.order, nested.max_rank) == ("trained", 4)
    assert (output / "tokenizer_config.json").is_file()
    # Before the training the loss is 4.6.
    assert mean_loss(output, base) == pytest.approx(mean_loss(tmp_path / "lora", base), abs=0.05)
    with pytest.raises(MatryoshkaError, match="singular values"):
        export(output, tmp_path / "small", keep="90%")


def test_a_source_without_base_model_or_examples_is_rejected(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    save_pairs(tmp_path / "lora.safetensors", "a")
    for source, examples, keyword in (
        ("lora.safetensors", EXAMPLES, "single file"),
        ("lora", EXAMPLES, "base_model"),
        ("lora", [], "examples"),
    ):
        with pytest.raises(MatryoshkaError, match=keyword):
            train_ranks(tmp_path / source, tmp_path / "nested", examples)
