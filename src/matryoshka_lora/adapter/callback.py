"""The nesting's part in a Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.errors import MatryoshkaError

if TYPE_CHECKING:
    from matryoshka_lora.adapter.handle import NestedAdapter


class NestingCallback(TrainerCallback):
    """Draws the ranks of each optimizer step, and puts the sidecar into each checkpoint as its last file.

    The draw depends on the seed and on ``state.global_step``, which the Trainer restores: nothing else has to be saved
    for a resumed run to go on as it would have.
    """

    def __init__(self, adapter: NestedAdapter) -> None:
        self.adapter = adapter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.adapter.rule.per_row:
            return
        for option in ("packing", "padding_free"):
            if getattr(args, option, False):
                raise MatryoshkaError(
                    f"{option}=True joins the rows of a batch, and rule {self.adapter.rule.name!r} gives each row a "
                    f"rank of its own: set {option}=False or take another rule"
                )
        if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
            raise MatryoshkaError(
                f"train_sampling_strategy 'batch_rebalance' gives batches different numbers of rows, and rule "
                f"{self.adapter.rule.name!r} draws the ranks of all rows of a step: take 'group_by_length'"
            )
        if args.n_gpu > 1:
            raise MatryoshkaError(
                "nn.DataParallel splits the rows of a batch over devices: start with `accelerate launch`"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = state.train_batch_size or args.train_batch_size
        self.adapter.draw(state.global_step, rows=rows, share=(args.process_index, args.world_size))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_sidecar(folder, self.adapter.state)
