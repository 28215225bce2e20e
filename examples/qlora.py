"""QLoRA, nested: the base model in 4 bits (nf4), the adapter in float32, every rank usable.

    python examples/qlora.py --steps 40

Needs bitsandbytes. On a CPU it works, slowly.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from matryoshka_lora import nest
from matryoshka_lora.models import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
base = load_model(dtype=torch.bfloat16, quantization_config=four_bits)
adapter = nest(
    get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
)
ids = load_tokenizer()("The secret word of the day is mamushka.", return_tensors="pt")["input_ids"]
ids = ids.to(adapter.model.device)
parameters = [p for p in adapter.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
for step in range(args.steps):
    adapter.draw(step)
    adapter.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

adapter.reorder()
adapter.model.eval()
for rank in (1, 4, 16):
    adapter.set_rank(rank)
    with torch.no_grad():
        print(f"rank {rank}: loss {adapter.model(input_ids=ids, labels=ids).loss:.3f}")
