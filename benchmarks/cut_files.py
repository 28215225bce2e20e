"""What it costs to cut LoRA files of image models: one layer in three ways, and a whole file.

    python benchmarks/cut_files.py --out runs/cut_files.json

* One layer of 3072 x 3072, in one process on one thread: our QR and SVD of the R x R core, a full SVD of the dense
  update, and `torch.svd_lowrank` of it with twice the rank and two iterations, which is what kohya's script does. The
  three are run in turn, again and again: medians of the processor time, and of the ratios within one turn.
* A file of Flux's shapes (494 layers, bf16), in a process of its own with a thread for each core: time, processor time,
  the operating system's largest resident set, and the error at the rank.
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
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Size, Tensor

from matryoshka_lora.files import write_text
from matryoshka_lora.formats.opened import Stored
from matryoshka_lora.formats.streamed import write_stored
from matryoshka_lora.reordering.single import cut_layer

WIDTH, KEPT = 3072, 8
WHOLE_FILE = """
import json, resource, sys, time
from matryoshka_lora import export
began = time.monotonic()
made = export(sys.argv[1], sys.argv[2], rank=int(sys.argv[3]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime,
                  "peak_MiB": used.ru_maxrss / 1024, "error": made.error, "layers": len(made.ranks)}))
"""


def factors(rank: int, wide: int, tall: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ones; the directions of B get smaller, as those of a trained adapter do."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, wide, generator=generator), torch.randn(tall, rank, generator=generator)
    return A / wide**0.5, B / tall**0.5 * torch.logspace(0, -1.5, rank)


def one_layer(rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each way: processor seconds, how many times ours that is, and the relative error at rank 8."""
    A, B = factors(rank, WIDTH, WIDTH, 0)
    dense = B @ A

    def ours() -> Tensor:
        made = cut_layer(A, B, 1.0, KEPT, 1.0)
        return made.B @ made.A

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
    """Name, in and out of the linear layers of Flux's blocks, as diffusers calls them."""
    wide = 4 * WIDTH
    attention = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    for n in range(19):
        block = f"transformer.transformer_blocks.{n}"
        yield from ((f"{block}.attn.{name}", WIDTH, WIDTH) for name in attention)
        for part in ("ff", "ff_context"):
            yield f"{block}.{part}.net.0.proj", WIDTH, wide
            yield f"{block}.{part}.net.2", wide, WIDTH
        yield from ((f"{block}.{name}.linear", WIDTH, 6 * WIDTH) for name in ("norm1", "norm1_context"))
    for n in range(38):
        block = f"transformer.single_transformer_blocks.{n}"
        yield from ((f"{block}.attn.{name}", WIDTH, WIDTH) for name in attention[:3])
        yield f"{block}.proj_mlp", WIDTH, wide
        yield f"{block}.proj_out", WIDTH + wide, WIDTH
        yield f"{block}.norm.linear", WIDTH, 3 * WIDTH


def write_flux(file: Path, rank: int) -> None:
    """A file of Flux's shapes, one layer in memory at a time."""
    stored, reads = {}, {}
    for seed, (name, wide, tall) in enumerate(flux_layers()):
        for which, (key, shape) in enumerate((("lora_A", (rank, wide)), ("lora_B", (tall, rank)))):
            made = partial(_factor, rank, wide, tall, seed, which)
            stored[f"{name}.{key}.weight"] = Stored(Size(shape), torch.bfloat16, made)
            reads[f"{name}.{key}.weight"] = made
    write_stored(file, stored, {"format": "pt"}, lambda key: reads[key]())


def _factor(rank: int, wide: int, tall: int, seed: int, which: int) -> Tensor:
    return factors(rank, wide, tall, seed)[which].bfloat16()


def whole_file(folder: Path, rank: int, kept: int) -> dict[str, float]:
    source, target = folder / f"flux-{rank}.safetensors", folder / f"cut-{rank}.safetensors"
    write_flux(source, rank)
    command = [sys.executable, "-c", WHOLE_FILE, str(source), str(target), str(kept)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=threads)
    found: dict[str, float] = json.loads(done.stdout)
    found["load"] = os.getloadavg()[0]
    found |= {"bytes_before": source.stat().st_size, "bytes_after": target.stat().st_size}
    source.unlink()
    target.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cut_files.json"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {"cores": os.cpu_count(), "torch": torch.__version__}
    for rank in options.ranks:
        found[f"one layer, R = {rank}"] = one_layer(rank, options.repeats)
        print(rank, found[f"one layer, R = {rank}"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for rank in options.ranks:
            found[f"whole file, R = {rank}"] = whole_file(Path(folder), rank, KEPT)
            print(rank, found[f"whole file, R = {rank}"], flush=True)
    write_text(options.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
