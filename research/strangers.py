"""Strangers' adapters at every rank: the metrics of reordering against PEFT's own truncation, and ranks per layer.

    python benchmarks/reorder_study.py --out runs/reorder-study

For each task and seed: trains an adapter with ``plain_lora.py`` (no code of ours), reorders it in each metric with
questions of the *training* split (128; 480 for ``learned``), cuts it with PEFT's ``convert_to_lora``, and measures the
loss on held-out questions at each rank, and at each budget with ranks per layer. One JSON file per part of a run; what
is there is not computed again. ``--table docs/reorder-study.json`` gathers the parts that are there into one file and
prints the tables of docs/reorder.md.
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
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import load
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.serving.budget import choose_ranks
from matryoshka_lora.serving.calibrate import ROWS, reorder_with_data
from matryoshka_lora.serving.reorder import reorder_adapter
from matryoshka_lora.formats.spectra import read_spectra
from matryoshka_lora.serving.verify import use_ranks
from matryoshka_lora.data.questions import pad_rows, tokenize
from matryoshka_lora.files import write_text
from matryoshka_lora.models import embedded_folder, load_model, load_tokenizer
from matryoshka_lora.data.tasks import Example, get_task
from matryoshka_lora.data.sources import load_data

TASKS = ("family_relationships", "chain_sum")
SEEDS = (0, 1, 2)
MAX_RANK, STEPS, BATCH_SIZE = 32, 80, 12
RANKS = (1, 2, 4, 8, 16)
BUDGETS = (1, 2, 4, 8)
"""As the uniform rank that has as many parameters."""
METRICS = ("frobenius", "activations", "loss", "learned")
BUDGETED = ("frobenius", "loss")
PEFT = "convert_to_lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reorder-study"))
    parser.add_argument("--items", type=int, default=100, help="held-out questions (default: 100)")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--only", help="one run, as task-seed")
    parser.add_argument("--table", type=Path, help="gather the results into this file and print the tables")
    args = parser.parse_args()
    names = [f"{task}-{seed}" for seed in SEEDS for task in TASKS]
    for name in [args.only] if args.only else names:
        task, _, seed = name.rpartition("-")
        for part in (PEFT, *METRICS):
            file = args.out / name / f"{args.split}-{part}.json"
            if not file.exists():
                found = measure(task, int(seed), args.out / name, part, args.split, args.items)
                print(name, part, json.dumps(found), flush=True)
                write_text(file, json.dumps(found) + "\n")
    if args.table:
        runs = [gather(args.out / name, name, args.split, args.items) for name in names]
        write_text(args.table, json.dumps(runs) + "\n")
        print_tables(runs)


def make_adapter(task: str, seed: int, folder: Path, metric: str) -> Path:
    """The plain adapter, or one of its reordered forms, where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "adapter"
    if not (plain / "adapter_model.safetensors").exists():
        rows = folder / "rows.jsonl"
        load_data({"task": task, "size": STEPS * BATCH_SIZE, "seed": seed}).to_json(rows)
        options = {
            "model": embedded_folder(),
            "data": rows,
            "out": plain,
            "seed": seed,
            "rank": MAX_RANK,
            "steps": STEPS,
        }
        given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        subprocess.run([sys.executable, str(Path(__file__).with_name("plain_lora.py")), *given], check=True)
    if metric == PEFT:
        return plain
    target = folder / metric
    if not target.exists():
        if metric == "frobenius":
            reorder_adapter(plain, target)
        else:
            rows = get_task(task, seed).examples("train", ROWS[metric])
            reorder_with_data(plain, target, metric, load_model(), load_tokenizer(), rows)  # type: ignore[arg-type]
    return target


