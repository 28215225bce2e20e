"""Check the library on a GPU against the CPU and plain PEFT, and time a training step there.

    make gpu
    python benchmarks/gpu.py --device cpu --small --out runs/gpu-cpu.json    # tries this script

Each check prints the relative difference and what is allowed. Then `train_step.py` measures the
135M model. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import train_step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from matryoshka_lora import NestedAdapter, Rule, load, nest
from matryoshka_lora.model.base_model import DTYPES, load_model

RANKS = (1, 2, 4, 8)
IDS = torch.arange(4, 84).reshape(4, 20)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXACT = 1e-4
"""By how much float32 may differ on another device."""


class Check(NamedTuple):
    """The relative difference of a comparison, and the most that is allowed."""

    name: str
    difference: float
    allowed: float


def make_base(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny Llama, which has the same weights everywhere."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(device, dtype).eval()


def make_adapter(
    device: str, rule: str | Rule = "lora", dtype: torch.dtype = torch.float32
) -> NestedAdapter:
    """Return a nested adapter with the same random factors everywhere, not yet reordered."""
    config = LoraConfig(r=RANKS[-1], lora_alpha=RANKS[-1], target_modules="all-linear")
    adapter = nest(get_peft_model(make_base(device, dtype), config), RANKS, rule=rule)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, (A, B) in adapter.layers.copy_factors().items():
        new_A = 0.1 * torch.randn(A.shape, generator=generator)
        new_B = 0.1 * torch.randn(B.shape, generator=generator)
        factors[name] = (new_A, new_B)
    adapter.layers.write_factors(factors)
    adapter.model.eval()
    return adapter


def logits(model: Any) -> Tensor:
    """Return the logits of fixed rows, in float64 on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS.to(device)).logits
    return output.double().cpu()


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def logits_by_rank(adapter: NestedAdapter) -> Tensor:
    """Return the logits at every nested rank."""
    outputs = []
    for rank in RANKS:
        adapter.set_rank(rank)
        outputs.append(logits(adapter.model))
    return torch.stack(outputs)


def check_ranks(device: str, folder: Path) -> Iterator[Check]:
    """Compare every rank with the CPU's: alone, in rows, in half precision, saved and exported."""
    cpu_adapter = make_adapter("cpu")
    cpu_adapter.reorder()
    expected = logits_by_rank(cpu_adapter)
    adapter = make_adapter(device)
    adapter.reorder()
    yield Check("every rank", relative_difference(logits_by_rank(adapter), expected), EXACT)
    with adapter.rows(RANKS):
        row_logits = logits(adapter.model)
    expected_rows = torch.stack([expected[row, row] for row in range(len(RANKS))])
    yield Check("a rank for each row", relative_difference(row_logits, expected_rows), EXACT)
    for dtype, allowed in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        half = make_adapter(device, dtype=dtype)
        half.reorder()
        difference = relative_difference(logits_by_rank(half), expected)
        yield Check(f"every rank in {dtype}", difference, allowed)
    adapter.save(folder / "saved")
    loaded = load(make_base(device), folder / "saved")
    yield Check("save and load", relative_difference(logits_by_rank(loaded), expected), EXACT)
    adapter.export(folder / "rank-4", 4)
    plain_model = PeftModel.from_pretrained(make_base(device), str(folder / "rank-4")).eval()
    difference = relative_difference(logits(plain_model), expected[RANKS.index(4)])
    yield Check("rank 4 in plain PEFT", difference, EXACT)


def check_order(device: str, folder: Path) -> Iterator[Check]:
    """Check that a step of the Trainer's default optimizer, a fused one, ends the order."""
    adapter = make_adapter(device)
    adapter.reorder()
    is_kept = adapter.order == "svd"
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    adapter.model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
    torch.optim.AdamW(parameters, lr=1e-5, fused=True).step()
    is_ended = adapter.order is None
    yield Check("a step ends the order", float(not (is_kept and is_ended)), 0.0)


def gradient_of_step(device: str, rule: str | Rule) -> Tensor:
    adapter = make_adapter(device, rule)
    adapter.draw(3, batch_size=len(IDS))
    adapter.model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
    gradients = [p.grad for p in adapter.model.parameters() if p.grad is not None]
    return torch.cat([gradient.double().cpu().flatten() for gradient in gradients])


def check_gradients(device: str, folder: Path) -> Iterator[Check]:
    """Compare a training step of each rule with the CPU's."""
    for name, rule in {"lora": "lora", **train_step.RULES}.items():
        difference = relative_difference(
            gradient_of_step(device, rule), gradient_of_step("cpu", rule)
        )
        yield Check(f"gradients of rule {name}", difference, EXACT)


def run_checks(device: str) -> list[Check]:
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        for function in (check_ranks, check_order, check_gradients):
            checks.extend(function(device, Path(folder)))
    return checks


def times(device: str, small: bool) -> dict[str, Any]:
    """Return what `train_step.py` measures; with ``small``, of a single layer."""
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
        print("This machine has no GPU, so nothing was run.")
        return
    checks = run_checks(options.device)
    for check in checks:
        print(f"{check.name}: {check.difference:.1e}, allowed {check.allowed:.0e}", flush=True)
    report = {
        "machine": train_step.machine(torch.device(options.device)),
        "checks": [check._asdict() for check in checks],
        "train_step": times(options.device, options.small),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [check.name for check in checks if not check.difference <= check.allowed]
    print(f"{options.out}: {len(failed)} of {len(checks)} checks failed", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
