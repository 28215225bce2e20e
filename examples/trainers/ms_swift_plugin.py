"""A callback of ms-swift: every rank of the adapter is saved in OUTPUT_DIR/nested.

swift sft --external_plugins examples/trainers/ms_swift_plugin.py --callbacks matryoshka ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from transformers import TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora import nest


class NestingCallback(TrainerCallback):
    """Nest the adapter when the training begins, and save every rank when it has ended."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adapter = nest(self.trainer.model)  # rule="matryoshka" trains with P
        self.trainer.add_callback(self.adapter.callback())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adapter.train_ranks(self.trainer)
        if state.is_world_process_zero:
            self.adapter.save(Path(args.output_dir) / "nested", force=True)


callbacks_map["matryoshka"] = NestingCallback
