"""QLoRA, nested: the base model in 4 bits (nf4), the adapter in float32, every rank of it usable afterwards.

    python examples/qlora.py --steps 40 --out runs/qlora

Needs bitsandbytes. On a CPU it works, slowly.
"""

from __future__ import annotations

import argparse

import torch

from matryoshka_lora.training import make_config, train

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--reorder", choices=("trained", "learned", "svd"), default="trained", help="svd takes a second")
parser.add_argument("--out", default="runs/qlora")
args = parser.parse_args()

adapter = train(
    make_config(
        {
            "quantization": "nf4",
            "data": {"task": "family_relationships", "size": 4 * args.steps},
            "lora": {"r": 16},
            "nesting": {"reorder": args.reorder},
            "output_dir": args.out,
            "max_steps": args.steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
        }
    )
)
for rank in (1, 4, 16):
    adapter.set_rank(rank)
    with torch.no_grad():
        logits = adapter.model(input_ids=torch.arange(100, 132)[None]).logits
    print(f"rank {rank}: the largest logit is {logits.max():.3f}")
print(f"The ranks of {args.out} are {adapter.ranks[0]} to {adapter.ranks[-1]}. Next: matryoshka info {args.out}")
