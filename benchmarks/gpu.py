"""Correctness on a CUDA card, then time and memory there, into one JSON file.

    make gpu
    python benchmarks/gpu.py --device cpu --small --out runs/gpu-cpu.json    # tries this script where there is no card

Each check compares numbers of the card with those of `tests/oracle.py`, of the CPU, of transformers or of plain PEFT,
on a small model with random factors, and says the largest relative difference and what is allowed. A check that a
machine cannot run says why. Then `train_step.py` and `evaluate_ranks.py` measure the 135M model there, with --small
very little. The exit status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import evaluate_ranks
import oracle
import torch
import train_step
from conftest import LINEAR_LAYERS, randomize, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from matryoshka_lora import NestedAdapter, load, nest
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.files import write_text
from matryoshka_lora.models import DTYPES, load_model
from matryoshka_lora.ops import low_rank_linear

ROOT = Path(__file__).parents[1]
RANKS = (1, 2, 4, 8)
R = RANKS[-1]
# Relative differences of float32 on another device; half precision has its own rounding.
EXACT = 1e-4
OPERATION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Found(NamedTuple):
    """The largest relative difference of a comparison, and the most that is allowed."""

    name: str
    difference: float
    allowed: float


class SkippedError(Exception):
    """A check cannot be run here; the message is the reason."""


class World:
    """A tiny chat model on a device, and nested adapters of it whose factors are the same everywhere."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.base, tokenizer = folder / "base", tiny_tokenizer()
        # Widths of whole blocks of 64, which bitsandbytes needs on CPUs.
        sizes = {"vocab_size": len(tokenizer), "intermediate_size": 128, "max_position_embeddings": 512}
        tiny_llama(**sizes, initializer_range=0.05).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.ids = torch.arange(4, 84).reshape(4, 20)

    def model(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype).to(device or self.device).eval()

    def peft(self, model: Any) -> PeftModel:
        made = get_peft_model(model, LoraConfig(r=R, lora_alpha=R, target_modules=LINEAR_LAYERS))
        randomize(made, size=0.1)
        return made.eval()

    def adapter(self, model: Any = None, rule: str = "matryoshka") -> NestedAdapter:
        return nest(self.peft(self.model() if model is None else model), rule=rule, deploy="paper")

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """PEFT's own, by its names."""
        return get_peft_model_state_dict(self.peft(self.model(device=torch.device("cpu"))))

    def logits(self, model: Any, ids: Tensor | None = None) -> Tensor:
        ids = self.ids if ids is None else ids
        with torch.no_grad():
            found: Tensor = model(input_ids=ids.to(next(model.parameters()).device)).logits
        return found.double().cpu()


