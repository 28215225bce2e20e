"""A TRL script as you have it, and four calls more.

python examples/train_with_trl.py --steps 80 --out runs/trl
"""

from __future__ import annotations

import argparse

from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import nest
from matryoshka_lora.data.sources import load_data
from matryoshka_lora.models import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--out", default="runs/trl")
args = parser.parse_args()

base, tokenizer = load_model(), load_tokenizer()
data = load_data({"task": "family_relationships", "size": 8 * args.steps})
model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

adapter = nest(model)  # 1 of 4

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[adapter.callback()],  # 2 of 4
)
trainer.train()

adapter.reorder()  # 3 of 4; or adapter.reorder("trained", trainer): better low ranks, for half as much training more
adapter.save(args.out)  # 4 of 4

print(f"{args.out} serves any rank from 1 to 32. Next: matryoshka info {args.out}")
