"""The block of docs/serve.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from research.blocks.shared import block

# By name, the rank, and the ratio of each singular value to the one before.
_ADAPTERS = {"chat": (64, 0.96), "code": (32, 0.9), "summaries": (16, 0.8)}


def _save_adapter(folder: Path, rank: int, ratio: float) -> None:
    """Write an adapter of SmolLM2-135M's queries and values with known singular values."""
    tensors: dict[str, np.ndarray] = {}
    for number in range(30):
        for module, outputs in (("q_proj", 576), ("v_proj", 192)):
            key = f"base_model.model.model.layers.{number}.self_attn.{module}"
            values = (ratio ** np.arange(rank)).astype(np.float32)
            tensors[f"{key}.lora_A.weight"] = np.eye(rank, 576, dtype=np.float32)
            tensors[f"{key}.lora_B.weight"] = np.eye(outputs, rank, dtype=np.float32) * values
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))


@block
def serve_plan() -> str:
    """The output of the commands for three adapters."""
    info, serve = "info loras --error 20%", "serve small --dry-run"
    outputs = run_on_three_adapters(info, "export loras --error 20% --for-vllm -o small", serve)
    lines = [f"$ matryoshka {command}\n{outputs[command]}" for command in (info, serve)]
    return "\n```text\n" + "\n".join(lines) + "```\n"


def run_on_three_adapters(*commands: str) -> dict[str, str]:
    """Run commands of `matryoshka` next to a folder ``loras``, and return what they print."""
    outputs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (rank, ratio) in _ADAPTERS.items():
            _save_adapter(Path(folder, "loras", name), rank, ratio)
        for command in commands:
            words = [sys.executable, "-m", "matryoshka_lora", *command.split()]
            outputs[command] = subprocess.run(
                words, capture_output=True, text=True, check=True, cwd=folder
            ).stdout
    return outputs
