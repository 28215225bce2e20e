"""Compare the results of two versions of the package on random LoRA files.

    python tests/tools/compare_versions.py OLD_SRC [--count 100]

OLD_SRC is the source folder of the other version. Both export, reorder and combine the same random
files of every kind. Their outputs must have the same tensors, ranks, configs and metadata; the
updates of the layers and the reported errors may differ by 1e-6; in fp16 by one unit in the last
place, because torch, in version 0.3, rounds float64 twice: to float32 and then to float16. With
`max_bytes` the ranks may differ too: version 0.3 fills the room that is left with components whose
singular values are only rounding. If that changes the alpha of kohya, which is the largest rank,
the factors are rounded elsewhere, and may differ by one unit in the last place of bf16. A file that
one version rejects must be rejected by the other. The exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Array = NDArray[Any]
Tensors = dict[str, Array]

THIS_SRC = Path(__file__).resolve().parents[2] / "src"
TOLERANCE = 1e-6
FP16_TOLERANCE = 2.0**-10
BF16_TOLERANCE = 2.0**-7
DTYPES: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
}
NUM_EXPERTS = 3
KINDS = ("peft", "peft-experts", "kohya", "diffusers")
SUFFIXES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
    ".lora_down.weight": ".lora_up.weight",
}

# Runs in a process of each version: argv has the folder of inputs and that of outputs. It prints
# the errors that the version reports by the name of the output.
WORKER = """
import inspect, json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from matryoshka_lora import MatryoshkaError, combine, export, reorder

inputs, outputs = map(Path, sys.argv[1:])
reported = {}
# Version 0.3 calls it style.
key_format = "key_format" if "key_format" in inspect.signature(export).parameters else "style"

def run(name, operation, *arguments, **options):
    try:
        result = operation(*arguments, **options)
    except MatryoshkaError:
        reported[name] = "rejected"
        return
    errors = getattr(result, "errors", None)
    if errors is None:  # version 0.3
        errors = {0: result.error} if hasattr(result, "error") else {}
    reported[name] = list(errors.values())

for task_file in sorted(inputs.glob("*.json")):
    task = json.loads(task_file.read_text())
    source, other = inputs / task["source"], inputs / task["other"]
    name, suffix = task_file.stem, task["suffix"]
    def output(operation):
        return outputs / f"{name}-{operation}{suffix}"
    run(f"{name}-rank{suffix}", export, source, output("rank"), task["rank"])
    run(f"{name}-keep{suffix}", export, source, output("keep"), keep=task["keep"])
    run(f"{name}-size{suffix}", export, source, output("size"), max_bytes=task["max_bytes"])
    run(f"{name}-reorder{suffix}", reorder, source, output("reorder"))
    reported[f"{name}-reorder{suffix}"] = []  # version 0.3 reports none
    run(f"{name}-again{suffix}", export, output("reorder"), output("again"), task["rank"])
    run(f"{name}-sum{suffix}", combine, [source, other], output("sum"), task["weights"])
    if name.startswith("diffusers"):
        run(f"{name}-kohya{suffix}", export, source, output("kohya"), **{key_format: "kohya"})
        peft_folder = f"{name}-peft"
        run(peft_folder, export, source, outputs / peft_folder, **{key_format: "peft"})
