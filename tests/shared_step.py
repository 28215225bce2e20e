"""One of several processes that share a step: ``shared_step.py MEETING RANK PROCESSES``, run by tests/test_order.py.

Prints a line of JSON: how often the model was passed through, and how far loss and gradients are from those of a step
that this process computes alone.
"""

from __future__ import annotations

import json
import sys

import torch
from conftest import LINEAR_LAYERS, tiny_llama
from peft import LoraConfig, get_peft_model

from matryoshka_lora import nest
from matryoshka_lora.adapter.in_model import InModel
from matryoshka_lora.reordering.descent import gradients_at, learning, loss_at
from matryoshka_lora.reordering.model import Part

meeting, rank, processes = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(processes))
torch.manual_seed(0)
model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=LINEAR_LAYERS, init_lora_weights=False))
adapter = InModel(nest(model).model, "default")
ids = torch.randint(3, 60, (6, 7))
ranks, sizes, passes = [1, 2, 2, 1, 2, 1], (2, 1, 1, 1, 1), 0


def parts(shared: bool) -> list[Part]:
    def part(rows: torch.Tensor, weight: float) -> Part:
        def loss() -> torch.Tensor:
            global passes
            passes += 1
            # The mean over no token.
            return model(input_ids=rows, labels=rows).loss * (1 if weight else float("nan"))

        return Part(len(rows), weight, None, loss, shared)

    # The second part has nothing to learn.
    return [part(rows, 0 if number == 1 else 6.0 * len(rows)) for number, rows in enumerate(ids.split(sizes))]


with learning(adapter):
    alone, loss_alone = gradients_at(adapter, parts(False), ranks), loss_at(adapter, parts(False), ranks)
    passes = 0
    shared = gradients_at(adapter, parts(True), ranks)
    found = passes
    loss = loss_at(adapter, parts(True), ranks)
pairs = [(ours, one) for name in alone for ours, one in zip(shared[name], alone[name], strict=True)]
far = max(float((ours - one).norm() / (one.norm() + 1e-9)) for ours, one in pairs)
print(json.dumps({"passes": found, "gradients": far, "loss": abs(loss - loss_alone), "size": loss_alone}))
torch.distributed.destroy_process_group()
