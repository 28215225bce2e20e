"""Train with LLaMA-Factory, and save every rank of the adapter in OUTPUT_DIR/nested.

In place of `llamafactory-cli train config.yaml`, with stage sft:
python examples/trainers/llama_factory.py config.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora import nest


class NestingCallback(TrainerCallback):
    """Nest the adapter when the training begins."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.args = args
        self.state = state
        self.examples = kwargs["train_dataloader"]
        self.adapter = nest(kwargs["model"])  # rule="matryoshka" trains with P
        self.callback = self.adapter.callback()
        self.callback.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.callback.on_step_begin(args, state, control, **kwargs)


nesting = NestingCallback()
run_exp(callbacks=[nesting])  # reads the command line, trains, and saves plain LoRA

if nesting.state.is_world_process_zero:
    # This uses the examples that LLaMA-Factory has tokenized. Other stages than sft have other
    # examples, so call adapter.reorder() there.
    batch_size = nesting.args.train_batch_size * nesting.args.gradient_accumulation_steps
    num_examples = nesting.state.global_step * batch_size * nesting.args.world_size
    nesting.adapter.train_ranks(nesting.examples, max_examples=max(8, num_examples // 2))
    nesting.adapter.save(Path(nesting.args.output_dir) / "nested", force=True)
