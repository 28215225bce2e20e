"""Measure training steps on a GPU: every variant of `train_step.py`, and the one of `trl_step.py`.

    make gpu
    python benchmarks/gpu.py --small --out runs/gpu-small.json    # tries this script on any device

`tests/device` checks the results there; ``make gpu`` runs it first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import train_step
import trl_step

from matryoshka_lora.peft.base_model import load_model


def measure_train_step(device: torch.device, small: bool) -> dict[str, Any]:
    """Return what `train_step.py` measures; with ``small``, of a single layer at one rank."""
    results: dict[str, Any] = {}
    for dtype in ("bf16", "fp32"):
        for rank in (32,) if small else train_step.RANKS:
            model = load_model(dtype=dtype, device=device).requires_grad_(False)
            if small:
                model.model.layers = model.model.layers[:1]
            results[f"{dtype}, R = {rank}"] = train_step.measure(model, rank, 1 if small else 5)
    return results


def measure_trl_step(small: bool) -> dict[str, Any]:
    """Return what `trl_step.py` measures; with ``small``, of short rows in one setting."""
    settings = ["fp32"] if small else list(trl_step.SETTINGS)
    tokens, repeats = (8, 1) if small else (128, 5)
    return {setting: trl_step.measure(tokens, repeats, setting) for setting in settings}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="measure very little, on any device")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    if not (options.small or torch.cuda.is_available()):
        sys.exit("This machine has no GPU. Pass --small to try the script without one.")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    report = {
        "machine": train_step.machine(device),
        "train_step": measure_train_step(device, options.small),
        "trl_step": measure_trl_step(options.small),
    }
    text = json.dumps(report, indent=1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
