"""The losses of the ranks in the log of a Trainer, during its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.examples import collate, copy_lora_parameters, lookup_examples, loss_at_rank
from helpers.models import tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from matryoshka_lora import MatryoshkaError, RankLossCallback, nest

EVALUATION = lookup_examples(24, seed=1)


def make_trainer(folder: Path) -> Trainer:
    set_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=4, lora_dropout=0.1))
    arguments = TrainingArguments(
        str(folder),
        max_steps=9,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    training, evaluation = map(Dataset.from_list, (lookup_examples(80), EVALUATION))
    return Trainer(model, arguments, collate, training, evaluation)


def test_each_evaluation_logs_the_losses_and_the_training_is_the_same(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path)
    plain.train()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(RankLossCallback(trainer))
    trainer.train()
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    entries = [entry for entry in trainer.state.log_history if "eval_rank_1_loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    assert all(entry["eval_rank_losses_runtime"] > 0 for entry in entries)
    adapter = nest(trainer.model)
    adapter.reorder()
    for rank in (1, 2, 4):
        expected = loss_at_rank(adapter, EVALUATION, rank)
        assert entries[-1][f"eval_rank_{rank}_loss"] == pytest.approx(expected, rel=1e-5)
    # All examples have the same number of tokens, so the Trainer's mean is the same.
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(entries[-1]["eval_rank_4_loss"], rel=1e-5)


def test_an_evaluation_leaves_the_factors_and_the_modes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(RankLossCallback(trainer, ranks=[1, 3], max_examples=8))
    trainer.train()
    adapter = nest(trainer.model)
    before = copy_lora_parameters(adapter)
    trainer.model.train()
    trainer.evaluate()
    assert all(map(torch.equal, before, copy_lora_parameters(adapter)))
    assert "eval_rank_3_loss" in trainer.state.log_history[-1]


@pytest.mark.parametrize(
    ("has_evaluation", "options", "keyword"),
    [
        (False, {}, "eval_dataset"),
        (True, {"ranks": [1, 9]}, "9"),
        (True, {"adapter_name": "b"}, "b"),
    ],
)
def test_what_cannot_be_measured_is_an_error_when_the_training_begins(
    tmp_path: Path, has_evaluation: bool, options: dict[str, Any], keyword: str
) -> None:
    trainer = make_trainer(tmp_path)
    if not has_evaluation:
        trainer.eval_dataset = None
    trainer.add_callback(RankLossCallback(trainer, **options))
    with pytest.raises(MatryoshkaError, match=keyword):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_that_evaluates_nothing_is_warned_of(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.args.eval_strategy = "no"
    trainer.add_callback(RankLossCallback(trainer))
    with pytest.warns(UserWarning, match="eval_strategy"):
        trainer.train()
