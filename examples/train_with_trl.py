"""A TRL script with four more lines: the adapter can then be used at every rank.

python examples/train_with_trl.py --steps 80 --output runs/trl
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
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
config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(load_model(), config)

adapter = nest(model)  # 1 of 4

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_list(examples).shuffle(seed=0),
    processing_class=load_tokenizer(),
    callbacks=[adapter.callback()],  # 2 of 4
)
trainer.train()

adapter.reorder()  # 3 of 4; adapter.train_ranks(trainer) then trains on half as many examples
adapter.save(f"{args.output}/adapter")  # 4 of 4
print(f"Next: matryoshka info {args.output}/adapter")
