"""A TRL script as you have it, and three lines more.

python examples/train_with_trl.py --steps 80 --out runs/trl
"""

from __future__ import annotations

import argparse

from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import Nesting, learn_from_trainer, nest
from matryoshka_lora.models import load_model, load_tokenizer
from matryoshka_lora.data.sources import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--order-steps", type=int, default=40)
parser.add_argument("--out", default="runs/trl")
args = parser.parse_args()

base, tokenizer = load_model(), load_tokenizer()
data = load_data({"task": "family_relationships", "size": 8 * args.steps})
model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

adapter = nest(model, Nesting.powers_of_two(32))  # 1

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
    callbacks=[adapter.callback()],  # 2
)
trainer.train()

learn_from_trainer(adapter, trainer, steps=args.order_steps)  # or, in a second and without data, adapter.reorder()
adapter.save(args.out)  # 3

print(f"{args.out} serves any rank from 1 to 32. Next: matryoshka info {args.out}")
