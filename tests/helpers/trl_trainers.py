"""TRL's trainers of every kind, with a tiny model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from helpers.models import lora_config, tiny_llama
from helpers.tiny_chat import tiny_tokenizer
from matryoshka_lora import NestedAdapter, Nesting

NESTING = Nesting((1, 2, 4), "sqrt", 1.5)
TOKENIZER = tiny_tokenizer()
COLUMNS: dict[str, list[Any]] = {
    "prompt": [f"{a}+1=" for a in range(8)],
    "chosen": [f"{a + 1}" for a in range(8)],
    "rejected": [f"{a + 3}!" for a in range(8)],
    "completion": [f"{a + 1}" for a in range(8)],
    "label": [True, False] * 4,
}
TRAINERS: dict[str, tuple[Any, Any, list[str]]] = {
    "sft": (SFTTrainer, SFTConfig, ["prompt", "completion"]),
    "dpo": (DPOTrainer, DPOConfig, ["prompt", "chosen", "rejected"]),
    "kto": (KTOTrainer, KTOConfig, ["prompt", "completion", "label"]),
    "reward": (RewardTrainer, RewardConfig, ["chosen", "rejected"]),
    "grpo": (GRPOTrainer, GRPOConfig, ["prompt"]),
}
GRPO_ARGUMENTS = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}


def number_of_letters(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward many different letters."""
    return [float(len(set(completion))) for completion in completions]


def make_peft_model(kind: str = "sft", **lora: Any) -> PeftModel:
    base_model: Any = tiny_llama(
        vocab_size=len(TOKENIZER),
        num_hidden_layers=1,
        initializer_range=0.1,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        num_labels=1,
    )
    task_type = "CAUSAL_LM"
    if kind == "reward":
        base_model = LlamaForSequenceClassification(base_model.config)
        task_type = "SEQ_CLS"
    torch.manual_seed(3)  # of A
    return get_peft_model(base_model, lora_config(NESTING, task_type=task_type, **lora))


def make_trainer(
    kind: str, model: Any, folder: Path, adapter: NestedAdapter | None = None, **arguments: Any
) -> Any:
    trainer_class, config_class, columns = TRAINERS[kind]
    dataset = Dataset.from_dict({column: COLUMNS[column] for column in columns})
    defaults: dict[str, Any] = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    options: dict[str, Any] = {}
    if kind == "grpo":
        defaults.update(GRPO_ARGUMENTS)
        options["reward_funcs"] = number_of_letters
    if "eval_strategy" in arguments:
        options["eval_dataset"] = dataset
    set_seed(0)
    return trainer_class(
        model,
        args=config_class(str(folder), **{**defaults, **arguments}),
        train_dataset=dataset,
        processing_class=TOKENIZER,
        callbacks=[adapter.callback()] if adapter else [],
        **options,
    )
