"""Train the ranks in two processes of which the second one fails, by `accelerate launch`.

    different_processes.py FOLDER

Each process writes the outcome of each case to FOLDER/INDEX.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, default_data_collator

from helpers.examples import random_examples
from helpers.models import nested_llama
from matryoshka_lora import NestedAdapter, Nesting
from matryoshka_lora.training.data import read_training_data

EXAMPLES = random_examples(24)


class FailingTrainer(Trainer):
    """A Trainer whose loss has a bug in the second process."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if PartialState().process_index == 1:
            raise AttributeError("a bug")
        return super().compute_loss(*args, **kwargs)


def new_adapter() -> NestedAdapter:
    return nested_llama(Nesting((1, 2)), "lora", layers=1, target_modules=["q_proj"])


def make_trainer(model: Any, folder: Path, examples: Any, kind: type[Trainer] = Trainer) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1
    )
    return kind(model, arguments, train_dataset=examples, data_collator=default_data_collator)


def outcome(case: str, folder: Path) -> str:
    """Return the outcome of the training, or the type of its error."""
    adapter = new_adapter()
    is_second = PartialState().process_index == 1
    data: Any = "missing.jsonl" if is_second else EXAMPLES
    if case == "no labels":
        examples = [{"input_ids": [5, 6]}] * 24 if is_second else EXAMPLES
        data = make_trainer(adapter.model, folder, examples)
    elif case == "a bug":
        data = make_trainer(adapter.model, folder, EXAMPLES, FailingTrainer)
    try:
        return adapter.train_ranks(data, max_examples=16).outcome
    except (ValueError, AttributeError, RuntimeError) as error:
        return type(error).__name__


def losses(folder: Path) -> tuple[float, float, bool]:
    """Return the loss of a `compute_loss_func`, the model's own loss, and the Trainer's setting."""

    def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    adapter = new_adapter()
    trainer = make_trainer(adapter.model, folder, EXAMPLES)
    trainer.compute_loss_func = mean_loss
    data = read_training_data(adapter.model, trainer)
    (batch,) = data.batches(range(8))
    with torch.no_grad():
        expected = float(adapter.model.eval()(**batch).loss)
        return float(data.loss(batch)), expected, trainer.args.average_tokens_across_devices


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    results: dict[str, Any] = {
        case: outcome(case, folder) for case in ("no labels", "a bug", "no data")
    }
    *results["losses"], results["is averaged"] = losses(folder)
    (folder / f"{state.process_index}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


main()
