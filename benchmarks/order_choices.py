"""How `learned` learns its order: rate, steps and rows of a step, on validation data only.

    python benchmarks/order_choices.py --out runs/reorder-study --tasks family_relationships

Takes the adapters of seed 0 that ``reorder_study.py`` trains, and prints the validation loss at each rank for each
choice. Its test questions are not looked at here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from reorder_study import RANKS, TASKS, held_out_loss, make_adapter

from matryoshka_lora.adapter import load
from matryoshka_lora.deploy.calibrate import learn_order_from
from matryoshka_lora.models import load_model, load_tokenizer
from matryoshka_lora.tasks import get_task

CHOICES = ((0.03, 20, 8, 128), (0.03, 20, 12, 240), (0.01, 20, 12, 240), (0.003, 20, 12, 240), (0.01, 40, 12, 480))
"""Learning rate, steps, rows of a step, and different rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reorder-study"))
    parser.add_argument("--items", type=int, default=100, help="validation questions (default: 100)")
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    for task in args.tasks.split(","):
        ordered = make_adapter(task, 0, args.out / f"{task}-0", "frobenius")
        questions = get_task(task).examples("validation", args.items)
        for choice in (None, *CHOICES):
            adapter = load(load_model(), ordered, trainable=True)
            if choice is not None:
                rate, steps, rows, different = choice
                examples = get_task(task, 0).examples("train", different)
                learn_order_from(adapter, tokenizer, examples, steps, rows, rate)
            adapter.model.eval()
            found = []
            for rank in RANKS:
                adapter.set_rank(rank)
                found.append(held_out_loss(adapter.model, tokenizer, questions))
            losses = "  ".join(f"{loss:.3f}" for loss in found)
            print(f"{task:20}  {'svd' if choice is None else choice!s:24}  {losses}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
