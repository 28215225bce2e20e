"""One model in memory and another rank for each request, in three ways.

python examples/rank_per_request.py runs/demo/adapter --base-model runs/demo/base
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from matryoshka_lora import load
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("adapter", type=Path)
parser.add_argument("--base-model", help="the adapter's base model; default: the bundled one")
args = parser.parse_args()

adapter = load(load_model(args.base_model, torch.float32), args.adapter)
low_rank, high_rank = adapter.ranks[0], adapter.ranks[-1]
prompt = load_tokenizer(args.base_model)("Tobago: ", return_tensors="pt")["input_ids"]
prompt = prompt.to(adapter.model.device)


@torch.no_grad()
def last_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the next token, shape (rows, vocabulary)."""
    return model(input_ids=input_ids).logits[:, -1]


# 1. Between two calls. Nothing is copied, and nothing is compiled again.
expected = {}
for rank in (low_rank, high_rank):
    adapter.set_rank(rank)
    expected[rank] = last_logits(adapter.model, prompt)[0]

# 2. In one batch. Each row has its own rank, also in generate().
with adapter.rows([low_rank, high_rank]):
    logits = last_logits(adapter.model, prompt.repeat(2, 1))
for row, rank in zip(logits, (low_rank, high_rank), strict=True):
    difference = (row - expected[rank]).abs().max()
    print(f"rank {rank}: in a batch of two ranks, the logits differ by {difference:.1g}")

# 3. Where only PEFT is installed. Its hotswap loads another rank into the same, compiled model.
with tempfile.TemporaryDirectory() as folder:
    for rank in (low_rank, high_rank):
        adapter.export(f"{folder}/rank-{rank}", rank)
    base_model = load_model(args.base_model, torch.float32)
    plain_model = PeftModel.from_pretrained(base_model, f"{folder}/rank-{high_rank}").eval()
    prepare_model_for_compiled_hotswap(plain_model, target_rank=high_rank)
    hotswap_adapter(
        plain_model,
        f"{folder}/rank-{low_rank}",
        adapter_name="default",
        torch_device=str(adapter.model.device),
    )
    difference = (last_logits(plain_model, prompt)[0] - expected[low_rank]).abs().max()
    print(f"rank {low_rank}: hot-swapped into plain PEFT, the logits differ by {difference:.1g}")
