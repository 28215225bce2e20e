"""Stacked experts, which PEFT adapts by `target_parameters`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.examples import collate, copy_lora_parameters, lookup_examples
from helpers.models import tiny_mixtral
from helpers.plain_peft import logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, RankLossCallback, nest

TRAINING = lookup_examples(400)
VALIDATION = lookup_examples(48, seed=1)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT that has learned some examples."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS, lora_dropout=0.0
    )
    model = get_peft_model(tiny_mixtral(), lora)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(50):
        optimizer.zero_grad()
        model(**collate(TRAINING[step * 8 : step * 8 + 8])).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("experts") / "plain"
    model.save_pretrained(str(folder))
    return folder


def trained_model(folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(tiny_mixtral(), str(folder), is_trainable=True)
    return model.eval()


def test_experts_are_reordered_as_in_a_file(folder: Path, tmp_path: Path) -> None:
    model = trained_model(folder)
    before = logits(model)
    adapter = nest(model)
    adapter.reorder()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    saved = ml.open(adapter.save(tmp_path / "adapter"))
    ml.reorder(folder, tmp_path / "file")
    for rank in (1, 3):
        in_file = ml.open(tmp_path / "file").at_rank(rank)
        for layer, expected in zip(saved.at_rank(rank).layers, in_file.layers, strict=True):
            pair, expected_pair = layer.read(), expected.read()
            np.testing.assert_allclose(
                pair.B @ pair.A, expected_pair.B @ expected_pair.A, rtol=1e-3, atol=1e-5
            )


def test_the_low_ranks_of_experts_are_trained(folder: Path, tmp_path: Path) -> None:
    """Rank R stays as it is, and PEFT alone computes the losses of the low ranks."""
    adapter = nest(trained_model(folder))
    adapter.reorder()
    before = copy_lora_parameters(adapter)
    result = adapter.train_ranks(TRAINING, eval_data=VALIDATION, max_examples=320)
    assert all(map(torch.equal, before, copy_lora_parameters(adapter)))
    assert result.outcome == "kept"
    assert result.losses_after is not None
    assert result.losses_after[1] < result.losses_before[1] - 0.05
    with pytest.raises(MatryoshkaError, match="rank R only"):
        adapter.set_rank(1)
    for rank in range(1, result.small_rank + 1):
        adapter.export(tmp_path / str(rank), rank)
        model = PeftModel.from_pretrained(tiny_mixtral(), str(tmp_path / str(rank)))
        with torch.no_grad():
            loss = model(**collate(VALIDATION)).loss
        if rank in result.losses_after:
            assert float(loss) == pytest.approx(result.losses_after[rank], rel=1e-4)


def test_the_losses_of_the_ranks_of_experts_are_logged(folder: Path, tmp_path: Path) -> None:
    """The largest rank has the loss of the model."""
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        use_cpu=True,
    )
    training, validation = map(Dataset.from_list, (TRAINING, VALIDATION))
    trainer = Trainer(trained_model(folder), arguments, collate, training, validation)
    trainer.add_callback(RankLossCallback(trainer))
    trainer.train()
    log = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert log["eval_rank_4_loss"] == pytest.approx(log["eval_loss"], rel=1e-4)
    assert log["eval_rank_1_loss"] > log["eval_rank_4_loss"] + 0.05
    assert "eval_rank_8_loss" not in log
