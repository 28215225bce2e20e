"""Measure what `combine` and `extract` cost and lose, beside the ways of other tools.

    OMP_NUM_THREADS=1 python benchmarks/combine.py --out runs/combine.json

* The sum of two random adapters of rank 16 on a layer of 1536 x 1536, cut to rank 16: ours; PEFT's
  ``add_weighted_adapter`` with ``svd``, ``cat`` (which keeps rank 32) and ``linear``; a full SVD of
  the dense sum, as kohya's script merges; and the dense sum itself, as diffusers fuses. They take
  turns: medians of processor seconds, and the error relative to the sum.
* The change of one layer of 4096 x 14336 at rank 64, whose singular values fall as 1 / i^0.7: ours,
  a full SVD (as mergekit does), and a full SVD whose factors are clamped at their 0.99 quantile (as
  kohya does). The error, that of the best matrix of the rank, and processor seconds, once each.
* All layers of SmolLM2-135M, changed by random matrices of such a spectrum: `extract` at rank 64 in
  a process of its own, with its largest resident set, and the error beside that of full SVDs.
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

from matryoshka_lora import combine
from matryoshka_lora.extracting import Weight, _factorise
from matryoshka_lora.files.tensors import Stored
from matryoshka_lora.models import embedded_folder

WIDTH, RANK, LAYER, LARGE = 1536, 16, (14336, 4096), 64
WHOLE = """
import json, resource, sys, time
from pathlib import Path
from matryoshka_lora import extract
began = time.monotonic()
made = extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=int(sys.argv[4]))
used = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss would count what the parent process had.
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime,
                  "peak_MiB": peak / 1024, "error": made.errors[int(sys.argv[4])]}))
"""


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return processor seconds and the result."""
    begin = time.process_time()
    found = act()
    return time.process_time() - begin, found


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error; sums of many float32 squares need double precision."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def clamped(D: Tensor, rank: int) -> Tensor:
    """Return the product of factors by a full SVD, clamped at their 0.99 quantile."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    U, Vh = U[:, :rank] * S[:rank], Vh[:rank]
    # torch.quantile takes at most 2^24 numbers.
    values = torch.cat([U.flatten(), Vh.flatten()])
    high = values.kthvalue(round(0.99 * len(values))).values
    found: Tensor = U.clamp(-high, high) @ Vh.clamp(-high, high)
    return found


def two_adapters(folder: Path) -> Any:
    """Return a PEFT model with the random adapters a and b, and save them in a folder."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), config, "a")
    model.add_adapter("b", config)
    for key, one in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(one, std=WIDTH**-0.5)
    model.save_pretrained(folder)
    return model


def sums(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return seconds and error of each way to add two adapters."""
    model = two_adapters(folder)
    layer = model.base_model.model[0]
    (A, B), (C, D) = (
        (layer.lora_A[x].weight.detach(), layer.lora_B[x].weight.detach()) for x in "ab"
    )
    dense = B.double() @ A.double() + D.double() @ C.double()

    def by_peft(kind: str) -> Tensor:
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", kind, svd_rank=RANK)
        found: Tensor = layer.lora_B["sum"].weight.detach() @ layer.lora_A["sum"].weight.detach()
        return found

    def full() -> Tensor:
        U, S, Vh = torch.linalg.svd(B @ A + D @ C, full_matrices=False)
        found: Tensor = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
        return found

    def ours() -> Tensor:
        combine([folder / "a", folder / "b"], folder / "sum", force=True)
        found = load_file(folder / "sum/adapter_model.safetensors")
        E, F = (next(t for k, t in found.items() if f"lora_{x}" in k) for x in "AB")
        return F @ E

    ways: dict[str, Callable[[], Tensor]] = {
        "combine, from file to file": ours,
        **{f"PEFT, {kind}": partial(by_peft, kind) for kind in ("svd", "cat", "linear")},
        "full SVD of the dense sum": full,
        "the dense sum": lambda: B @ A + D @ C,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors = dict[str, float]()
    for _ in range(repeats):
        for name, way in ways.items():
            spent, found = timed(way)
            seconds[name].append(spent)
            errors[name] = apart(found, dense)
            if name.startswith("PEFT"):
                model.delete_adapter("sum")
    return {name: {"cpu_seconds": median(seconds[name]), "error": errors[name]} for name in ways}


def changed(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a random matrix whose singular values fall as i^-0.7."""
    generator = torch.Generator().manual_seed(seed)
    few = min(*shape, 512)
    U, V = (torch.linalg.qr(torch.randn(n, few, generator=generator)).Q for n in shape)
    found: Tensor = (U * torch.arange(1, few + 1) ** -0.7) @ V.T
    return found


def one_layer() -> dict[str, dict[str, float]]:
    """Return seconds and error of each way to factorise a large change."""
    D = changed(LAYER, 0)
    weight = Weight(Stored.of(torch.zeros(LAYER)), Stored.of(D), transposed=False)
    spent, (_, change) = timed(lambda: _factorise("layer", weight, LARGE, None))
    found = {"extract": {"cpu_seconds": spent, "error": (change.left / change.square) ** 0.5}}
    begin = time.process_time()
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    cut = (U[:, :LARGE] * S[:LARGE]) @ Vh[:LARGE]
    full = time.process_time() - begin
    found["full SVD"] = {"cpu_seconds": full, "error": apart(cut, D)}
    return found | {"full SVD, clamped at 0.99": {"error": apart(clamped(D, LARGE), D)}}


def whole_model(folder: Path) -> dict[str, float]:
    """Return what `extract` costs and loses on all layers of a model."""
    base = embedded_folder()
    state = load_file(base / "model.safetensors")
    (folder / "tuned").mkdir()
    whole = optimum = 0.0
    for number, (key, each) in enumerate(state.items()):
        if key.endswith("_proj.weight"):
            tuned = each.float() + 0.05 * changed(tuple(each.shape), number)
            D = tuned - each.float()
            values = torch.linalg.svdvals(D).double() ** 2
            whole, optimum = whole + float(values.sum()), optimum + float(values[LARGE:].sum())
            state[key] = tuned
    save_file({k: t.float() for k, t in state.items()}, folder / "tuned/model.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", WHOLE]
    places = [str(base), str(folder / "tuned"), str(folder / "lora"), str(LARGE)]
    run = subprocess.run([*command, *places], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found | {"best": (optimum / whole) ** 0.5}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/combine.json"))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        found: dict[str, Any] = {
            "sum": sums(Path(folder), given.repeats),
            "layer": one_layer(),
            "model": whole_model(Path(folder) / "model"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
