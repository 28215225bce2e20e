"""Measure `export` of a single file next to the scripts of kohya and KJNodes.

    OMP_NUM_THREADS=1 python benchmarks/resize.py \\
        --kohya FOLDER --kohya-lowrank FOLDER --kohya-python PYTHON \\
        --kj-nodes FILE --comfyui FOLDER --comfyui-python PYTHON

* ``--kohya`` is a checkout of kohya-ss/sd-scripts whose ``networks/resize_lora.py`` computes a full
  SVD, ``--kohya-lowrank`` one that uses ``torch.svd_lowrank`` for large layers. Both run with
  ``--kohya-python``.
* ``--kj-nodes`` is ``nodes/lora_nodes.py`` of ComfyUI-KJNodes. It needs a checkout of ComfyUI.

Tools whose path is not given are left out. The inputs are random factors in fp16 with decreasing
singular values, and layers of unlike strength:

* 24 layers with the shapes of two SDXL blocks, rank 32, truncated to rank 8.
* 8 layers of 3072 x 3072, as in Flux, rank 64, truncated to rank 8.

Each tool runs in a process of its own. The CPU seconds begin after its imports. The peak memory is
that of the process. The error is relative to the dense update of all layers. Where a tool chooses
the ranks itself, `export` gets the size of its file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

TARGET_RANK = 8
REPEATS = 5
# Methods of kohya's script that choose a rank for each layer, and of KJNodes' node.
KOHYA_METHODS = {"sv_ratio": 5.0, "sv_fro": 0.9, "sv_cumulative": 0.7}
KJ_METHODS = {"sv_knee": 1.0}

# The end of the scripts of all tools.
REPORT = """
seconds = time.process_time() - start
status = Path("/proc/self/status").read_text()
peak_KiB = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"cpu_seconds": seconds, "peak_MiB": peak_KiB / 1024}))
"""
OUR_SCRIPT = f"""
import json, sys, time
from pathlib import Path
from matryoshka_lora import export
start = time.process_time()
export(sys.argv[1], sys.argv[2], force=True, **json.loads(sys.argv[3]))
{REPORT}"""
KOHYA_SCRIPT = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from networks import resize_lora
arguments = resize_lora.setup_parser().parse_args(sys.argv[2:])
start = time.process_time()
resize_lora.resize(arguments)
{REPORT}"""
KJ_SCRIPT = f"""
import json, sys, time
from importlib import util
from pathlib import Path
script, comfyui, source, output, rank, method, parameter = sys.argv[1:]
sys.path.insert(0, comfyui)
from comfy import cli_args
cli_args.args.cpu = True
import torch
from comfy.utils import load_torch_file, save_torch_file
spec = util.spec_from_file_location("lora_nodes", script)
nodes = util.module_from_spec(spec)
spec.loader.exec_module(nodes)
start = time.process_time()
tensors, metadata = load_torch_file(source, return_metadata=True)
resized = nodes.resize_lora_model(
    tensors, int(rank), torch.float16, torch.device("cpu"), method, float(parameter), False
)
save_torch_file(resized[0], output, metadata=metadata)
{REPORT}"""


class Setup(NamedTuple):
    """A source file, and the folder for outputs."""

    source: Path
    folder: Path


def sdxl_shapes() -> Iterator[tuple[str, int, int]]:
    """Yield name, out and in of the linear layers of two blocks of SDXL."""
    for block in range(2):
        name = f"lora_unet_input_blocks_{7 + block}_1"
        yield f"{name}_proj_in", 1280, 1280
        yield f"{name}_proj_out", 1280, 1280
        layers = f"{name}_transformer_blocks_0"
        for projection in ("to_q", "to_k", "to_v", "to_out_0"):
            yield f"{layers}_attn1_{projection}", 1280, 1280
            in_features = 2048 if projection in ("to_k", "to_v") else 1280
            yield f"{layers}_attn2_{projection}", 1280, in_features
        yield f"{layers}_ff_net_0_proj", 10240, 1280
        yield f"{layers}_ff_net_2", 1280, 5120


def flux_shapes() -> Iterator[tuple[str, int, int]]:
    """Yield name, out and in of 8 layers of Flux."""
    for block in range(8):
        yield f"lora_unet_double_blocks_{block}_img_attn_proj", 3072, 3072


INPUTS = {"sdxl": (sdxl_shapes, 32), "flux": (flux_shapes, 64)}


def write_input(file: Path, name: str) -> None:
    """Write a file of random factors with kohya's keys."""
    shapes, rank = INPUTS[name]
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for layer, out_features, in_features in shapes():
        A = generator.standard_normal((rank, in_features)) / in_features**0.5
        B = generator.standard_normal((out_features, rank)) / out_features**0.5
        B *= np.logspace(0, -1.5, rank) * generator.lognormal()
        tensors[f"{layer}.lora_down.weight"] = A.astype(np.float16)
        tensors[f"{layer}.lora_up.weight"] = B.astype(np.float16)
        tensors[f"{layer}.alpha"] = np.array(rank / 2, dtype=np.float16)
    save_file(tensors, file)


