"""Measure CPU seconds and peak memory of the commands on files, each in a process of its own.

    make bench-files

The inputs are random factors: a PEFT folder of 39 MB (rank 32, all linear layers of SmolLM2-135M,
fp32), a single file of 209 MB (rank 64, the attention of Flux, bf16), and a folder of 794 small
layers of different ranks. The numbers are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# This process imports neither NumPy nor the package: the peak memory that the operating system
# reports for a child includes what its parent had when it was started.

FOLDER, FILE, MANY_RANKS = "adapter", "flux.safetensors", "many-ranks"
COMMANDS = {
    "--help": ["--help"],
    "info, 39 MB folder": ["info", FOLDER],
    "info, 794 layers of different ranks": ["info", MANY_RANKS],
    "export --rank 4, 39 MB folder": ["export", FOLDER, "--rank", "4", "-o", "output"],
    "export --rank 16, 209 MB file": ["export", FILE, "--rank", "16", "-o", "output.safetensors"],
}
LAYER = "reorder one layer, 3072 x 3072, R = 64"

# Prints the median CPU seconds of reordering a layer.
LAYER_SCRIPT = """
import time
from statistics import median
import numpy as np
from threadpoolctl import threadpool_limits
from matryoshka_lora.linalg.factors import reorder_factors
generator = np.random.default_rng(0)
A = generator.standard_normal((64, 3072), dtype=np.float32)
B = generator.standard_normal((3072, 64), dtype=np.float32)
seconds = []
with threadpool_limits(1, "blas"):
    for _ in range(21):
        start = time.process_time()
        reorder_factors(A, B)
        seconds.append(time.process_time() - start)
print(median(seconds))
"""


class Usage(NamedTuple):
    """The resources that a process used."""

    cpu_seconds: float
    peak_MiB: float


def environment() -> dict[str, str]:
    """Return the environment of a process: default threads, and modules compiled only once."""
    variables = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables


def measure_command(arguments: Sequence[str], folder: Path) -> Usage:
    """Run a command of the package and return the resources that it used."""
    for output in ("output", "output.safetensors"):
        shutil.rmtree(folder / output, ignore_errors=True)
        (folder / output).unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "matryoshka_lora", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{errors.decode()}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**20)


def measure_layer() -> float:
    """Return the CPU seconds of reordering one layer, on one thread."""
    process = subprocess.run(
        [sys.executable, "-c", LAYER_SCRIPT],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(process.stdout)


def flux_attention_layers() -> Iterator[str]:
    """Yield the names of the 3072 x 3072 layers of Flux's attention, as diffusers names them."""
    projections = ["to_q", "to_k", "to_v"]
    added_projections = ["add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    for index in range(19):
        for name in projections + added_projections:
            yield f"transformer.transformer_blocks.{index}.attn.{name}"
    for index in range(38):
        for name in projections:
            yield f"transformer.single_transformer_blocks.{index}.attn.{name}"


def smollm_layers() -> Iterator[tuple[str, int, int]]:
    """Yield name, in and out of the linear layers of SmolLM2-135M."""
    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    }
    for index in range(30):
        for name, (in_features, out_features) in shapes.items():
            yield f"model.layers.{index}.{name}", in_features, out_features


def write_inputs(folder: Path) -> None:
    """Write the PEFT folder and the single file, with random factors."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)

    def add_factors(
        tensors: dict[str, Any], key: str, rank: int, in_features: int, out_features: int
    ) -> None:
        A = generator.standard_normal((rank, in_features), dtype=np.float32)
        B = generator.standard_normal((out_features, rank), dtype=np.float32)
        B *= np.logspace(0, -1.5, rank, dtype=np.float32)  # decreasing, as in trained adapters
        tensors[f"{key}.lora_A.weight"] = A
        tensors[f"{key}.lora_B.weight"] = B

    tensors: dict[str, Any] = {}
    for name, in_features, out_features in smollm_layers():
        add_factors(tensors, f"base_model.model.{name}", 32, in_features, out_features)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 32,
        "lora_alpha": 32,
        "target_modules": "all-linear",
    }
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / FOLDER / "adapter_model.safetensors")

    tensors = {}
    ranks: dict[str, int] = {}
    for index in range(794):
        name = f"blocks.{index}.proj"
        ranks[f"^{re.escape(name)}"] = rank = 1 + index % 7
        add_factors(tensors, f"base_model.model.{name}", rank, 32, 32)
    (folder / MANY_RANKS).mkdir()
    config |= {"r": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    (folder / MANY_RANKS / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / MANY_RANKS / "adapter_model.safetensors")

    tensors = {}
    for name in flux_attention_layers():
        add_factors(tensors, name, 64, 3072, 3072)
    for key, factor in tensors.items():
        tensors[key] = factor.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / FILE)


def measure(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians by command."""
    results: dict[str, dict[str, float]] = {}
    for command, arguments in COMMANDS.items():
        usages = [measure_command(arguments, folder) for _ in range(repeats)]
        results[command] = {
            "cpu_seconds": median(usage.cpu_seconds for usage in usages),
            "peak_MiB": median(usage.peak_MiB for usage in usages),
        }
        print(command, json.dumps(results[command]), flush=True)
    results[LAYER] = {"cpu_seconds": median(measure_layer() for _ in range(repeats))}
    print(LAYER, json.dumps(results[LAYER]), flush=True)
    return results


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/file_commands.json"))
    parser.add_argument("--write-inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_inputs:
        write_inputs(options.write_inputs)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write-inputs", folder], check=True)
        results = measure(Path(folder), options.repeats)
    document = {
        "cores": os.cpu_count(),
        "version": version("matryoshka-lora"),
        "commands": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
