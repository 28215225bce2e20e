"""A Trainer's checkpoints are plain LoRA, and a resumed run ends as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.examples import make_trainer
from helpers.models import lora_config, nest_as, tiny_llama
from helpers.plain_peft import by_peft, is_close, logits
from helpers.rules import RANK_PER_ROW
from peft import get_peft_model

from matryoshka_lora import NestedAdapter, Nesting, Rule, load
from matryoshka_lora.rules import RULES

NESTING = Nesting((1, 3, 6), "sqrt", 1.7 / 6**0.5)


def train(adapter: NestedAdapter, folder: Path, checkpoint: Path | None = None) -> None:
    """Train for 6 steps, with checkpoints after 3 and 6."""
    ids = torch.randint(3, 90, (8, 7), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = make_trainer(
        adapter.model,
        folder,
        [{"input_ids": row, "labels": row} for row in ids],
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.add_callback(adapter.callback())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def make_adapter(rule: str | Rule, deploy: str = "reordered") -> NestedAdapter:
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(), lora_config(NESTING, task_type="CAUSAL_LM"))
    return nest_as(model, NESTING, rule, deploy=deploy, seed=11)


@pytest.mark.parametrize(
    ("rule", "deploy"),
    [
        (RULES["lora"], "reordered"),
        (RULES["matryoshka"], "reordered"),
        (RULES["matryoshka"], "paper"),
        (RULES["dylora"], "reordered"),
        (RANK_PER_ROW, "reordered"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    rule: Rule, deploy: str, tmp_path: Path
) -> None:
    adapter = make_adapter(rule, deploy)
    train(adapter, tmp_path)
    checkpoints = tmp_path / "trainer"
    # The checkpoints hold the function of eval mode; folding P is a rounding.
    expected = logits(adapter.model)
    is_folded = rule.name == "matryoshka" and deploy == "reordered"
    tolerance = 1e-5 if is_folded else 0.0
    assert is_close(by_peft(checkpoints / "checkpoint-6"), expected, tolerance)
    assert not is_close(by_peft(checkpoints / "checkpoint-3"), expected, 1e-3)
    resumed = make_adapter(rule, deploy)
    train(resumed, tmp_path, checkpoints / "checkpoint-3")
    factors = adapter.layer_factors()
    for name, (A, B) in resumed.layer_factors().items():
        assert is_close(A, factors[name][0], 100 * tolerance)
        assert is_close(B, factors[name][1], 100 * tolerance)


def test_training_starts_at_the_largest_rank(tmp_path: Path) -> None:
    adapter = make_adapter("lora")
    train(adapter, tmp_path)
    adapter.save(tmp_path / "a")
    adapter = load(tiny_llama(), tmp_path / "a", is_trainable=True)
    adapter.set_rank(2)
    train(adapter, tmp_path)
    assert (adapter.order, adapter.rank) == (None, 6)
