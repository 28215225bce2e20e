"""Reorder adapters that PEFT alone has trained, by ``svd`` and ``trained``, and measure them::

    python -m research.strangers        # six adapters, about an hour of one core

Each adapter is trained and saved without this package, loaded by `matryoshka_lora.load`, and
reordered with 128 of its training questions, which are held out of its training. Loss and accuracy
are those of 100 test questions, which choose nothing. A line is appended to research/runs for each.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from matryoshka_lora import load
from matryoshka_lora.models import load_model, load_tokenizer
from research import tasks
from research.run import set_up, versions
from research.runs import Job, append_line, whole_lines
from research.study import RUNS, Study, load_study
from research.training import AnswerTrainer, arguments, score

FILE = RUNS / "strangers.jsonl"
RATES = {"family_relationships": 2e-3, "chain_sum": 1e-3}
"""Those that the study headline has chosen for plain LoRA."""

RANKS, QUESTIONS, SEEDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 128, (0, 1, 2)


def main() -> None:
    """Do what is missing."""
    set_up(1)
    lines = whole_lines(FILE)
    version = versions()["matryoshka-lora"]
    done = {
        (one["task"], one["seed"]) for one in map(json.loads, lines) if one["version"] == version
    }
    for task in RATES:
        for seed in SEEDS:
            if (task, seed) not in done:
                found = {"version": version, "task": task, "seed": seed, "split": "test"}
                append_line(FILE, json.dumps(found | stranger(task, seed)) + "\n")


def stranger(task: str, seed: int) -> dict[str, Any]:
    """Train an adapter with PEFT, reorder it, and return what was measured."""
    study = replace(load_study("hardly"), items={"judge": QUESTIONS, "test": 100})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained_by_peft(study, Job("lora", task, 32, RATES[task], seed, "test"), folder)
        tokenizer = trainer.processing_class
        asked = tokenized(trainer, tasks.measured_rows(study, task, "test", seed))
        rows = tasks.judge_rows(study, task, "lora", seed)
        found: dict[str, Any] = {"items": len(asked), "ranks": RANKS, "questions": len(rows)}
        loss, right = score(trainer.model.eval(), trainer, asked)
        found["adapter"] = {"loss": loss, "accuracy": right}
        adapter = load(load_model(study.model, "bf16", device="cpu"), Path(folder) / "adapter")
        for order in ("svd", "trained"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                data = {"data": rows, "tokenizer": tokenizer} if order == "trained" else {}
                adapter.reorder(order, **data)
            curve = []
            for rank in RANKS:
                adapter.set_rank(rank)
                curve.append(score(adapter.model.eval(), trainer, asked))
            found[order] = {
                "loss": [one for one, _ in curve],
                "accuracy": [one for _, one in curve],
                "order": adapter.order,
                "warned": [str(one.message) for one in caught if one.category is UserWarning],
            }
    return found


def trained_by_peft(study: Study, job: Job, folder: str) -> AnswerTrainer:
    """Return the Trainer of an adapter that it has trained and PEFT has saved in a folder."""
    set_seed(job.seed)
    base = load_model(study.model, "bf16", device="cpu")
    config = LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules="all-linear")
    trainer = AnswerTrainer(
        model=get_peft_model(base, config),
        args=arguments(study, job, folder),
        train_dataset=Dataset.from_list(tasks.train_rows(study, job.task, job.recipe, job.seed)),
        processing_class=load_tokenizer(study.model),
    )
    trainer.train()
    trainer.model.save_pretrained(Path(folder) / "adapter")
    return trainer


def tokenized(trainer: AnswerTrainer, rows: list[dict[str, Any]]) -> Any:
    """Return rows as the Trainer tokenises them."""
    made = AnswerTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=Dataset.from_list(rows),
        processing_class=trainer.processing_class,
    )
    return made.train_dataset


if __name__ == "__main__":
    main()
