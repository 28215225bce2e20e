"""Strangers' adapters at every rank: the ways of reordering against PEFT's own truncation, and ranks per layer.

    python -m research.reorder_study --out runs/reorder-study

For each task and seed: trains an adapter with ``benchmarks/plain_lora.py`` (no code of ours), reorders it in each way
with questions of the *training* split (128; 480 for ``learned`` and ``trained``), cuts it with PEFT's
``convert_to_lora``, and measures the loss on held-out questions at each rank, and at each budget with ranks per layer.
One JSON file for each part of a run; what is there is not computed again. ``--table FILE`` gathers the parts into one
file and prints the tables of research/pages/reordering.md. The recorded numbers, research/pages/reorder-study.json, are
of version 0.1, which called ``svd`` ``frobenius``. Those with ``trained``, research/pages/strangers.json, are of the
same adapters, trained once more:

    python -m research.reorder_study --parts convert_to_lora svd learned trained --table research/pages/strangers.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict

from matryoshka_lora import export, load, reorder
from matryoshka_lora.models import load_model, load_tokenizer
from matryoshka_lora.training import load_data, make_config
from research.measure import measure, score
from research.records import write_text
from research.trainers import AnswerTrainer

TASKS = ("family_relationships", "chain_sum")
SEEDS = (0, 1, 2)
MAX_RANK, STEPS, BATCH_SIZE = 32, 80, 12
RANKS = (1, 2, 4, 8, 16)
BUDGETS = (1, 2, 4, 8)
"""As the uniform rank that has as many parameters."""
WAYS = ("svd", "activations", "loss", "learned", "trained")
LEARNED = ("learned", "trained")
LEARNED_ROWS = STEPS * BATCH_SIZE // 2
"""Half as many as the adapter was trained on."""
BUDGETED = ("svd", "loss")
PEFT = "convert_to_lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reorder-study"))
    parser.add_argument("--items", type=int, default=100, help="held-out questions (default: 100)")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", help="one run, as task-seed")
    parser.add_argument("--parts", nargs="+", choices=(PEFT, *WAYS), default=(PEFT, *WAYS), help="(default: all)")
    parser.add_argument("--table", type=Path, help="gather the results into this file and print the tables")
    given = parser.parse_args()
    names = [given.only] if given.only else [f"{task}-{seed}" for seed in SEEDS for task in TASKS]
    for name in names:
        for part in given.parts:
            file = given.out / name / f"{given.split}-{part}.json"
            if not file.exists():
                found = losses(given.out, name, part, given.split, given.items)
                print(name, part, json.dumps(found), flush=True)
                write_text(file, json.dumps(found) + "\n")
    if given.table:
        runs = [gather(given.out / name, name, given.split, given.items, given.parts) for name in names]
        write_text(given.table, json.dumps(runs) + "\n")
        print_tables(runs)


def losses(out: Path, name: str, part: Any, split: str, items: int) -> dict[str, list[float]]:
    """Of one form of a stranger's adapter, at each rank and at each budget."""
    task, _, seed = name.rpartition("-")
    plain, target = out / name / "adapter", out / name / part
    rows = load_data({"task": task, "size": STEPS * BATCH_SIZE, "seed": int(seed)})
    if not (plain / "adapter_model.safetensors").exists():
        train_plain(out, plain, rows, seed)
    held_out = load_data({"task": task, "split": split, "size": items})
    if part == PEFT:
        model = PeftModel.from_pretrained(load_model(), str(plain)).eval()
        trainer = trainer_of(model, rows, held_out)
        return {"adapter": [score(model, trainer)[0]], "uniform": truncated(model, trainer)}
    if not target.exists():
        taken = LEARNED_ROWS if part in LEARNED else None
        reorder(plain, target, part, None if part == "svd" else list(rows), rows=taken)
    adapter = load(load_model(), target)
    trainer = trainer_of(adapter.model, rows, held_out)
    found = {"uniform": [measure(adapter, trainer, rank)[0] for rank in RANKS], "budget": []}
    if part == "trained":  # which alone changes the whole adapter
        found["adapter"] = [measure(adapter, trainer, MAX_RANK)[0]]
    for rank in BUDGETS if part in BUDGETED else ():
        cut = out / name / f"{part}-budget-{rank}"
        export(target, cut, budget=rank / MAX_RANK, verify=False, overwrite=True)
        found["budget"].append(score(PeftModel.from_pretrained(load_model(), str(cut)).eval(), trainer)[0])
    return found


