"""``python -m research.sample``: what the command line prints on a LoRA that was trained.

The LoRA of README's *family*, with the first seed of its study. ``runs/sample.txt`` has the
commands, and what they print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from research.plan import rates, units
from research.run import set_up
from research.study import RUNS, load_study
from research.tasks import measured_examples
from research.training import trainer_of

COMMANDS = (
    "info family",
    "export family --error 10% -o small",
    "reorder family -o adapter",
    "eval adapter --data held-out.jsonl",
    "select adapter-evaluation --within 1%",
)


def main() -> None:
    """Train the adapter, and run the commands on it."""
    set_up(1)
    study, task = load_study("low-ordinary"), "family_relationships"
    (unit,) = units(study, "lora/svd", task)
    rate = rates(study, study.load_runs(), unit).chosen
    assert rate is not None
    job = unit.job(rate, seed=study.seeds[0], split="test")
    with TemporaryDirectory() as folder, trainer_of(study, job) as (adapter, trainer, _):
        trainer.train()
        adapter.export(Path(folder, "family"), study.rank)
        questions = measured_examples(study, task, job.split, job.seed)
        text = "".join(json.dumps(question) + "\n" for question in questions)
        Path(folder, "held-out.jsonl").write_text(text, encoding="utf-8")
        lines: list[str] = []
        for command in COMMANDS:
            process = subprocess.run(
                [sys.executable, "-m", "matryoshka_lora", *command.split()],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            lines += [f"$ matryoshka {command}", process.stdout + process.stderr]
        Path(RUNS, "sample.txt").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
