"""Check the library on a CUDA card against the CPU and plain PEFT, and time a training step there.

    make gpu
    python benchmarks/gpu.py --device cpu --small --out runs/gpu-cpu.json    # tries this script

Each check says the largest relative difference and what is allowed. Then `train_step.py` measures
the 135M model. The exit status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import train_step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from matryoshka_lora import NestedAdapter, load, nest
from matryoshka_lora.models import DTYPES, load_model

RANKS = (1, 2, 4, 8)
IDS = torch.arange(4, 84).reshape(4, 20)
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
EXACT = 1e-4
"""What float32 on another device may differ by."""


class Found(NamedTuple):
    """The largest relative difference of a comparison, and the most that is allowed."""

    name: str
    difference: float
    allowed: float


def base(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Llama, which has the same weights everywhere."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).to(device, dtype).eval()


def nested(device: str, rule: str = "lora", dtype: torch.dtype = torch.float32) -> NestedAdapter:
    """Return a nested adapter with the same random factors everywhere, not yet reordered."""
    config = LoraConfig(r=RANKS[-1], lora_alpha=RANKS[-1], target_modules="all-linear")
    adapter = nest(get_peft_model(base(device, dtype), config), RANKS, rule=rule)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, (A, B) in adapter.factors().items():
        new_A, new_B = (torch.randn(one.shape, generator=generator) for one in (A, B))
        factors[name] = (0.1 * new_A, 0.1 * new_B)
    adapter.put_factors(factors)
    adapter.model.eval()
    return adapter


def logits(model: Any) -> Tensor:
    """Return the logits of fixed rows, in float64 on the CPU."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS.to(next(model.parameters()).device)).logits
    return found.double().cpu()


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the relative difference."""
    return float((found - wanted).norm() / wanted.norm())


def each_rank(adapter: NestedAdapter) -> Tensor:
    """Return the logits at every nested rank."""
    found = []
    for rank in RANKS:
        adapter.set_rank(rank)
        found.append(logits(adapter.model))
    return torch.stack(found)


def ranks(device: str, folder: Path) -> Iterator[Found]:
    """Compare every rank with the CPU's, alone, in rows, in half precision, saved and exported."""
    adapters = {name: nested(name) for name in ("cpu", device)}
    for adapter in adapters.values():
        adapter.reorder()
    wanted, adapter = each_rank(adapters["cpu"]), adapters[device]
    yield Found("every rank", apart(each_rank(adapter), wanted), EXACT)
    with adapter.rows(RANKS):
        rows = logits(adapter.model)
    of_rows = torch.stack([wanted[place, place] for place in range(len(RANKS))])
    yield Found("a rank for each row", apart(rows, of_rows), EXACT)
    for dtype, allowed in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        half = nested(device, dtype=dtype)
        half.reorder()
        yield Found(f"every rank in {dtype}", apart(each_rank(half), wanted), allowed)
    adapter.save(folder / "saved")
    again = load(base(device), folder / "saved")
    yield Found("save and load", apart(each_rank(again), wanted), EXACT)
    adapter.export(folder / "rank-4", 4)
    plain = PeftModel.from_pretrained(base(device), str(folder / "rank-4")).eval()
    yield Found("rank 4 in plain PEFT", apart(logits(plain), wanted[RANKS.index(4)]), EXACT)


def gradients(device: str, folder: Path) -> Iterator[Found]:
    """Compare a training step of each rule with the CPU's."""
    for rule in ("lora", "matryoshka", "stratified", "dylora"):
        found = []
        for place in ("cpu", device):
            adapter = nested(place, rule)
            adapter.model.train()
            adapter.draw(3, rows=len(IDS))
            adapter.model(input_ids=IDS.to(place), labels=IDS.to(place)).loss.backward()
            grads = [p.grad for p in adapter.model.parameters() if p.requires_grad]
            found.append(torch.cat([grad.double().cpu().flatten() for grad in grads]))
        yield Found(f"gradients of rule {rule}", apart(found[1], found[0]), EXACT)


CHECKS: tuple[Callable[[str, Path], Iterator[Found]], ...] = (ranks, gradients)


def times(device: str, small: bool) -> dict[str, Any]:
    """Return what `train_step.py` measures."""
    report: dict[str, Any] = {}
    for dtype in ("bf16", "fp32"):
        for rank in (32,) if small else train_step.RANKS:
            model = load_model(dtype=DTYPES[dtype], device=device).requires_grad_(False)
            if small:
                model.model.layers = model.model.layers[:1]
            report[f"{dtype}, R = {rank}"] = train_step.measure(model, rank, 1 if small else 5)
    return report


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="measure very little")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA card on this machine, so nothing was run.")
        return
    with tempfile.TemporaryDirectory() as folder:
        checks = [one for check in CHECKS for one in check(options.device, Path(folder))]
    for one in checks:
        print(f"{one.name}: {one.difference:.1e}, allowed {one.allowed:.0e}", flush=True)
    report = {
        "machine": train_step.machine(torch.device(options.device)),
        "checks": [one._asdict() for one in checks],
        "train_step": times(options.device, options.small),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [one.name for one in checks if not one.difference <= one.allowed]
    print(f"{options.out}: {len(failed)} of {len(checks)} checks failed", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