def updates(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the dense update of each layer."""
    tensors = load_file(file)
    for key in sorted(tensors):
        name = key.removesuffix(".lora_down.weight")
        if name != key:
            A = tensors[key].astype(np.float64)
            B = tensors[f"{name}.lora_up.weight"].astype(np.float64)
            yield name, float(tensors[f"{name}.alpha"]) / len(A) * (B @ A)


def relative_error(source: Path, output: Path) -> float:
    """Return the norm of what an output misses over the norm of the update, over all layers."""
    missing = total = 0.0
    for (name, update), (new_name, new_update) in zip(
        updates(source), updates(output), strict=True
    ):
        assert name == new_name
        total += float((update**2).sum())
        missing += float(((update - new_update) ** 2).sum())
    return (missing / total) ** 0.5


def run(command: list[str]) -> dict[str, float]:
    """Run a script that ends with REPORT, and return what it reports."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{process.stderr[-2000:]}")
    usage: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return usage


def measure_ours(setup: Setup, **selection: Any) -> dict[str, float]:
    """Return the medians of several runs of `export`, and its error."""
    output = setup.folder / "ours.safetensors"
    arguments = [str(setup.source), str(output), json.dumps(selection)]
    usages = [run([sys.executable, "-c", OUR_SCRIPT, *arguments]) for _ in range(REPEATS)]
    result = {key: median(usage[key] for usage in usages) for key in usages[0]}
    return result | {
        "error": relative_error(setup.source, output),
        "bytes": output.stat().st_size,
    }


def measure_kohya(
    setup: Setup, python: str, scripts: Path, rank: int, method: str | None = None
) -> dict[str, float]:
    """Return what kohya's script needs, and its error."""
    output = setup.folder / "kohya.safetensors"
    arguments = ["--model", str(setup.source), "--save_to", str(output), "--new_rank", str(rank)]
    arguments += ["--save_precision", "fp16", "--device", "cpu"]
    if method:
        arguments += ["--dynamic_method", method, "--dynamic_param", str(KOHYA_METHODS[method])]
    usage = run([python, "-c", KOHYA_SCRIPT, str(scripts.resolve()), *arguments])
    return usage | {
        "error": relative_error(setup.source, output),
        "bytes": output.stat().st_size,
    }


def measure_kj(
    setup: Setup, options: argparse.Namespace, rank: int, method: str = "disabled"
) -> dict[str, float]:
    """Return what KJNodes' node needs, and its error."""
    output = setup.folder / "kj.safetensors"
    script, comfyui = str(options.kj_nodes.resolve()), str(options.comfyui.resolve())
    arguments = [script, comfyui, str(setup.source), str(output), str(rank), method]
    parameter = str(KJ_METHODS.get(method, 0.0))
    usage = run([options.comfyui_python, "-c", KJ_SCRIPT, *arguments, parameter])
    return usage | {
        "error": relative_error(setup.source, output),
        "bytes": output.stat().st_size,
    }


def measure_fixed_rank(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Return what each tool needs to truncate to one rank."""
    results = {"export": measure_ours(setup, rank=TARGET_RANK)}
    folders = {"kohya": options.kohya, "kohya, lowrank": options.kohya_lowrank}
    for name, folder in folders.items():
        if folder:
            results[name] = measure_kohya(setup, options.kohya_python, folder, TARGET_RANK)
    if options.kj_nodes:
        results["KJNodes"] = measure_kj(setup, options, TARGET_RANK)
    return results


def measure_chosen_ranks(
    setup: Setup, options: argparse.Namespace, rank: int
) -> dict[str, dict[str, Any]]:
    """Return the error of each method that chooses the ranks, and of `export` at its size."""
    results: dict[str, dict[str, Any]] = {}
    if options.kohya:
        for method in KOHYA_METHODS:
            name = f"kohya, {method} {KOHYA_METHODS[method]:g}"
            results[name] = measure_kohya(setup, options.kohya_python, options.kohya, rank, method)
    if options.kj_nodes:
        for method in KJ_METHODS:
            name = f"KJNodes, {method} {KJ_METHODS[method]:g}"
            results[name] = measure_kj(setup, options, rank, method)
    for result in results.values():
        ours = measure_ours(setup, max_bytes=result["bytes"])
        result["error of export"] = ours["error"]
        result["bytes of export"] = ours["bytes"]
    return results


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kohya", type=Path, help="sd-scripts with the full SVD")
    parser.add_argument("--kohya-lowrank", type=Path, help="sd-scripts with svd_lowrank")
    parser.add_argument("--kohya-python", default=sys.executable)
    parser.add_argument("--kj-nodes", type=Path, help="KJNodes' nodes/lora_nodes.py")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI, which KJNodes needs")
    parser.add_argument("--comfyui-python", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path("runs/resize.json"))
    options = parser.parse_args()
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (shapes, rank) in INPUTS.items():
            setup = Setup(Path(folder) / f"{name}.safetensors", Path(folder))
            write_input(setup.source, name)
            files[name] = {
                "layers": len(list(shapes())),
                "rank": rank,
                "bytes": setup.source.stat().st_size,
                "fixed": measure_fixed_rank(setup, options),
            }
            print(name, json.dumps(files[name], indent=1), flush=True)
        setup = Setup(Path(folder) / "sdxl.safetensors", Path(folder))
        chosen = measure_chosen_ranks(setup, options, INPUTS["sdxl"][1])
        print(json.dumps(chosen, indent=1))
    document = {
        "target_rank": TARGET_RANK,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "files": files,
        "chosen": chosen,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
