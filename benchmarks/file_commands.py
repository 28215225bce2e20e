"""Measure CPU seconds and peak memory of the commands on files, each in a process of its own.

    python benchmarks/file_commands.py
    python benchmarks/file_commands.py --against /path/to/other/src

The inputs are random factors: a PEFT folder of 39 MB (rank 32, all linear layers of SmolLM2-135M,
fp32) and a single file of 209 MB (rank 64, the attention of Flux, bf16). With ``--against``, the
commands of another installation alternate with ours. The numbers are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# This process imports neither NumPy nor the package: the peak memory that the operating system
# reports for a child includes what its parent had when it was started.

FOLDER, FILE = "adapter", "flux.safetensors"
COMMANDS = {
    "--help": ["--help"],
    "info, 39 MB folder": ["info", FOLDER],
    "export --rank 4, 39 MB folder": ["export", FOLDER, "--rank", "4", "-o", "output"],
    "export --rank 16, 209 MB file": ["export", FILE, "--rank", "16", "-o", "output.safetensors"],
}
LAYER = "reorder one layer, 3072 x 3072, R = 64"

# Both print the median CPU seconds of reordering a layer. Version 0.3 computes with torch.
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
TORCH_LAYER_SCRIPT = """
import time
from statistics import median
import torch
from matryoshka_lora.factors import reorder_factors
torch.manual_seed(0)
torch.set_num_threads(1)
A, B = torch.randn(64, 3072), torch.randn(3072, 64)
seconds = []
for _ in range(21):
    start = time.process_time()
    reorder_factors(A, B)
    seconds.append(time.process_time() - start)
print(median(seconds))
"""


class Installation(NamedTuple):
    """A version of the package: an interpreter, and a source folder if it is not installed."""

    python: str
    source: Path | None = None

    @classmethod
    def from_argument(cls, path: str) -> Installation:
        """Return the installation of a Python executable, or of a source folder."""
        if Path(path).is_dir():
            return cls(sys.executable, Path(path).resolve())
        return cls(path)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its processes: default threads, and modules compiled only once."""
        environment = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
        # An installed package has bytecode. A source folder gets it in the first run.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if self.source:
            environment["PYTHONPATH"] = str(self.source)
        return environment

    @property
    def version(self) -> str:
        """The version of the package."""
        process = subprocess.run(
            [self.python, "-c", "import matryoshka_lora; print(matryoshka_lora.__version__)"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout.strip()


class Usage(NamedTuple):
    """What a process used."""

    cpu_seconds: float
    peak_MiB: float


def measure_command(installation: Installation, arguments: Sequence[str], folder: Path) -> Usage:
    """Run a command of the package and return what it used."""
    for output in ("output", "output.safetensors"):
        shutil.rmtree(folder / output, ignore_errors=True)
        (folder / output).unlink(missing_ok=True)
    process = subprocess.Popen(
        [installation.python, "-m", "matryoshka_lora", *arguments],
        cwd=folder,
        env=installation.environment,
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


def measure_layer(installation: Installation) -> float:
    """Return the CPU seconds of reordering one layer, on one thread."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installation.python, "-c", code],
            env=installation.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    process = run(LAYER_SCRIPT)
    if process.returncode != 0:
        process = run(TORCH_LAYER_SCRIPT)
        process.check_returncode()
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
    config = {
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
    for name in flux_attention_layers():
        add_factors(tensors, name, 64, 3072, 3072)
    for key, factor in tensors.items():
        tensors[key] = factor.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / FILE)


def measure(
    installations: dict[str, Installation], folder: Path, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the medians by command and installation. The installations alternate."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for command, arguments in COMMANDS.items():
        usages: dict[str, list[Usage]] = {name: [] for name in installations}
        for _ in range(repeats):
            for name, installation in installations.items():
                usages[name].append(measure_command(installation, arguments, folder))
        results[command] = {
            name: {
                "cpu_seconds": median(usage.cpu_seconds for usage in values),
                "peak_MiB": median(usage.peak_MiB for usage in values),
            }
            for name, values in usages.items()
        }
        print(command, json.dumps(results[command]), flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in installations}
    for _ in range(repeats):
        for name, installation in installations.items():
            seconds[name].append(measure_layer(installation))
    results[LAYER] = {name: {"cpu_seconds": median(values)} for name, values in seconds.items()}
    print(LAYER, json.dumps(results[LAYER]), flush=True)
    return results


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="Python executable or source folder of another version")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/file_commands.json"))
    parser.add_argument("--write-inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_inputs:
        write_inputs(options.write_inputs)
        return
    installations = {"this": Installation(sys.executable)}
    if options.against:
        installations["other"] = Installation.from_argument(options.against)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write-inputs", folder], check=True)
        results = measure(installations, Path(folder), options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: installation.version for name, installation in installations.items()}
    document = {"cores": os.cpu_count(), "versions": versions, "commands": results}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
