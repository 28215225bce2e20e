"""How low is the rank of a fine-tune? Tune a model, extract it, and measure every rank::

    python -m research.finetune        # six runs, about half an hour of one core

All weights of SmolLM2-135M are tuned on family_relationships, with the examples and steps of the
study headline, in float32 with bf16 autocast. The learning rate is chosen by the loss on validation
questions, with a seed of its own. Each of three tuned models becomes an adapter of rank 64 by
`matryoshka_lora.extract`. Loss and accuracy are those of 100 test questions: of the tuned model, of
each rank of the adapter, and of the adapter with the changed norms and embeddings (``whole``). A
line is appended for each.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from matryoshka_lora import extract, load
from matryoshka_lora.peft.base_model import load_model, load_tokenizer
from research import tasks
from research.run import set_up, versions
from research.runs import Job, append_line, complete_lines
from research.study import RUNS, load_study
from research.training import AnswerTrainer, arguments, score

FILE = RUNS / "finetune.jsonl"
TASK = "family_relationships"
RANKS = (1, 2, 4, 8, 16, 32, 64)
LEARNING_RATES = (2e-5, 5e-5, 1e-4)
RATE_SEED = 100
SEEDS = (0, 1, 2)


def main() -> None:
    """Run what is missing."""
    set_up(1)
    runs = {
        (line["split"], line["learning_rate"], line["seed"]): line
        for line in map(json.loads, complete_lines(FILE))
    }
    losses: dict[float, float] = {}
    for rate in LEARNING_RATES:
        if ("validation", rate, RATE_SEED) not in runs:
            runs["validation", rate, RATE_SEED] = _run_and_append("validation", rate, RATE_SEED)
        losses[rate] = runs["validation", rate, RATE_SEED]["tuned"]["loss"]
    best_rate = min(losses, key=losses.__getitem__)
    for seed in SEEDS:
        if ("test", best_rate, seed) not in runs:
            _run_and_append("test", best_rate, seed)


def _run_and_append(split: str, rate: float, seed: int) -> dict[str, Any]:
    line: dict[str, Any] = {"split": split, "learning_rate": rate, "seed": seed}
    line.update(run(split, rate, seed))
    line["version"] = versions()["matryoshka-lora"]
    append_line(FILE, json.dumps(line) + "\n")
    return line


def run(split: str, rate: float, seed: int) -> dict[str, Any]:
    """Tune a model with a seed, and measure it; for the test, measure its adapter too."""
    study = load_study("headline")
    study = replace(study, dtype="fp32", training={**study.training, "bf16": True})
    job = Job("lora", TASK, 32, rate, seed, split)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        set_seed(seed)
        model = load_model(study.model, "fp32", device="cpu")
        model.save_pretrained(folder / "base")
        trainer = AnswerTrainer(
            model=model,
            args=arguments(study, job, name),
            train_dataset=Dataset.from_list(tasks.training_examples(study, TASK, "lora", seed)),
            eval_dataset=Dataset.from_list(tasks.measured_examples(study, TASK, split, seed)),
            processing_class=load_tokenizer(study.model),
        )
        trainer.train()
        measurements: dict[str, Any] = {"tuned": _measure(model, trainer)}
        if split == "test":
            model.save_pretrained(folder / "tuned")
            measurements.update(_extract_and_measure(folder, trainer))
        return measurements


def _extract_and_measure(folder: Path, trainer: AnswerTrainer) -> dict[str, Any]:
    """Extract an adapter, with the other changed modules and without, and measure both."""
    base, tuned = folder / "base", folder / "tuned"
    base_model = load_model(str(base), "fp32", device="cpu")
    measurements: dict[str, Any] = {
        "base": _measure(base_model, trainer),
        "ranks": RANKS,
    }
    result = extract(base, tuned, folder / "lora", rank=max(RANKS))
    adapter = load(base_model, folder / "lora")
    extracted: list[dict[str, float]] = []
    for rank in RANKS:
        adapter.set_rank(rank)
        error = round(result.errors[rank], 6)
        extracted.append({**_measure(adapter.model, trainer), "error": error})
    measurements["extracted"] = extracted

    modules = sorted({key.rpartition(".")[0] for key in result.unsaved_tensors})
    extract(base, tuned, folder / "whole", rank=max(RANKS), modules_to_save=modules)
    adapter = load(load_model(str(base), "fp32", device="cpu"), folder / "whole")
    measurements["whole"] = _measure(adapter.model, trainer)
    return measurements


def _measure(model: Any, trainer: AnswerTrainer) -> dict[str, float]:
    loss, accuracy = score(model.eval(), trainer, trainer.eval_dataset)
    return {"loss": loss, "accuracy": accuracy}


if __name__ == "__main__":
    main()
