"""Measure cost and error of `combine` and `extract`, next to the methods of other tools.

    OMP_NUM_THREADS=1 python benchmarks/combine.py --out runs/combine.json

* The sum of two random adapters of rank 16 on a layer of 1536 x 1536, truncated to rank 16:
  `combine`; PEFT's ``add_weighted_adapter`` with ``svd``, ``cat`` (which keeps rank 32) and
  ``linear``; a full SVD of the dense sum, as in kohya's script; and the dense sum itself, which
  diffusers fuses. The methods alternate. The numbers are medians of CPU seconds, and the error
  relative to the sum.
* The change of one layer of 4096 x 14336, whose singular values decrease as 1 / i^0.7, at rank 64:
  `extract`; a full SVD, as in mergekit; and a full SVD whose factors are clamped at their 0.99
  quantile, as in kohya's script. The relative error, and the CPU seconds of one run.
* All layers of SmolLM2-135M, changed by random matrices with these singular values: `extract` at
  rank 64 in a process of its own, its peak memory, and its error next to that of full SVDs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka_lora import combine, extract
from matryoshka_lora.bundled_model import bundled_model_path

SUM_WIDTH, SUM_RANK = 1536, 16
CHANGE_SHAPE, CHANGE_RANK = (14336, 4096), 64
EXTRACT_SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from matryoshka_lora import extract
start = time.monotonic()
rank = int(sys.argv[4])
result = extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=rank)
usage = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss would include what the parent had when it started this process.
status = Path("/proc/self/status").read_text()
peak_KiB = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({
    "seconds": time.monotonic() - start,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_MiB": peak_KiB / 1024,
    "error": result.errors[rank],
}))
"""


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of one call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error; a sum of many float32 squares needs double precision."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank, by a full SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def clamped_svd(matrix: Tensor, rank: int) -> Tensor:
    """Return the product of factors from a full SVD, which are clamped at their 0.99 quantile."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    # torch.quantile accepts at most 2^24 numbers.
    values = torch.cat([B.flatten(), A.flatten()])
    limit = values.kthvalue(round(0.99 * len(values))).values
    return B.clamp(-limit, limit) @ A.clamp(-limit, limit)


def two_adapters(folder: Path) -> Any:
    """Save the random adapters a and b in a folder, and return their PEFT model."""
    config = LoraConfig(r=SUM_RANK, lora_alpha=SUM_RANK, target_modules=["0"])
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(SUM_WIDTH, SUM_WIDTH, bias=False))
    model: Any = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=SUM_WIDTH**-0.5)
    model.save_pretrained(folder)
    return model


def measure_sums(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return CPU seconds and error of each method of adding two adapters."""
    model = two_adapters(folder)
    layer = model.base_model.model[0]

    def update(name: str) -> Tensor:
        B, A = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        product: Tensor = B @ A
        return product

    def peft(combination_type: str) -> Tensor:
        model.add_weighted_adapter(
            ["a", "b"], [1.0, 1.0], "sum", combination_type, svd_rank=SUM_RANK
        )
        return update("sum")

    def ours() -> Tensor:
        combine([folder / "a", folder / "b"], folder / "sum", force=True)
        tensors = load_file(folder / "sum/adapter_model.safetensors")
        (A,) = [tensor for key, tensor in tensors.items() if "lora_A" in key]
        (B,) = [tensor for key, tensor in tensors.items() if "lora_B" in key]
        return B @ A

    methods: dict[str, Callable[[], Tensor]] = {
        "combine, from file to file": ours,
        "PEFT, svd": partial(peft, "svd"),
        "PEFT, cat": partial(peft, "cat"),
        "PEFT, linear": partial(peft, "linear"),
        "full SVD of the dense sum": lambda: truncated_svd(update("a") + update("b"), SUM_RANK),
        "the dense sum": lambda: update("a") + update("b"),
    }
    A_a, B_a = layer.lora_A["a"].weight.double(), layer.lora_B["a"].weight.double()
    A_b, B_b = layer.lora_A["b"].weight.double(), layer.lora_B["b"].weight.double()
    expected = (B_a @ A_a + B_b @ A_b).detach()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            elapsed, result = cpu_seconds(method)
            seconds[name].append(elapsed)
            errors[name] = relative_error(result, expected)
            if name.startswith("PEFT"):
                model.delete_adapter("sum")
    return {name: {"cpu_seconds": median(seconds[name]), "error": errors[name]} for name in methods}


def random_change(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a random matrix whose singular values decrease as 1 / i^0.7."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(*shape, 512)
    U = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator)).Q
    change: Tensor = (U * torch.arange(1, rank + 1) ** -0.7) @ V.T
    return change


def measure_layer(folder: Path) -> dict[str, dict[str, float]]:
    """Return CPU seconds and error of each method of factorizing a large change."""
    D = random_change(CHANGE_SHAPE, seed=0)
    for name, weight in (("old", torch.zeros(CHANGE_SHAPE)), ("new", D)):
        (folder / name).mkdir()
        save_file({"layer.weight": weight}, folder / name / "model.safetensors")
    elapsed, result = cpu_seconds(
        lambda: extract(folder / "old", folder / "new", folder / "lora", rank=CHANGE_RANK)
    )
    results = {"extract": {"cpu_seconds": elapsed, "error": result.errors[CHANGE_RANK]}}
    elapsed, approximation = cpu_seconds(lambda: truncated_svd(D, CHANGE_RANK))
    error = relative_error(approximation, D)
    results["full SVD"] = {"cpu_seconds": elapsed, "error": error}
    error = relative_error(clamped_svd(D, CHANGE_RANK), D)
    results["full SVD, clamped at 0.99"] = {"error": error}
    return results


def measure_model(folder: Path) -> dict[str, float]:
    """Return the time and memory of `extract` on all layers of a model, and its error."""
    base = bundled_model_path()
    tensors = load_file(base / "model.safetensors")
    total = missing = 0.0
    for seed, (key, weight) in enumerate(tensors.items()):
        if key.endswith("_proj.weight"):
            tuned = weight.float() + 0.05 * random_change(tuple(weight.shape), seed)
            squares = torch.linalg.svdvals(tuned - weight.float()).double().square()
            total += float(squares.sum())
            missing += float(squares[CHANGE_RANK:].sum())
            tensors[key] = tuned
    (folder / "tuned").mkdir()
    save_file(
        {key: tensor.float() for key, tensor in tensors.items()},
        folder / "tuned/model.safetensors",
    )
    arguments = [base, folder / "tuned", folder / "lora", CHANGE_RANK]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXTRACT_SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    usage: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return {**usage, "best": (missing / total) ** 0.5}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/combine.json"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "layer").mkdir()
        (folder / "model").mkdir()
        results: dict[str, Any] = {
            "sum": measure_sums(folder, options.repeats),
            "layer": measure_layer(folder / "layer"),
            "model": measure_model(folder / "model"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