def apart(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def each_rank(adapter: NestedAdapter, world: World, wanted: Callable[[int], Tensor]) -> float:
    """The largest difference of logits over the ranks."""
    differences = []
    for rank in RANKS:
        adapter.set_rank(rank)
        differences.append(apart(world.logits(adapter.model), wanted(rank)))
    return max(differences)


# The checks


def operation(world: World) -> Iterator[Found]:
    """The fused operation, forward and backward, against the oracle's dense formula in float64."""
    kind = oracle.KINDS["Linear"]
    every = [oracle.prefix_p(RANKS, rank) for rank in range(1, R + 1)]
    for dtype, allowed in OPERATION.items():
        worst = 0.0
        for p in (*every, oracle.trained_p(RANKS), torch.stack(every[:3])):
            torch.manual_seed(0)
            base: Any = kind.build().requires_grad_(False).to(dtype).double()
            x, A, B = kind.batch(3).to(dtype).double(), torch.randn(R, 12).double(), torch.randn(10, R).double()
            exact = [tensor.requires_grad_() for tensor in (x, A, B)]
            y = kind.forward(base, A, B, p, x)
            direction = torch.randn(y.shape).to(dtype)
            wanted = [y, *torch.autograd.grad(y, exact, direction.double())]
            wide = torch.promote_types(dtype, torch.float32)  # of the factors, as in training
            mine = [
                tensor.detach().to(world.device, kept).requires_grad_()
                for tensor, kept in zip(exact, (dtype, wide, wide), strict=True)
            ]
            weight, bias = (tensor.to(world.device, dtype) for tensor in (base.weight, base.bias))
            found = low_rank_linear(mine[0], weight, bias, mine[1], mine[2], p.to(world.device))
            got = [found, *torch.autograd.grad(found, mine, direction.to(world.device))]
            worst = max(worst, *(apart(one, other) for one, other in zip(got, wanted, strict=True)))
        yield Found(f"fused operation, {dtype}", worst, allowed)


def every_rank(world: World) -> Iterator[Found]:
    """A whole model against its dense weights in float64, and a rank for each row against that rank alone."""
    adapter = world.adapter()
    dense = world.model(torch.float64, torch.device("cpu"))
    wanted = {r: world.logits(oracle.fold(dense, world.factors, oracle.prefix_p(RANKS, r))) for r in RANKS}
    yield Found("every rank, against dense float64", each_rank(adapter, world, wanted.__getitem__), EXACT)
    with adapter.rows(RANKS):
        rows = world.logits(adapter.model)
    worst = max(apart(rows[place], wanted[rank][place]) for place, rank in enumerate(RANKS))
    yield Found("a rank for each row", worst, EXACT)
    moved = world.adapter(world.model(device=torch.device("cpu")))
    moved.model.to(world.device)
    yield Found("nested on the CPU, then moved", each_rank(moved, world, wanted.__getitem__), EXACT)


def gradients(world: World) -> Iterator[Found]:
    """A training step of each rule against the same one on the CPU."""
    for rule in ("matryoshka", "stratified", "dylora", "lora"):
        found = []
        for device in (torch.device("cpu"), world.device):
            adapter = world.adapter(world.model(device=device), rule)
            adapter.model.train()
            adapter.draw(3, rows=len(world.ids))
            ids = world.ids.to(device)
            adapter.model(input_ids=ids, labels=ids).loss.backward()
            trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
            found.append(torch.cat([parameter.grad.double().cpu().flatten() for parameter in trained]))
        yield Found(f"gradients of rule {rule}", apart(found[1], found[0]), EXACT)


def reordered(world: World) -> Iterator[Found]:
    """Rank R stays; by SVD, each rank is also the CPU's."""
    whole = world.logits(world.adapter(rule="lora").model)
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]
    on_cpu = world.adapter(world.model(device=torch.device("cpu")), rule="lora")
    on_cpu.reorder()
    for by in ("svd", "learned"):
        adapter = world.adapter(rule="lora")
        adapter.reorder(by, *((rows, tiny_tokenizer(), 8) if by == "learned" else ()))
        adapter.set_rank(R)
        yield Found(f"reorder by {by}: rank R", apart(world.logits(adapter.model), whole), EXACT)
        if by == "svd":

            def wanted(rank: int) -> Tensor:
                on_cpu.set_rank(rank)
                return world.logits(on_cpu.model)

            yield Found("reorder by svd: every rank", each_rank(adapter, world, wanted), 1e-3)


def saved(world: World) -> Iterator[Found]:
    """What was saved and loaded again, and an exported rank as plain PEFT reads it."""
    adapter = world.adapter(rule="lora")
    adapter.reorder()
    wanted = {}
    for rank in RANKS:
        adapter.set_rank(rank)
        wanted[rank] = world.logits(adapter.model)
        adapter.export(world.folder / f"rank-{rank}", rank)
    adapter.save(world.folder / "saved")
    again = load(world.model(), world.folder / "saved")
    yield Found("save and load", each_rank(again, world, wanted.__getitem__), EXACT)
    plain = max(
        apart(
            world.logits(PeftModel.from_pretrained(world.model(), world.folder / f"rank-{rank}").eval()), wanted[rank]
        )
        for rank in RANKS
    )
    yield Found("exported ranks in plain PEFT", plain, EXACT)


