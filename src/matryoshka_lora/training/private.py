"""Training without tokens and paths of this machine in what it leaves: in the config, in logs and in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import write_text
from matryoshka_lora.formats.card import CARD_NAME
from matryoshka_lora.privacy import marks_in, paths_in, tokens_in

_TOKENS = ("hub_token", "model_init_kwargs.token")
"""Where a config may have a token: neither is ever written."""


def check_private(config: Mapping[str, Any]) -> None:
    """Raises MatryoshkaError for a config with a token or a path where it would be written or sent."""
    for name in tokens_in(config):
        if name not in _TOKENS:
            raise MatryoshkaError(
                f"{name or 'a key'} holds what looks like a token, and a config is kept with its run: take it out, and "
                "log in with `hf auth login` or set HF_TOKEN. A token for the base model may stand in "
                "model_init_kwargs.token, which is not written"
            )
    options = config.get("model_init_kwargs")
    revision = options.get("revision") if isinstance(options, Mapping) else None
    for name in paths_in({"lora": config.get("lora"), "model_init_kwargs": {"revision": revision}}):
        raise MatryoshkaError(
            f"{name} holds an absolute path, and adapter_config.json, where it would stand, goes wherever the adapter "
            "goes: take it out"
        )
    for name in marks_in(config):
        raise MatryoshkaError(
            f"{name} is a path without its folders, as a run's train.yaml has it: write the path again, for example "
            f"{name}=/where/it/is"
        )
    if config.get("push_to_hub"):
        raise MatryoshkaError(
            "push_to_hub would send logs, configs and factors without their nesting while training: leave it out, and "
            "use `matryoshka push` afterwards"
        )


class PrivateCheckpoints(TrainerCallback):
    """Takes out of each checkpoint the paths of this machine, and what nobody needs to go on.

    That is the pickle of the training arguments, PEFT's card and the path of the best checkpoint, which the Trainer
    also knows by its step.

    Args:
        home: The folder of the checkpoints that were there before.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = self.home / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from transformers.trainer import TRAINING_ARGS_NAME  # slow to import, and here already

        if args.should_save:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            for name in (TRAINING_ARGS_NAME, CARD_NAME):
                (folder / name).unlink(missing_ok=True)
            write_state(state, folder)


def write_state(state: TrainerState, folder: Path) -> None:
    """Write the Trainer's state as the Trainer does, but without the path of its best checkpoint."""
    from transformers.trainer import TRAINER_STATE_NAME

    text = json.dumps({**asdict(state), "best_model_checkpoint": None}, indent=2, sort_keys=True)
    write_text(folder / TRAINER_STATE_NAME, text + "\n")
