"""Measure what it costs to reorder or cut LoRA factors: one layer, and a whole file.

    OMP_NUM_THREADS=1 python benchmarks/reorder.py --out runs/reorder.json

* One layer of 3072 x 3072 in one process on one thread: our QR and SVD of the R x R core, a full
SVD
  of the dense update, and `torch.svd_lowrank` of it with twice the rank and two iterations, as
  kohya's script has it. They take turns: medians of processor time, and the error at the rank.
* A file of Flux's shapes (494 layers, bf16) cut to the rank, in a process of its own: time,
processor
  time, and the operating system's largest resident set.
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

from matryoshka_lora.factors import reorder_factors

WIDTH, KEPT = 3072, 8
WHOLE_FILE = """
import json, resource, sys, time
from matryoshka_lora import export
began = time.monotonic()
export(sys.argv[1], sys.argv[2], rank=int(sys.argv[3]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime,
                  "peak_MiB": used.ru_maxrss / 1024}))
"""


def factors(rank: int, wide: int, tall: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random factors; the directions of B get smaller, as those of a trained adapter do."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, wide, generator=generator)
    B = torch.randn(tall, rank, generator=generator)
    return A / wide**0.5, B / tall**0.5 * torch.logspace(0, -1.5, rank)


def one_layer(rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return, by way, processor seconds, how many times ours that is, and the error at rank 8."""
    A, B = factors(rank, WIDTH, WIDTH, 0)
    dense = B @ A

    def ours() -> Tensor:
        new_A, new_B, _ = reorder_factors(A, B)
        return new_B[:, :KEPT] @ new_A[:KEPT]

    def full() -> Tensor:
        u, s, vh = torch.linalg.svd(B @ A, full_matrices=False)
        return (u[:, :KEPT] * s[:KEPT]) @ vh[:KEPT]

    def lowrank() -> Tensor:
        u, s, v = torch.svd_lowrank(B @ A, q=2 * KEPT, niter=2)
        return (u[:, :KEPT] * s[:KEPT]) @ v[:, :KEPT].T

    ways: dict[str, Callable[[], Tensor]] = {"ours": ours, "full SVD": full, "svd_lowrank": lowrank}
    errors = {name: float((dense - way()).norm() / dense.norm()) for name, way in ways.items()}
    turns = [{name: _processor_time(way) for name, way in ways.items()} for _ in range(repeats)]
    return {
        name: {
            "cpu_seconds": median(turn[name] for turn in turns),
            "times_ours": median(turn[name] / turn["ours"] for turn in turns),
            "error": errors[name],
        }
        for name in ways
    }


def _processor_time(way: Callable[[], object]) -> float:
    began = time.process_time()
    way()
    return time.process_time() - began


def flux_layers() -> Iterator[tuple[str, int, int]]:
    """Yield name, in and out of the linear layers of Flux's blocks, as diffusers calls them."""
    wide = 4 * WIDTH
    attention = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
    for n in range(19):
        block = f"transformer.transformer_blocks.{n}"
        for name in (*attention, "to_out.0", "to_add_out"):
            yield f"{block}.attn.{name}", WIDTH, WIDTH
        for part in ("ff", "ff_context"):
            yield f"{block}.{part}.net.0.proj", WIDTH, wide
            yield f"{block}.{part}.net.2", wide, WIDTH
        yield from ((f"{block}.{n}.linear", WIDTH, 6 * WIDTH) for n in ("norm1", "norm1_context"))
    for n in range(38):
        block = f"transformer.single_transformer_blocks.{n}"
        yield from ((f"{block}.attn.{name}", WIDTH, WIDTH) for name in attention[:3])
        yield f"{block}.proj_mlp", WIDTH, wide
        yield f"{block}.proj_out", WIDTH + wide, WIDTH
        yield f"{block}.norm.linear", WIDTH, 3 * WIDTH


def whole_file(folder: Path, rank: int) -> dict[str, float]:
    """Return what it costs to cut a file of Flux's shapes to rank 8."""
    source, target = folder / f"flux-{rank}.safetensors", folder / f"cut-{rank}.safetensors"
    tensors = {}
    for seed, (name, wide, tall) in enumerate(flux_layers()):
        A, B = factors(rank, wide, tall, seed)
        tensors[f"{name}.lora_A.weight"] = A.bfloat16()
        tensors[f"{name}.lora_B.weight"] = B.bfloat16()
    save_file(tensors, source, {"format": "pt"})
    command = [sys.executable, "-c", WHOLE_FILE, str(source), str(target), str(KEPT)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=threads)
    found: dict[str, float] = json.loads(done.stdout)
    return {**found, "bytes_before": source.stat().st_size, "bytes_after": target.stat().st_size}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reorder.json"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-file", action="store_true", help="measure one layer only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {"cores": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for rank in options.ranks:
            found[f"one layer, R = {rank}"] = one_layer(rank, options.repeats)
            if not options.no_file:
                found[f"whole file, R = {rank}"] = whole_file(Path(folder), rank)
            print(json.dumps(found, indent=2), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
