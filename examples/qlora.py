"""QLoRA with a custom training loop: a base model in 4 bits (nf4), an adapter in float32.

    python examples/qlora.py --steps 40

Needs bitsandbytes. It also works on a CPU, slowly.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from matryoshka_lora import nest
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
base_model = load_model(dtype=torch.bfloat16, quantization_config=quantization)
config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
adapter = nest(get_peft_model(base_model, config).train())

prompt = load_tokenizer()("The secret word of the day is mamushka.", return_tensors="pt")
input_ids = prompt["input_ids"].to(adapter.model.device)
parameters = [p for p in adapter.model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
for step in range(args.steps):
    adapter.draw(step)
    adapter.model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

adapter.reorder()
for rank in (1, 4, 16):
    adapter.set_rank(rank)
    with torch.no_grad():
        loss = adapter.model(input_ids=input_ids, labels=input_ids).loss
    print(f"rank {rank}: loss {loss:.3f}")
