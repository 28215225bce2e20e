"""One model in memory, a rank for each request, in three ways.

python examples/rank_per_request.py --adapter runs/demo/adapter
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
parser.add_argument("--adapter", type=Path, default=Path("runs/demo/adapter"))
args = parser.parse_args()

tokenizer = load_tokenizer()
adapter = load(load_model(dtype=torch.float32), args.adapter)
low, high = adapter.ranks[0], adapter.ranks[-1]
prompt = torch.tensor([tokenizer("How is a mother's brother called?")["input_ids"]])


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
    print(f"rank {rank}: in a batch of two ranks, the logits differ by {(row - one_by_one[rank]).abs().max():.1g}")

# 3. Where only PEFT is installed: its hotswap puts another slice into the same, perhaps compiled, model.
with tempfile.TemporaryDirectory() as folder:
    for rank in (low, high):
        adapter.export(Path(folder) / f"rank-{rank}", rank)
    plain = PeftModel.from_pretrained(load_model(dtype=torch.float32), Path(folder) / f"rank-{high}").eval()
    prepare_model_for_compiled_hotswap(plain, target_rank=high)
    hotswap_adapter(plain, str(Path(folder) / f"rank-{low}"), adapter_name="default", torch_device="cpu")
    difference = (last_logits(plain, prompt)[0] - one_by_one[low]).abs().max()
    print(f"rank {low}: hot-swapped into plain PEFT, the logits differ by {difference:.1g}")
