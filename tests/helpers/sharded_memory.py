"""Train the ranks of a sharded model under `accelerate launch`, and measure the memory.

    sharded_memory.py FOLDER [zero3]

Each process writes INDEX.json: the bytes of its parameters before `train_ranks`, by how much they
grow in it, the bytes of the model, and the outcome.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import helpers.cpu_backends  # noqa: F401  it changes accelerate and DeepSpeed
from helpers.examples import collate, lookup_examples
from helpers.models import tiny_llama
from matryoshka_lora import nest


class ParameterMemory:
    """The bytes of a model's parameters in this process, and their peak while layers run."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = model.parameters
        self.before = self.peak = self._bytes()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_hook(self._forward)

    def _bytes(self) -> int:
        total = 0
        for parameter in self._parameters():
            values = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data
            total += values.nbytes
            if hasattr(parameter, "ds_tensor"):
                total += parameter.ds_tensor.nbytes
        return total

    def _record(self, *args: object) -> None:
        self.peak = max(self.peak, self._bytes())

    def _forward(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._record()
        if output.requires_grad:
            output.register_hook(self._record)


# By default, DeepSpeed keeps a billion gathered parameters.
ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 1,
        "stage3_prefetch_bucket_size": 1,
        "stage3_param_persistence_threshold": 1,
    },
}


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=12,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        use_cpu="ACCELERATE_USE_FSDP" not in os.environ,
        ddp_backend="gloo",
        bf16=False,
        deepspeed=ZERO_3 if "zero3" in sys.argv else None,
    )
    base = tiny_llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=12)
    num_bytes = sum(parameter.nbytes for parameter in base.parameters())
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, lora)
    dataset = Dataset.from_list(lookup_examples(160))
    trainer = Trainer(model, arguments, collate, dataset)
    trainer.train()
    adapter = nest(trainer.model)
    memory = ParameterMemory(trainer.model)
    result = adapter.train_ranks(trainer, max_examples=32)
    adapter.save(folder / "adapter")
    measured = {
        "growth": memory.peak - memory.before,
        "before": memory.before,
        "model": num_bytes,
        "outcome": result.outcome,
        "losses": [list(result.losses_before.values()), list(result.losses_after.values())],
    }
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(measured))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # FSDP 2 on CPUs sometimes aborts while the interpreter shuts down


main()
