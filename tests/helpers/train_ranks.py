"""Train the ranks with TRL's Trainers, in one process or in several by `accelerate launch`.

    train_ranks.py ADAPTERS RESULTS.json

Without the folder ADAPTERS, train the adapters and save them there first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState

from helpers.models import nest_as
from helpers.trl_trainers import NESTING, make_peft_model, make_trainer

KINDS = {"sft": 1e-2, "dpo": 1e-2, "kto": 1e-2, "reward": 3e-3}  # and their learning rates


def train_adapters(folder: Path) -> None:
    folder.mkdir()
    for kind, learning_rate in KINDS.items():
        model = make_peft_model(kind)
        make_trainer(kind, model, folder, max_steps=20, learning_rate=learning_rate).train()
        model.save_pretrained(str(folder / kind))


def train_ranks(kind: str, folder: Path) -> dict[str, object]:
    model = make_peft_model(kind)
    model.load_adapter(str(folder / kind), "default", is_trainable=True)
    adapter = nest_as(model, NESTING, "lora")
    trainer = make_trainer(
        kind,
        adapter.model,
        folder,
        adapter,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=8 // PartialState().num_processes,
    )
    trainer.train()  # wraps the model for several processes, and changes nothing
    result = adapter.train_ranks(trainer, max_examples=100)
    factors = [factor.flatten() for pair in adapter.layer_factors().values() for factor in pair]
    return {
        "outcome": result.outcome,
        "examples_by_rank": result.examples_by_rank,
        "losses_before": list(result.losses_before.values()),
        "losses_after": list((result.losses_after or {}).values()),
        "factors": torch.cat(factors).tolist()[::50],
    }


def main() -> None:
    folder, output = map(Path, sys.argv[1:])
    if not folder.is_dir():
        train_adapters(folder)
    results = {kind: train_ranks(kind, folder) for kind in KINDS}
    if PartialState().is_main_process:
        output.write_text(json.dumps(results))
    if PartialState().num_processes > 1:
        torch.distributed.destroy_process_group()


main()
