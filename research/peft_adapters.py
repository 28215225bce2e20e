"""Reorder adapters that were trained by PEFT, train their ranks, and measure them::

    python -m research.peft_adapters        # six adapters, about an hour of one core

Each adapter is trained and saved without this package and loaded by `matryoshka_lora.load`. Its
ranks are trained with 128 training questions, which are held out of its training. Loss and accuracy
are those of 100 test questions, which choose nothing. A line is appended to research/runs for each.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from matryoshka_lora import NestedAdapter, load
from matryoshka_lora.peft.base_model import load_model, load_tokenizer
from research import tasks
from research.run import set_up, versions
from research.runs import Job, append_line, complete_lines
from research.study import RUNS, Study, load_study
from research.training import AnswerTrainer, arguments, score

FILE = RUNS / "peft_adapters.jsonl"
LEARNING_RATES = {"family_relationships": 2e-3, "chain_sum": 1e-3}
"""The rates that the study headline has chosen for plain LoRA."""

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NUM_QUESTIONS = 128
NUM_VALIDATION = 16
"""So many of these questions validate the ranks, and are not trained on."""
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the adapters that this version of the package has not run yet."""
    set_up(1)
    version = versions()["matryoshka-lora"]
    lines = [json.loads(line) for line in complete_lines(FILE)]
    done = {(line["task"], line["seed"]) for line in lines if line["version"] == version}
    for task in LEARNING_RATES:
        for seed in SEEDS:
            if (task, seed) not in done:
                line = {"version": version, "task": task, "seed": seed, "split": "test"}
                line.update(run(task, seed))
                append_line(FILE, json.dumps(line) + "\n")


def run(task: str, seed: int) -> dict[str, Any]:
    """Train an adapter with PEFT, reorder it and train its ranks, and return the measurements."""
    study = replace(load_study("hardly"), items={"judge": NUM_QUESTIONS, "test": 100})
    job = Job("lora", task, 32, LEARNING_RATES[task], seed, "test")
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_with_peft(study, job, folder)
        test = tokenize(trainer, tasks.measured_examples(study, task, "test", seed))
        examples = tasks.held_out_examples(study, task, "lora", seed)
        loss, accuracy = score(trainer.model.eval(), trainer, test)
        base_model = load_model(study.model, "bf16", device="cpu")
        adapter = load(base_model, Path(folder) / "adapter")
        train_ranks = partial(
            adapter.train_ranks,
            examples[:-NUM_VALIDATION],
            trainer.processing_class,
            eval_data=examples[-NUM_VALIDATION:],
        )
        return {
            "items": len(test),
            "ranks": RANKS,
            "questions": len(examples),
            "adapter": {"loss": loss, "accuracy": accuracy},
            "svd": _measure(adapter, adapter.reorder, trainer, test),
            "trained": _measure(adapter, train_ranks, trainer, test),
        }


def _measure(
    adapter: NestedAdapter, change: Callable[[], object], trainer: AnswerTrainer, test: Any
) -> dict[str, Any]:
    """Change an adapter, and measure it at every rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        change()
    losses: list[float] = []
    accuracies: list[float] = []
    for rank in RANKS:
        adapter.set_rank(rank)
        loss, accuracy = score(adapter.model.eval(), trainer, test)
        losses.append(loss)
        accuracies.append(accuracy)
    return {
        "loss": losses,
        "accuracy": accuracies,
        "order": adapter.order,
        "warned": [str(w.message) for w in caught if w.category is UserWarning],
    }


def train_with_peft(study: Study, job: Job, folder: str) -> AnswerTrainer:
    """Train an adapter with a Trainer, save it with PEFT, and return the Trainer."""
    set_seed(job.seed)
    base_model = load_model(study.model, "bf16", device="cpu")
    config = LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules="all-linear")
    examples = tasks.training_examples(study, job.task, job.recipe, job.seed)
    trainer = AnswerTrainer(
        model=get_peft_model(base_model, config),
        args=arguments(study, job, folder),
        train_dataset=Dataset.from_list(examples),
        processing_class=load_tokenizer(study.model),
    )
    trainer.train()
    trainer.model.save_pretrained(Path(folder) / "adapter")
    return trainer


def tokenize(trainer: AnswerTrainer, examples: list[dict[str, Any]]) -> Any:
    """Return examples as the Trainer tokenizes them."""
    new_trainer = AnswerTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=Dataset.from_list(examples),
        processing_class=trainer.processing_class,
    )
    return new_trainer.train_dataset


if __name__ == "__main__":
    main()