def measure(task: str, seed: int, folder: Path, part: str, split: Any, items: int) -> dict[str, list[float]]:
    """The losses of one form, at each rank and at each budget."""
    tokenizer, questions = load_tokenizer(), get_task(task).examples(split, items)
    path = make_adapter(task, seed, folder, part)
    if part == PEFT:
        plain = PeftModel.from_pretrained(load_model(), str(path)).eval()
        whole = held_out_loss(plain, tokenizer, questions)
        return {"adapter": [whole], "uniform": peft_losses(plain, tokenizer, questions)}
    opened, nested = open_adapter(path), load(load_model(), path)
    spectra, uniform, budget = read_spectra(opened), [], []
    for rank in RANKS:
        nested.set_rank(rank)
        uniform.append(held_out_loss(nested.model, tokenizer, questions))
    for rank in BUDGETS if part in BUDGETED else ():
        use_ranks(nested, choose_ranks(opened.layers, spectra, rank / MAX_RANK).ranks)
        budget.append(held_out_loss(nested.model, tokenizer, questions))
    return {"uniform": uniform, "budget": budget}


def gather(folder: Path, name: str, split: str, items: int) -> dict[str, Any]:
    """One run's parts."""
    task, _, seed = name.rpartition("-")
    files = {part: folder / f"{split}-{part}.json" for part in (PEFT, *METRICS)}
    parts = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    return {"task": task, "seed": int(seed), "split": split, "items": items, "ranks": RANKS, **parts}


def peft_losses(plain: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Example]) -> list[float]:
    """The loss of what PEFT's own truncation makes at each rank.

    It is called once: what it returns for rank r is the first r columns of what it returns for R, as its code takes
    them from one SVD; a test holds it to that.
    """
    config, tensors = convert_to_lora(plain, MAX_RANK)
    model = get_peft_model(load_model(), config).eval()
    losses = []
    for rank in RANKS:
        kept = {key: tensor.clone() for key, tensor in tensors.items()}
        for key, tensor in kept.items():
            if "lora_B" in key:
                tensor[:, rank:] = 0
        set_peft_model_state_dict(model, kept)
        losses.append(held_out_loss(model, tokenizer, questions))
    return losses


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Example]) -> float:
    """Mean negative log likelihood of the completions' tokens, in nats."""
    rows = sorted((tokenize(tokenizer, q) for q in questions), key=lambda q: len(q.context))
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        ids, _, is_answer = pad_rows(batch, tokenizer.pad_token_id)
        targets = ids.masked_fill(~is_answer, -100)[:, 1:]
        kept = (targets != -100).any(dim=0).nonzero().squeeze(1)
        logits = model(input_ids=ids, logits_to_keep=kept).logits
        total += cross_entropy(logits.float().flatten(0, 1), targets[:, kept].flatten(), reduction="sum").item()
        tokens += int((targets != -100).sum())
    return total / tokens


def print_tables(runs: Sequence[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, and in how many runs a metric is better than PEFT's truncation."""
    for task in TASKS:
        mine = [run for run in runs if run["task"] == task]
        print(f"\n{task}: held-out loss, mean ± standard deviation of {len(mine)} seeds\n")
        print(f"| rank | {' | '.join(map(str, RANKS))} |\n|---|{'---|' * len(RANKS)}")
        print(_row("`convert_to_lora`", [run[PEFT]["uniform"] for run in mine]))
        for metric in METRICS:
            print(_row(f"`{metric}`", [run[metric]["uniform"] for run in mine if metric in run]))
        for metric in BUDGETED:
            print(_row(f"ranks per layer, `{metric}`", [run[metric]["budget"] for run in mine]))
        for metric in METRICS:
            print(_row(f"`{metric}` minus `convert_to_lora`", _minus(mine, (metric, "uniform"), (PEFT, "uniform"))))
        for metric in BUDGETED:
            print(_row(f"per layer minus uniform, `{metric}`", _minus(mine, (metric, "budget"), (metric, "uniform"))))


def _minus(runs: Sequence[dict[str, Any]], one: tuple[str, str], other: tuple[str, str]) -> list[list[float]]:
    """Differences run by run, since a seed moves both."""
    pairs = [(run[one[0]][one[1]], run[other[0]][other[1]]) for run in runs if one[0] in run]
    return [[a - b for a, b in zip(*pair, strict=False)] for pair in pairs]


def _row(name: str, values: Sequence[Sequence[float]]) -> str:
    cells = [f"{fmean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in zip(*values, strict=True)]
    return f"| {name} ({len(values)}) | {' | '.join(cells + [''] * (len(RANKS) - len(cells)))} |"


if __name__ == "__main__":
    main()
