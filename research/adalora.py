"""PEFT's AdaLoRA (arXiv 2303.10512): one rank on average, shared out among the layers while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from matryoshka_lora.adapter import NestedAdapter, nest
from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.training.config import TrainConfig
from matryoshka_lora.data.sources import load_data
from matryoshka_lora.training.run import load_model_of, load_tokenizer_of
from matryoshka_lora.training.trainer import CompletionTrainer

_NAME = "default"


def train_adalora(config: TrainConfig) -> NestedAdapter:
    """Train at the config's largest rank, and turn the result into LoRA, which has that rank on average over layers.

    Nothing is written.

    Raises:
        MatryoshkaError: The config has too few steps for AdaLoRA, or a quantised model.
    """
    return as_lora(train_peft(config), config)


def train_peft(config: TrainConfig) -> PeftModel:
    """The first half of `train_adalora`: PEFT's own model, trained."""
    check_adalora(config)
    arguments = config.sft_config()
    adalora = adalora_config(config, arguments.max_steps)
    # PEFT adds it to every forward, and the Trainer adds up those of a step.
    adalora.orth_reg_weight /= arguments.gradient_accumulation_steps
    set_seed(config.seed)
    model = get_peft_model(load_model_of(config), adalora)
    trainer = AdaLoraTrainer(
        model=model,
        args=arguments,
        train_dataset=load_data(config.data),
        processing_class=load_tokenizer_of(config),
        callbacks=[_Allocate(model)],
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


def check_adalora(config: TrainConfig) -> None:
    """Whether AdaLoRA can be trained by a config.

    Raises:
        MatryoshkaError: It has too few steps, or a quantised model.
    """
    if config.quantization is not None:
        raise MatryoshkaError("adalora trains no quantised model: leave training.quantization out")
    steps = config.training.get("max_steps", -1)
    if steps < 2:
        raise MatryoshkaError(f"training.max_steps is {steps}, and adalora needs 2 to choose ranks: take more")


def adalora_config(config: TrainConfig, steps: int) -> AdaLoraConfig:
    """From 1.5 r down to r, which is the paper's ratio, as are the parts of the schedule.

    A tenth of the steps goes before the ranks begin to fall, and the last half leaves them as they are.
    """
    rank = config.nesting.max_rank
    start = math.ceil(1.5 * rank)
    return AdaLoraConfig(
        **{key: value for key, value in config.lora.items() if key not in ("r", "lora_alpha")},
        init_r=start,
        target_r=rank,
        lora_alpha=start,  # PEFT divides by init_r: the scale is 1
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 500),
        total_step=steps,
    )


class AdaLoraTrainer(CompletionTrainer):
    """Takes the loss that the model gives: PEFT has added the orthogonal regularisation, and TRL's own has it not."""

    def _is_plain_loss(self, inputs: dict[str, Any]) -> bool:
        return True


class _Allocate(TrainerCallback):
    """Shares out the ranks after each step, while the gradients are still there."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step)


def as_lora(model: PeftModel, config: TrainConfig) -> NestedAdapter:
    """The same function as LoRA: ``B diag(E) A`` with E and PEFT's scale in A.

    Its one rank is the largest of a layer; layers that have fewer are filled with zeros. AdaLoRA's layers are taken out
    of the model.

    Args:
        model: AdaLoRA's, trained.
        config: Of the training.
    """
    found = {
        name: _factors(module)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, AdaLoraLayer)
    }
    rank = max(1, *(len(A) for A, _ in found.values()))
    lora = LoraConfig(**{**config.lora, "r": rank, "lora_alpha": rank})
    adapter = nest(get_peft_model(model.unload(), lora).eval(), Nesting((rank,)), "lora")
    with torch.no_grad():
        for name, module, _ in adapter._layers():
            for parameter in get_parameters(module, adapter.name):
                parameter.zero_()
            A, B = get_parameters(module, adapter.name)
            kept_A, kept_B = found[name]
            A[: len(kept_A)] = kept_A
            B[:, : len(kept_A)] = kept_B
    return adapter


def _factors(layer: AdaLoraLayer) -> tuple[Tensor, Tensor]:
    """A and B of the directions that are not masked."""
    E = layer.lora_E[_NAME].detach()
    kept = E.squeeze(1) != 0
    scale = layer.scaling[_NAME] / (layer.ranknum[_NAME] + 1e-5)  # as in PEFT's forward
    return (layer.lora_A[_NAME].detach() * E * scale)[kept], layer.lora_B[_NAME].detach()[:, kept]