def engine(world: World) -> Iterator[Found]:
    """The engine's likelihoods and texts against the model alone, all ranks in one batch."""
    adapter, tokenizer = world.adapter(), tiny_tokenizer()
    rows = world.ids.tolist()
    requests = [(ids[:12], ids[12:]) for ids in rows for _ in RANKS]
    scored = Engine(adapter, tokenizer).loglikelihood(requests, [*RANKS] * len(rows))
    texts = Engine(adapter, tokenizer).generate([ids for ids, _ in requests], [*RANKS] * len(rows), max_new_tokens=8)
    differences, other_texts = [], 0
    for number, (context, ending) in enumerate(requests):
        adapter.set_rank(RANKS[number % len(RANKS)])
        logits = world.logits(adapter.model, torch.tensor([[*context, *ending]]))[0].log_softmax(-1)
        places = torch.arange(len(context) - 1, len(context) + len(ending) - 1)
        alone = float(logits[places, torch.tensor(ending)].sum())
        differences.append(abs(scored[number].logprob - alone) / abs(alone))
        prompt = torch.tensor([context]).to(world.device)
        made = adapter.model.generate(input_ids=prompt, do_sample=False, max_new_tokens=8)[0, len(context) :]
        other_texts += tokenizer.decode(made, skip_special_tokens=True) != texts[number]
    yield Found("engine: log-likelihoods against a plain forward", max(differences), EXACT)
    yield Found("engine: share of texts that are not those of generate", other_texts / len(requests), 0.0)


def half_precision(world: World) -> Iterator[Found]:
    """Every rank in bf16 and fp16 against float32; what is allowed is their own rounding in a whole model."""
    wide = world.adapter()
    wanted = {}
    for rank in RANKS:
        wide.set_rank(rank)
        wanted[rank] = world.logits(wide.model)
    for dtype, allowed in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        adapter = world.adapter(world.model(dtype))
        yield Found(f"every rank in {dtype}", each_rank(adapter, world, wanted.__getitem__), allowed)


