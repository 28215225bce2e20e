"""One model in memory, a rank for each request, in three ways.

python examples/rank_per_request.py runs/demo/adapter --base runs/demo/base
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from matryoshka_lora import load
from matryoshka_lora.models import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("adapter", type=Path)
parser.add_argument("--base", help="the adapter's base model; else the embedded one")
args = parser.parse_args()

adapter = load(load_model(args.base, torch.float32), args.adapter)
low, high = adapter.ranks[0], adapter.ranks[-1]
prompt = load_tokenizer(args.base)("Tobago: ", return_tensors="pt")["input_ids"]
prompt = prompt.to(adapter.model.device)


@torch.no_grad()
def last_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[:, -1]


# 1. Between two calls: nothing is copied and nothing recompiled.
one_by_one = {}
for rank in (low, high):
    adapter.set_rank(rank)
    one_by_one[rank] = last_logits(adapter.model, prompt)[0]

# 2. In one batch: each row has a rank of its own, in generate() too.
with adapter.rows([low, high]):
    together = last_logits(adapter.model, prompt.repeat(2, 1))
for row, rank in zip(together, (low, high), strict=True):
    difference = (row - one_by_one[rank]).abs().max()
    print(f"rank {rank}: in a batch of two ranks, the logits differ by {difference:.1g}")

# 3. Where only PEFT is installed: its hotswap puts another slice into the same (compiled) model.
with tempfile.TemporaryDirectory() as folder:
    for rank in (low, high):
        adapter.export(f"{folder}/rank-{rank}", rank)
    base = load_model(args.base, torch.float32)
    plain = PeftModel.from_pretrained(base, f"{folder}/rank-{high}").eval()
    prepare_model_for_compiled_hotswap(plain, target_rank=high)
    device = str(adapter.model.device)
    hotswap_adapter(plain, f"{folder}/rank-{low}", adapter_name="default", torch_device=device)
    difference = (last_logits(plain, prompt)[0] - one_by_one[low]).abs().max()
    print(f"rank {low}: hot-swapped into plain PEFT, the logits differ by {difference:.1g}")
