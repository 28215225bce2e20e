"""Measure what it costs to reorder or truncate LoRA factors: one layer, and a whole file.

    OMP_NUM_THREADS=1 python benchmarks/reorder.py --out runs/reorder.json

* One layer of 3072 x 3072, in one process on one thread: QR and SVD of the R x R core as in this
  package; a full SVD of the dense update; and `torch.svd_lowrank` of the dense update with twice
  the rank and two iterations, as in kohya's script. The methods alternate. The numbers are medians
  of CPU seconds, and the relative error at the rank.
* A file with the shapes of Flux (494 layers, bf16), truncated to the rank in a process of its own:
  seconds, CPU seconds, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.linalg.factors import reorder_factors

WIDTH = 3072
RANK = 8  # of the truncated factors
EXPORT_SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from matryoshka_lora import export
start = time.monotonic()
export(sys.argv[1], sys.argv[2], rank=int(sys.argv[3]))
usage = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss would include what the parent had when it started this process.
status = Path("/proc/self/status").read_text()
peak_KiB = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({
    "seconds": time.monotonic() - start,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_MiB": peak_KiB / 1024,
}))
"""


def random_factors(
    rank: int, in_features: int, out_features: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return random factors. The columns of B get smaller, as in a trained adapter."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator)
    B = torch.randn(out_features, rank, generator=generator)
    return A / in_features**0.5, B / out_features**0.5 * torch.logspace(0, -1.5, rank)


def measure_layer(rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return by method: CPU seconds, also as a multiple of ours, and the relative error."""
    A, B = random_factors(rank, WIDTH, WIDTH, seed=0)
    array_A, array_B = A.numpy(), B.numpy()
    update = B @ A

    def ours() -> tuple[Tensor, Tensor]:
        new_A, new_B, _ = reorder_factors(array_A, array_B)
        return torch.from_numpy(new_B[:, :RANK]), torch.from_numpy(new_A[:RANK])

    def full_svd() -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return U[:, :RANK] * S[:RANK], Vh[:RANK]

    def svd_lowrank() -> tuple[Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(B @ A, q=2 * RANK, niter=2)
        return U[:, :RANK] * S[:RANK], V[:, :RANK].T

    methods: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "ours": ours,
        "full SVD": full_svd,
        "svd_lowrank": svd_lowrank,
    }
    errors: dict[str, float] = {}
    for name, method in methods.items():
        left, right = method()
        errors[name] = float((update - left @ right).norm() / update.norm())
    rounds = [
        {name: cpu_seconds(method) for name, method in methods.items()} for _ in range(repeats)
    ]
    return {
        name: {
            "cpu_seconds": median(seconds[name] for seconds in rounds),
            "times_ours": median(seconds[name] / seconds["ours"] for seconds in rounds),
            "error": errors[name],
        }
        for name in methods
    }


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def flux_layers() -> Iterator[tuple[str, int, int]]:
    """Yield name, in and out of the linear layers in Flux's blocks, as diffusers names them."""
    mlp_width = 4 * WIDTH
    projections = ["to_q", "to_k", "to_v"]
    added_projections = ["add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    for index in range(19):
        block = f"transformer.transformer_blocks.{index}"
        for name in projections + added_projections:
            yield f"{block}.attn.{name}", WIDTH, WIDTH
        for name in ("ff", "ff_context"):
            yield f"{block}.{name}.net.0.proj", WIDTH, mlp_width
            yield f"{block}.{name}.net.2", mlp_width, WIDTH
        for name in ("norm1", "norm1_context"):
            yield f"{block}.{name}.linear", WIDTH, 6 * WIDTH
    for index in range(38):
        block = f"transformer.single_transformer_blocks.{index}"
        for name in projections:
            yield f"{block}.attn.{name}", WIDTH, WIDTH
        yield f"{block}.proj_mlp", WIDTH, mlp_width
        yield f"{block}.proj_out", WIDTH + mlp_width, WIDTH
        yield f"{block}.norm.linear", WIDTH, 3 * WIDTH


def measure_file(folder: Path, rank: int) -> dict[str, float]:
    """Return what it costs to truncate a file with the shapes of Flux."""
    source, output = folder / f"flux-{rank}.safetensors", folder / f"output-{rank}.safetensors"
    tensors = {}
    for seed, (name, in_features, out_features) in enumerate(flux_layers()):
        A, B = random_factors(rank, in_features, out_features, seed)
        tensors[f"{name}.lora_A.weight"] = A.bfloat16()
        tensors[f"{name}.lora_B.weight"] = B.bfloat16()
    save_file(tensors, source, {"format": "pt"})
    process = subprocess.run(
        [sys.executable, "-c", EXPORT_SCRIPT, str(source), str(output), str(RANK)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
    )
    usage: dict[str, float] = json.loads(process.stdout)
    return {
        **usage,
        "bytes_before": source.stat().st_size,
        "bytes_after": output.stat().st_size,
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reorder.json"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-file", action="store_true", help="measure one layer only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {"cores": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for rank in options.ranks:
            results[f"one layer, R = {rank}"] = measure_layer(rank, options.repeats)
            if not options.no_file:
                results[f"whole file, R = {rank}"] = measure_file(Path(folder), rank)
            print(json.dumps(results, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
