"""What torch.compile (inductor) makes of a training step: time to compile, time of a step, recompilations.

    python benchmarks/compiled_step.py --layers 2

The first layers of SmolLM2-135M in bf16, R = 32, 8 rows of 128 tokens, one thread, compiled as one graph: a graph break
is an error. After the first step the rule draws other ranks, and a recompilation is an error too. Times are CPU time;
compiled and eager steps take turns, and each figure is a median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from train_step import ROWS, RULES, TOKENS, nested, share, with_peft

from matryoshka_lora import NestedAdapter
from matryoshka_lora.models import load_model

RANK, REPEATS = 32, 7


def step(model: Any, inputs: Tensor) -> float:
    start = time.process_time()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.backward(torch.full_like(logits, 1 / logits.numel()))
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds


def measure(model: Any, inputs: Tensor, adapter: NestedAdapter | None) -> dict[str, float]:
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    step(compiled, inputs)
    found: dict[str, list[float]] = {"compiled": [], "eager": []}
    compile_seconds = time.perf_counter() - start
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in range(REPEATS):
            if adapter is not None:
                adapter.draw(turn + 1, rows=ROWS)
            found["compiled"].append(step(compiled, inputs))
            found["eager"].append(step(model, inputs))
    medians = {name: round(statistics.median(seconds), 3) for name, seconds in found.items()}
    return {"compile_seconds": round(compile_seconds, 1), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of SmolLM2's 30 (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    base = load_model(dtype=torch.bfloat16).requires_grad_(False)
    base.model.layers = base.model.layers[: args.layers]
    base.config.num_hidden_layers = args.layers
    inputs = base.get_input_embeddings()(torch.randint(0, base.config.vocab_size, (ROWS, TOKENS))).detach()
    inputs.requires_grad_()
    models = {"floor": share(base), "peft": with_peft(base, RANK)}
    models |= {rule: nested(base, RANK, rule) for rule in RULES}
    for name, model in models.items():
        adapter = NestedAdapter(model) if name in RULES else None
        print(json.dumps({"variant": name, **measure(model, inputs, adapter)}), flush=True)


if __name__ == "__main__":
    main()
