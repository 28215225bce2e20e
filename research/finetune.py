"""How low is the rank of a fine-tune? Tune a whole model, extract it, and ask every rank::

    python -m research.finetune        # six runs, about half an hour of one core

SmolLM2-135M is tuned whole on family_relationships, with the rows and steps of the study headline,
in float32 with bf16 autocast. The learning rate is chosen by the loss on validation questions, with
a seed of its own.
Each of three tuned models becomes an adapter of rank 64 by `matryoshka_lora.extract`. Loss and
accuracy are those of 100 test questions: of the tuned model, of each rank of the adapter, and of
the adapter with the changed norms and embeddings (``whole``). A line is appended for each.
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
from matryoshka_lora.models import load_model, load_tokenizer
from research import tasks
from research.run import set_up, versions
from research.runs import Job, append_line, whole_lines
from research.strangers import tokenized
from research.study import RUNS, load_study
from research.training import AnswerTrainer, arguments, score

FILE = RUNS / "finetune.jsonl"
TASK, RANKS = "family_relationships", (1, 2, 4, 8, 16, 32, 64)
RATES, RATE_SEED, SEEDS = (2e-5, 5e-5, 1e-4), 100, (0, 1, 2)


def main() -> None:
    """Do what is missing."""
    set_up(1)
    lines = whole_lines(FILE)
    done = {
        (one["split"], one["learning_rate"], one["seed"]): one for one in map(json.loads, lines)
    }
    for rate in RATES:
        _do(done, "validation", rate, RATE_SEED)
    losses = {rate: done["validation", rate, RATE_SEED]["tuned"]["loss"] for rate in RATES}
    for seed in SEEDS:
        _do(done, "test", min(losses, key=losses.__getitem__), seed)


def _do(done: dict[Any, dict[str, Any]], split: str, rate: float, seed: int) -> None:
    if (split, rate, seed) not in done:
        found = {"split": split, "learning_rate": rate, "seed": seed, **run(split, rate, seed)}
        found["version"] = versions()["matryoshka-lora"]
        append_line(FILE, json.dumps(found) + "\n")
        done[split, rate, seed] = found


def run(split: str, rate: float, seed: int) -> dict[str, Any]:
    """Tune a model with one seed, and measure it; for the test, its adapter too."""
    study = load_study("headline")
    study = replace(study, dtype="fp32", training={**study.training, "bf16": True})
    job = Job("lora", TASK, 32, rate, seed, split)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        set_seed(seed)
        model, tokenizer = (
            load_model(study.model, "fp32", device="cpu"),
            load_tokenizer(study.model),
        )
        model.save_pretrained(place / "base")
        trainer = AnswerTrainer(
            model=model,
            args=arguments(study, job, folder),
            train_dataset=Dataset.from_list(tasks.train_rows(study, TASK, "lora", seed)),
            processing_class=tokenizer,
        )
        trainer.train()
        asked = tokenized(trainer, tasks.measured_rows(study, TASK, split, seed))

        def measured(one: Any) -> dict[str, float]:
            return dict(zip(("loss", "accuracy"), score(one.eval(), trainer, asked), strict=True))

        found: dict[str, Any] = {"tuned": measured(model)}
        if split == "validation":
            return found
        model.save_pretrained(place / "tuned")
        base = load_model(str(place / "base"), "fp32", device="cpu")
        found |= {"base": measured(base), "ranks": RANKS, "extracted": []}
        made = extract(place / "base", place / "tuned", place / "lora", rank=max(RANKS))
        adapter = load(base, place / "lora")
        for rank in RANKS:
            adapter.set_rank(rank)
            row = {**measured(adapter.model), "error": round(made.errors[rank], 6)}
            found["extracted"].append(row)
        whole = sorted({key.rpartition(".")[0] for key in made.others})
        extract(place / "base", place / "tuned", place / "whole", rank=max(RANKS), whole=whole)
        parts = load(load_model(str(place / "base"), "fp32", device="cpu"), place / "whole")
        found["whole"] = measured(parts.model)
    return found


if __name__ == "__main__":
    main()