def four_bit(world: World) -> Iterator[Found]:
    """Every rank on an nf4 base against an exported rank in plain PEFT on the same base."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SkippedError("bitsandbytes is not installed")

    def base() -> Any:
        return load_model(str(world.base), torch.bfloat16, "nf4", device_map={"": str(world.device)})

    adapter = world.adapter(base(), rule="lora")
    adapter.reorder()

    def wanted(rank: int) -> Tensor:
        adapter.export(world.folder / f"nf4-{rank}", rank)
        return world.logits(PeftModel.from_pretrained(base(), world.folder / f"nf4-{rank}").eval())

    yield Found("every rank on an nf4 base, against plain PEFT", each_rank(adapter, world, wanted), 2e-2)


def compiled(world: World) -> Iterator[Found]:
    """torch.compile with inductor against eager, at each rank; another rank must not compile again."""
    adapter, other = world.adapter(), world.adapter()
    fast = torch.compile(adapter.model)
    differences = []
    for rank in RANKS:
        adapter.set_rank(rank)
        other.set_rank(rank)
        with torch.compiler.set_stance("default" if rank == 1 else "fail_on_recompile"), torch.no_grad():
            found = fast(input_ids=world.ids.to(world.device), use_cache=False).logits
        differences.append(apart(found, world.logits(other.model)))
    yield Found("torch.compile, every rank", max(differences), EXACT)


RUN = """
model: {base}
dtype: fp32
data: {{task: chain_sum, size: 24}}
output_dir: {out}
max_steps: 3
per_device_train_batch_size: {rows}
learning_rate: 1e-2
logging_steps: 1
disable_tqdm: true
lora: {{r: 8}}
"""


def two_processes(world: World) -> Iterator[Found]:
    """The losses of `accelerate launch` with two processes against one with the same rows in a step."""
    on_cpu = world.device.type == "cpu"
    if not on_cpu and torch.cuda.device_count() < 2:
        raise SkippedError("there is one card")
    launch = [
        *("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")),
        *("--num_processes", "2", "--main_process_port", "0"),
    ]
    losses = []
    for name, rows, before in (("one", 8, []), ("two", 4, launch)):
        config = world.folder / f"{name}.yaml"
        config.write_text(RUN.format(base=world.base, out=world.folder / name, rows=rows))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {"CUDA_VISIBLE_DEVICES": "0"} if name == "one" else {}
        command = [sys.executable, *before, "-m", "matryoshka_lora", "train", str(config)]
        command += ["use_cpu=true"] if on_cpu else []
        done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        log = json.loads((world.folder / name / "trainer_state.json").read_text())["log_history"]
        losses.append(torch.tensor([entry["loss"] for entry in log if "loss" in entry]))
    yield Found("losses of two processes against one", apart(losses[1], losses[0]), 1e-3)


CHECKS: tuple[Callable[[World], Iterator[Found]], ...] = (
    *(operation, every_rank, gradients, reordered, saved, engine, half_precision, four_bit, compiled, two_processes),
)


def checked(device: torch.device) -> dict[str, dict[str, Any]]:
    """All checks; one that fails does not stop the others."""
    report: dict[str, dict[str, Any]] = {}
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                for found in check(World(Path(folder), device)):
                    passed = math.isfinite(found.difference) and found.difference <= found.allowed
                    report[found.name] = {"difference": found.difference, "allowed": found.allowed, "passed": passed}
            except SkippedError as reason:
                report[check.__name__] = {"skipped": str(reason)}
            except Exception:
                report[check.__name__] = {"passed": False, "error": traceback.format_exc(limit=-3)}
        print(json.dumps({check.__name__: list(report.items())[-1][1]}), flush=True)
    return report


# Time and memory


def train(device: torch.device, small: bool) -> dict[str, Any]:
    """Of `train_step.py`, in milliseconds and GiB."""
    report: dict[str, Any] = {}
    for dtype in ("bf16", "fp32"):
        for rank in (32,) if small else train_step.RANKS:
            base = load_model(dtype=DTYPES[dtype]).requires_grad_(False)
            if small:
                base.model.layers = base.model.layers[:1]
            measured = train_step.measure(base.to(device), rank, 1 if small else 5)
            for each in measured.values():
                each["milliseconds"] = round(1000 * each.pop("seconds"), 3)
                each["saved_gib"] = round(each.pop("saved_mib") / 1024, 3)
            report[f"{dtype}, R = {rank}"] = measured
    return report


def evaluate(device: torch.device, small: bool, folder: Path) -> dict[str, Any]:
    """Of `evaluate_ranks.py`, in milliseconds."""
    report: dict[str, Any] = {}
    for name in evaluate_ranks.REQUIRED[:1] if small else evaluate_ranks.REQUIRED:
        found = evaluate_ranks.part(folder, name, "bf16", 2 if small else 100, 1 if small else 3, device)
        for key in ("harness_one_rank", "harness_all_ranks", "ours_all_ranks"):
            found[f"{key}_milliseconds"] = round(1000 * found.pop(key), 1)
        report[name] = found
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="measure very little: for trying the script")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA card on this machine, so nothing was run.")
        return
    checks = checked(options.device)
    report = {"machine": train_step.machine(options.device), "checks": checks}
    report["train_step"] = train(options.device, options.small)
    with tempfile.TemporaryDirectory() as folder:
        report["evaluate_ranks"] = evaluate(options.device, options.small, Path(folder))
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    failed = [name for name, each in checks.items() if not each.get("passed", True)]
    print(
        f"{options.out}: {len(checks) - len(failed)} of {len(checks)} checks passed or were left out", *failed, sep="\n"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
