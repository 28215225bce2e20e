"""Measure what a training step costs, as a multiple of the frozen model alone.

    make bench-train
    python benchmarks/train_step.py --dtype bf16 --rank 32 --repeats 5

The baseline is the frozen base model: forward, and backward through its activations only. Every
variant adds its adapter to all linear layers of the same weights and does the same: 8 rows of 128
tokens, to the logits, and back from a fixed gradient of the logits, so that no variant can gain or
lose by its loss. Time is CPU time of one thread, and on a GPU wall time. The variants alternate in
one process, and each number is the median of the ratios to the baseline's run of the same turn.
Saved bytes are the distinct storages that autograd's graph keeps between forward and backward,
without parameters. On a GPU there is also the most memory that a step allocates, with the weights
of all variants.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from matryoshka_lora import Nesting, Rule, nest
from matryoshka_lora.peft.base_model import load_model

ROWS, TOKENS = 8, 128
RANKS = (8, 32, 128, 256)


def rank_per_row(nesting: Nesting, rng: random.Random, batch_size: int) -> NDArray[np.float64]:
    """Return the prefix of a random nested rank for each row."""
    return np.stack([nesting.prefix(rng.choice(nesting.ranks)) for _ in range(batch_size)])


RULES: dict[str, str | Rule] = {
    "matryoshka": "matryoshka",
    "rank-per-row": Rule("rank-per-row", rank_per_row),
    "dylora": "dylora",
}


class Published(nn.Module):
    """The paper's form by its formula: ``W x + B (P A) x``, where ``A P`` is computed each time."""

    def __init__(self, base: nn.Linear, rank: int, p: Tensor) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(base.in_features, rank, device=device) / rank**0.5)
        self.B = nn.Parameter(torch.zeros(rank, base.out_features, device=device))
        self.register_buffer("p", p.float().to(device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + x.to(self.A.dtype) @ (self.A * self.p) @ self.B).to(y.dtype)


def copy_modules(model: nn.Module) -> Any:
    """Return a copy of the modules on the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_peft(base: nn.Module, rank: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(copy_modules(base), config)


def nested(base: nn.Module, rank: int, rule: str | Rule) -> Any:
    model = with_peft(base, rank)
    nest(model, rule=rule).draw(0, batch_size=ROWS)
    return model


def published(base: nn.Module, rank: int) -> Any:
    model = copy_modules(base)
    p = torch.from_numpy(Nesting.powers_of_two(rank).diagonal())
    for _, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(module, name, Published(child, rank, p))
    return model


def make_variants(base: nn.Module, rank: int) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Return models by name, each with the context of its forward."""
    peft_model = with_peft(base, rank)
    device_type = base.device.type
    variants: dict[str, tuple[Any, Callable[[], Any]]] = {
        "floor": (copy_modules(base), nullcontext),
        "peft": (peft_model, nullcontext),
        "peft-autocast": (peft_model, lambda: torch.autocast(device_type, torch.bfloat16)),
        "published": (published(base, rank), nullcontext),
    }
    for name, rule in RULES.items():
        variants[name] = (nested(base, rank, rule), nullcontext)
    return variants


def saved_by_autograd(output: Tensor) -> list[Tensor]:
    """Return every tensor that the backward pass of an output will need.

    They are read from autograd's graph: under hooks on saved tensors, the fused operation would
    save other ones.
    """
    tensors: list[Tensor] = []
    seen: set[Any] = set()
    nodes: list[Any] = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(next_node for next_node, _ in node.next_functions)
        values = list(getattr(node, "saved_tensors", ()))
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                values.extend(value if isinstance(value, (list, tuple)) else [value])
        tensors.extend(value for value in values if isinstance(value, Tensor))
    return tensors


def now(device: torch.device) -> float:
    """Return seconds: CPU time on a CPU, and wall time once a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def saved_bytes(model: Any, logits: Tensor) -> int:
    """Return the bytes of the distinct storages that autograd keeps, without the model's own."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    for tensor in saved_by_autograd(logits):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def step(
    model: Any, inputs: Tensor, context: Callable[[], Any], gradient: Tensor
) -> tuple[float, int]:
    """Return the seconds of a step, and on a GPU the most memory that it allocates."""
    is_gpu = inputs.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(inputs.device)
    start = now(inputs.device)
    with context():
        logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.backward(gradient.to(logits.dtype))
    seconds = now(inputs.device) - start
    for parameter in (*model.parameters(), inputs):
        parameter.grad = None
    return seconds, torch.cuda.max_memory_allocated(inputs.device) if is_gpu else 0


def measure(base: nn.Module, rank: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Return the time and the saved bytes of every variant; they alternate."""
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (ROWS, TOKENS)).to(base.device)
    inputs = base.get_input_embeddings()(ids).detach().requires_grad_()
    models = make_variants(base, rank)
    saved: dict[str, int] = {}
    for name, (model, context) in models.items():
        model.train()
        with context():
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        saved[name] = saved_bytes(model, logits)
    gradient = torch.randn_like(logits) / logits.numel()
    del logits

    times: dict[str, list[float]] = {name: [] for name in models}
    peak = dict.fromkeys(models, 0)
    for turn in range(repeats + 1):
        for name, (model, context) in models.items():
            seconds, peak[name] = step(model, inputs, context, gradient)
            if turn > 0:  # the first turn warms up
                times[name].append(seconds)
    report = {}
    for name, seconds_by_turn in times.items():
        ratios = [a / b for a, b in zip(seconds_by_turn, times["floor"], strict=True)]
        report[name] = {
            "time": round(statistics.median(ratios), 3),
            "saved": round(saved[name] / saved["floor"], 3),
            "time_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "seconds": round(statistics.median(seconds_by_turn), 6),
            "saved_mib": round(saved[name] / 2**20, 1),
        }
        if peak[name]:
            report[name]["peak_gib"] = round(peak[name] / 2**30, 3)
    return report


def machine(device: torch.device) -> str:
    """Return the hardware and the version of torch."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        return f"{gpu}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    cpu = platform.processor()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        match = re.search(r"model name\s*: (.*)", cpu_info.read_text())
        cpu = match[1] if match else cpu
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{cpu}, one thread, {instructions}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: both")
    parser.add_argument("--rank", type=int, help=f"default: {', '.join(map(str, RANKS))}")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns (default: 5)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each cell")
    parser.add_argument(
        "--out",
        type=Path,
        help="also write the cells to this JSON file, and skip those that it has",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cells = json.loads(args.out.read_text())["cells"] if args.out and args.out.exists() else []
    done = {(cell["dtype"], cell["rank"]) for cell in cells}
    for dtype in [args.dtype] if args.dtype else ["bf16", "fp32"]:
        base = load_model(dtype=dtype, device=args.device).requires_grad_(False)
        for rank in [args.rank] if args.rank else RANKS:
            if (dtype, rank) in done:
                continue
            cell = {"dtype": dtype, "rank": rank, "variants": measure(base, rank, args.repeats)}
            cells.append(cell)
            print(json.dumps(cell) if args.json else _table(cell), flush=True)
            if args.out:
                report = {"machine": machine(args.device), "cells": cells}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")


def _table(cell: dict[str, Any]) -> str:
    lines = [
        f"\n{cell['dtype']}, R = {cell['rank']}, {ROWS} x {TOKENS} tokens",
        f"{'':14}   time (min-max)       saved",
    ]
    for name, result in cell["variants"].items():
        low, high = result["time_min_max"]
        lines.append(
            f"{name:14} {result['time']:6.2f} ({low:.2f}-{high:.2f})   {result['saved']:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