print(json.dumps(reported))
"""


class FileMaker:
    """Make random LoRA files. The two files of a pair have the same layers."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = np.random.default_rng(seed)
        self.dtype_name = self.rng.choice([*DTYPES])
        self.dtype = DTYPES[self.dtype_name]
        self.shapes = {f"block.{i}.{name}": shape for i, name, shape in self._layers()}

    def _layers(self) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """Yield the index of a block, a name, and the shape of a weight: (out, in, ...)."""
        for index in range(self.rng.randint(1, 3)):
            yield index, "q", (self.rng.randint(4, 40), self.rng.randint(4, 40))
            if self.rng.random() < 0.5:
                yield index, "down", (self.rng.randint(4, 40), self.rng.randint(4, 40))
            if self.rng.random() < 0.5:
                yield index, "conv", (self.rng.randint(4, 20), self.rng.randint(4, 20), 3, 3)

    def factors(
        self, shape: tuple[int, ...], rank: int, num_experts: int = 1
    ) -> tuple[Array, Array]:
        """Return the factors of a layer in PEFT's layout, sometimes of a smaller rank."""
        rows = rank * num_experts
        A = self.generator.standard_normal((rows, *shape[1:]))
        B = self.generator.standard_normal((shape[0], rows, *[1] * (len(shape) - 2)))
        B *= 10 ** self.rng.uniform(-3, 1)
        special = self.rng.random()
        if special < 0.05:
            B[:] = 0
        elif special < 0.15 and num_experts == 1:
            A[-1] = A[0]
        return A.astype(self.dtype), B.astype(self.dtype)

    def rank(self) -> int:
        """Return a random rank, which may be above the size of a layer."""
        return self.rng.choice([1, 2, 3, 4, 6, 8, 12])

    def write_peft(self, folder: Path) -> None:
        """Write a PEFT folder of linear layers, convolutions and an embedding."""
        rank, alpha = self.rank(), self.rng.uniform(0.5, 32)
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        tensors: Tensors = {}
        for name, shape in {**self.shapes, "embed": (12, 30)}.items():
            layer_rank = rank
            if self.rng.random() < 0.3:
                layer_rank = rank_pattern[name] = self.rank()
            if self.rng.random() < 0.3:
                alpha_pattern[name] = self.rng.uniform(0.5, 32)
            suffixes = ("lora_A.weight", "lora_B.weight")
            if name == "embed":
                suffixes = ("lora_embedding_A", "lora_embedding_B")
            for suffix, factor in zip(suffixes, self.factors(shape, layer_rank), strict=True):
                tensors[f"base_model.model.{name}.{suffix}"] = factor
        tensors["base_model.model.norm.weight"] = np.ones(3, dtype=self.dtype)
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": self.rng.random() < 0.5,
            "target_modules": [*self.shapes, "embed"],
            "modules_to_save": ["norm"],
        }
        self._write_folder(folder, tensors, config)

    def write_peft_experts(self, folder: Path) -> None:
        """Write a PEFT folder with stacks of experts."""
        rank = self.rank()
        tensors: Tensors = {}
        for name, shape in {**self.shapes, "mlp.experts": (10, 14)}.items():
            num_experts = NUM_EXPERTS if name == "mlp.experts" else 1
            A, B = self.factors(shape, rank, num_experts)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
        config = {
            "r": rank,
            "lora_alpha": self.rng.uniform(0.5, 32),
            "use_rslora": self.rng.random() < 0.5,
            "target_modules": [*self.shapes],
            "target_parameters": ["mlp.experts.weight"],
        }
        self._write_folder(folder, tensors, config)

    def _write_folder(self, folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
        folder.mkdir()
        text = json.dumps({"peft_type": "LORA", **config})
        (folder / "adapter_config.json").write_text(text)
        save_file(tensors, folder / "adapter_model.safetensors")

    def write_kohya(self, file: Path) -> None:
        """Write a single file with the keys of kohya."""
        tensors: Tensors = {}
        rank = self.rank()
        for name, shape in self.shapes.items():
            layer_rank = self.rank() if self.rng.random() < 0.3 else rank
            key = f"lora_unet_{name.replace('.', '_')}"
            A, B = self.factors(shape, layer_rank)
            tensors[f"{key}.lora_down.weight"] = A
            tensors[f"{key}.lora_up.weight"] = B
            if self.rng.random() < 0.8:
                tensors[f"{key}.alpha"] = np.array(self.rng.uniform(0.5, 16), dtype=self.dtype)
        save_file(tensors, file, {"ss_network_dim": str(rank), "ss_network_alpha": "1"})

    def write_diffusers(self, file: Path) -> None:
        """Write a single file with the keys of diffusers, and sometimes with its metadata."""
        tensors: Tensors = {}
        rank, alpha = self.rank(), self.rng.uniform(0.5, 16)
        for name, shape in self.shapes.items():
            A, B = self.factors(shape, rank)
            tensors[f"unet.{name}.lora_A.weight"] = A
            tensors[f"unet.{name}.lora_B.weight"] = B
        metadata = {"format": "pt"}
        if self.rng.random() < 0.5:
            config = {"r": rank, "lora_alpha": alpha, "target_modules": [*self.shapes]}
            prefixed = {f"unet.{key}": value for key, value in config.items()}
            metadata["lora_adapter_metadata"] = json.dumps(prefixed)
        save_file(tensors, file, metadata)


def write_inputs(folder: Path, count: int) -> None:
    """Write pairs of files of each kind, and the arguments of the operations."""
    for kind in KINDS:
        for index in range(count):
            maker = FileMaker(seed=1000 * KINDS.index(kind) + index)
            name = f"{kind}-{maker.dtype_name}-{index:03}"
            suffix = "" if kind.startswith("peft") else ".safetensors"
            sources = [f"{name}-{letter}{suffix}" for letter in "ab"]
            write = getattr(maker, f"write_{kind.replace('-', '_')}")
            for source in sources:
                write(folder / source)
            weights = folder / sources[0]
            if weights.is_dir():
                weights /= "adapter_model.safetensors"
            task = {
                "source": sources[0],
                "other": sources[1],
                "suffix": suffix,
                "rank": maker.rng.randint(1, 4),
                "keep": maker.rng.uniform(0.3, 0.999),
                "max_bytes": int(weights.stat().st_size * maker.rng.uniform(0.7, 1.1)),
                "weights": [maker.rng.choice([1.0, 0.3, -0.7]) for _ in sources],
            }
            (folder / f"{name}.json").write_text(json.dumps(task))


def run_version(source: Path, inputs: Path, outputs: Path) -> dict[str, Any]:
    """Run all operations with one version, and return the errors that it reports."""
    outputs.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", WORKER, str(inputs), str(outputs)],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    reported: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return reported


def read_output(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of an output, and all that its config and its metadata say."""
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    description: dict[str, Any] = {}
    with safe_open(weights, "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, value in (file.metadata() or {}).items():
            if key != "matryoshka_lora":  # the versions describe the nesting differently
                description[key] = json.loads(value) if value.startswith("{") else value
    if path.is_dir():
        description["config"] = json.loads((path / "adapter_config.json").read_text())
    return tensors, description


def updates(tensors: Tensors) -> Tensors:
    """Return the update of each layer by the key of A, and all other tensors.

    An alpha that is a tensor is part of the update; one in a config is not.
    """
    results = dict(tensors)
    for key, A in tensors.items():
        for suffix_A, suffix_B in SUFFIXES.items():
            if key.endswith(suffix_A):
                name = key.removesuffix(suffix_A)
                B = results.pop(name + suffix_B)
                num_experts = NUM_EXPERTS if "experts" in key else 1
                alpha = results.pop(f"{name}.alpha", np.array(len(A)))
                results[key] = update(A, B, num_experts) * (float(alpha) / len(A))
    return results


def update(A: Array, B: Array, num_experts: int) -> Array:
    """Return the products of a stack of factors, shape (experts, out, in), float64."""
    # In B the expert is the fastest index, as in PEFT.
    stack_A = A.astype(np.float64).reshape(num_experts, -1, math.prod(A.shape[1:]))
    stack_B = B.astype(np.float64).reshape(len(B), -1, num_experts).transpose(2, 0, 1)
    return stack_B @ stack_A


def differs(first: Any, second: Any, tolerance: float) -> bool:
    """Return whether two values, as in JSON, differ by more than a tolerance."""
    if isinstance(first, float) or isinstance(second, float):
        return not math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return True
        return any(differs(first[key], second[key], tolerance) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            return True
        return any(differs(a, b, tolerance) for a, b in zip(first, second, strict=True))
    return bool(first != second)


def compare_outputs(
    old_path: Path, new_path: Path, tolerance: float, ranks_may_differ: bool
) -> Iterator[str]:
    """Yield the differences between the outputs of two versions."""
    old_tensors, old_description = read_output(old_path)
    new_tensors, new_description = read_output(new_path)
    old_updates, new_updates = updates(old_tensors), updates(new_tensors)
    if ranks_may_differ:
        if differs(old_description, new_description, TOLERANCE):
            tolerance = max(tolerance, BF16_TOLERANCE)
        old_forms: Any = {key: tensor.shape for key, tensor in old_updates.items()}
        new_forms: Any = {key: tensor.shape for key, tensor in new_updates.items()}
    else:
        if differs(old_description, new_description, TOLERANCE):
            yield f"config or metadata: {old_description} and {new_description}"
        old_forms = {key: (tensor.dtype, tensor.shape) for key, tensor in old_tensors.items()}
        new_forms = {key: (tensor.dtype, tensor.shape) for key, tensor in new_tensors.items()}
    if old_forms != new_forms:
        yield f"tensors: {old_forms} and {new_forms}"
        return
    for key, old_update in old_updates.items():
        old_values = old_update.astype(np.float64)
        norm = float(np.linalg.norm(old_values))
        distance = float(np.linalg.norm(old_values - new_updates[key].astype(np.float64)))
        if distance > tolerance * norm:
            yield f"{key} differs by {distance:.2g} of {norm:.2g}"


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_src", type=Path)
    parser.add_argument("--count", type=int, default=100, help="files of each kind")
    options = parser.parse_args()
    num_outputs = num_rejected = 0
    differences: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = folder / "inputs"
        inputs.mkdir()
        write_inputs(inputs, options.count)
        old_reported = run_version(options.old_src.resolve(), inputs, folder / "old")
        new_reported = run_version(THIS_SRC, inputs, folder / "new")
        for output, old_errors in old_reported.items():
            new_errors = new_reported[output]
            tolerance = FP16_TOLERANCE if "-fp16-" in output else TOLERANCE
            if differs(old_errors, new_errors, tolerance):
                differences.append(f"{output}: errors {old_errors} and {new_errors}")
            if "rejected" in (old_errors, new_errors):
                num_rejected += 1
                continue
            num_outputs += 1
            old_path, new_path = folder / "old" / output, folder / "new" / output
            ranks_may_differ = "-size" in output
            for difference in compare_outputs(old_path, new_path, tolerance, ranks_may_differ):
                differences.append(f"{output}: {difference}")
    for difference in differences:
        print(difference)
    print(
        f"{options.count} files of each of {len(KINDS)} kinds: {num_outputs} outputs compared, "
        f"{num_rejected} rejected, {len(differences)} differences"
    )
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
