"""Measure what it costs to reorder or truncate LoRA factors: one layer, and a whole file.

    OMP_NUM_THREADS=1 python benchmarks/reorder.py --out runs/reorder.json

* One layer of 3072 x 3072, in one process on one thread: the SVD of the R x R core as in this
  package, by Cholesky factors; the same by QR decompositions, as in version 0.4; a full SVD of the
  dense update; and `torch.svd_lowrank` of the dense update with twice the rank and two iterations,
  as in kohya's script. The methods alternate. The numbers are medians of CPU seconds, and the
  relative error at the rank.
* A file with the shapes of Flux (494 layers, R = 64, bf16): truncated to the rank, truncated to an
  error of 10 %, and described by `info`, each in a process of its own that alternates with reading
  the file and casting it to float32. CPU seconds of the call, peak memory, and the ratio of the CPU
  seconds to those of reading.
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

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.linalg.factors import reorder_factors

WIDTH = 3072
RANK = 8  # of the truncated factors
FILE_SCRIPT = """
import json, sys, time
from pathlib import Path
import ml_dtypes, numpy, safetensors
from matryoshka_lora import export, info
verb, source, output, rank = sys.argv[1:]
start, cpu_start = time.monotonic(), time.process_time()
if verb == "read":
    with safetensors.safe_open(source, "np") as file:
        for key in file.keys():
            file.get_tensor(key).astype(numpy.float32).sum()
elif verb == "info":
    info(source)
else:
    export(source, output, **({"rank": int(rank)} if verb == "rank" else {"error": "10%"}))
# ru_maxrss would include what the parent had when it started this process.
status = Path("/proc/self/status").read_text()
peak_KiB = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({
    "seconds": time.monotonic() - start,
    "cpu_seconds": time.process_time() - cpu_start,
    "peak_MiB": peak_KiB / 1024,
}))
"""
VERBS = ["rank", "error", "info"]


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
        new_A, new_B, _ = reorder_factors(array_A, array_B, rank=RANK)
        return torch.from_numpy(new_B), torch.from_numpy(new_A)

    def by_qr() -> tuple[Tensor, Tensor]:
        q_in, r_in = np.linalg.qr(array_A.astype(np.float64).T)
        q_out, r_out = np.linalg.qr(array_B.astype(np.float64))
        u, s, vh = np.linalg.svd(r_out @ r_in.T)
        left, right = q_out @ u * s, vh @ q_in.T
        return torch.from_numpy(left[:, :RANK]).float(), torch.from_numpy(right[:RANK]).float()

    def full_svd() -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        return U[:, :RANK] * S[:RANK], Vh[:RANK]

    def svd_lowrank() -> tuple[Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(B @ A, q=2 * RANK, niter=2)
        return U[:, :RANK] * S[:RANK], V[:, :RANK].T

    methods: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "ours": ours,
        "QR": by_qr,
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


def measure_file(folder: Path, repeats: int, rank: int = 64) -> dict[str, dict[str, float]]:
    """Return what the verbs cost for a file with the shapes of Flux, as medians."""
    source, output = folder / "flux.safetensors", folder / "output.safetensors"
    tensors = {}
    for seed, (name, in_features, out_features) in enumerate(flux_layers()):
        A, B = random_factors(rank, in_features, out_features, seed)
        tensors[f"{name}.lora_A.weight"] = A.bfloat16()
        tensors[f"{name}.lora_B.weight"] = B.bfloat16()
    save_file(tensors, source, {"format": "pt"})
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(repeats):
        usages: dict[str, dict[str, float]] = {}
        for verb in ("read", *VERBS):
            output.unlink(missing_ok=True)
            process = subprocess.run(
                [sys.executable, "-c", FILE_SCRIPT, verb, str(source), str(output), str(RANK)],
                check=True,
                capture_output=True,
                text=True,
            )
            usages[verb] = json.loads(process.stdout)
            usages[verb]["times_reading"] = (
                usages[verb]["cpu_seconds"] / usages["read"]["cpu_seconds"]
            )
            usages[verb]["bytes"] = (output if output.exists() else source).stat().st_size
        rounds.append(usages)
    return {
        verb: {key: median(usages[verb][key] for usages in rounds) for key in rounds[0][verb]}
        for verb in rounds[0]
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
            print(json.dumps(results, indent=2), flush=True)
        if not options.no_file:
            results["whole file, R = 64"] = measure_file(Path(folder), options.repeats)
        print(json.dumps(results, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