def train_plain(out: Path, target: Path, rows: Dataset, seed: str) -> None:
    """In a process that imports nothing of this package."""
    base, data = out / "base", target.parent / "rows.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        load_model().save_pretrained(base)
        load_tokenizer().save_pretrained(base)
    rows.to_json(data)
    options = {"model": base, "data": data, "out": target, "seed": seed, "rank": MAX_RANK, "steps": STEPS}
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    script = Path(__file__).parents[1] / "benchmarks" / "plain_lora.py"
    subprocess.run([sys.executable, str(script), *given], check=True)


def trainer_of(model: Any, rows: Dataset, held_out: Dataset) -> AnswerTrainer:
    """It trains nothing, and makes the batches of held-out questions."""
    arguments = make_config({"data": "chain_sum", "output_dir": "runs/unused", "disable_tqdm": True}).sft_config()
    few = rows.select(range(1))
    tokenizer = load_tokenizer()
    return AnswerTrainer(
        model=model, args=arguments, train_dataset=few, eval_dataset=held_out, processing_class=tokenizer
    )


def truncated(plain: Any, trainer: AnswerTrainer) -> list[float]:
    """The loss of what PEFT's own truncation makes at each rank.

    It is called once: what it returns for rank r is the first r columns of what it returns for R, as its code takes
    them from one SVD; a test holds it to that.
    """
    config, tensors = convert_to_lora(plain, MAX_RANK)
    model = get_peft_model(load_model(), config).eval()
    found = []
    for rank in RANKS:
        kept = {key: tensor.clone() for key, tensor in tensors.items()}
        for key, tensor in kept.items():
            if "lora_B" in key:
                tensor[:, rank:] = 0
        set_peft_model_state_dict(model, kept)
        found.append(score(model, trainer)[0])
    return found


def gather(folder: Path, name: str, split: str, items: int, parts: Sequence[str]) -> dict[str, Any]:
    """One run's parts."""
    task, _, seed = name.rpartition("-")
    found = {part: json.loads((folder / f"{split}-{part}.json").read_text()) for part in parts}
    return {"task": task, "seed": int(seed), "split": split, "items": items, "ranks": RANKS, **found}


def print_tables(runs: Sequence[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, and differences run by run, since a seed moves both."""
    for task in TASKS:
        mine = [run for run in runs if run["task"] == task]
        ways, budgeted = ([way for way in each if way in mine[0]] for each in (WAYS, BUDGETED))
        print(f"\n{task}: held-out loss, mean ± standard deviation of {len(mine)} seeds\n")
        for part in (part for part in (PEFT, *ways) if "adapter" in mine[0][part]):
            print(_row(f"at rank {MAX_RANK}, `{part}`", [run[part]["adapter"] for run in mine]) + "\n")
        print(f"| rank | {' | '.join(map(str, RANKS))} |\n|---|{'---|' * len(RANKS)}")
        for part in (PEFT, *ways):
            print(_row(f"`{part}`", [run[part]["uniform"] for run in mine]))
        for way in budgeted:
            print(_row(f"ranks per layer, `{way}`", [run[way]["budget"] for run in mine]))
        for way in ways:
            pairs = [(run[way]["uniform"], run[PEFT]["uniform"]) for run in mine]
            print(_row(f"`{way}` minus `{PEFT}`", [_minus(*pair) for pair in pairs]))
        for way in budgeted:
            pairs = [(run[way]["budget"], run[way]["uniform"]) for run in mine]
            print(_row(f"per layer minus uniform, `{way}`", [_minus(*pair) for pair in pairs]))


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=False)]


def _row(name: str, values: Sequence[Sequence[float]]) -> str:
    cells = [f"{fmean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in zip(*values, strict=True)]
    return f"| {name} ({len(values)}) | {' | '.join(cells + [''] * (len(RANKS) - len(cells)))} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
