"""A TRL script with three more lines: the adapter can then be used at every rank.

python examples/train_with_trl.py --steps 80 --output runs/trl
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import nest
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--output", default="runs/trl")
args = parser.parse_args()

examples = [
    {"prompt": f"{a} + {b} =", "completion": f" {a + b}"}
    for a in range(10, 60)
    for b in range(10, 60)
]
data = Dataset.from_list(examples).train_test_split(0.1, seed=0)
trainer = SFTTrainer(
    model=load_model(),
    args=SFTConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,  # on a GPU, omit it
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],  # chooses the ranks that are trained
    processing_class=load_tokenizer(),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
)
trainer.train()

adapter = nest(trainer.model)  # 1 of 3
print(adapter.train_ranks(trainer))  # 2 of 3; adapter.reorder() takes seconds, and trains nothing
folder = adapter.save(f"{args.output}/adapter")  # 3 of 3
print(f"Next: matryoshka info {folder}")
