"""PEFT's AdaLoRA (arXiv 2303.10512): one rank on average, shared out among the layers while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora.training import TrainConfig
from research.trainers import factors_of


def adalora_config(config: TrainConfig) -> AdaLoraConfig:
    """From 1.5 r down to r, which is the paper's ratio, as are the parts of the schedule.

    A tenth of the steps goes before the ranks begin to fall, and the last half leaves them as they are.
    """
    arguments, rank = config.sft_config(), config.lora["r"]
    start, steps = math.ceil(1.5 * rank), arguments.max_steps
    adalora = AdaLoraConfig(
        target_modules=config.lora["target_modules"],
        task_type=config.lora["task_type"],
        init_r=start,
        target_r=rank,
        lora_alpha=start,  # PEFT divides by init_r: the scale is 1
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 500),
        total_step=steps,
    )
    # PEFT adds it to every forward, and the Trainer adds up those of a step.
    adalora.orth_reg_weight /= arguments.gradient_accumulation_steps
    return adalora


class Allocate(TrainerCallback):
    """Shares out the ranks after each step, while the gradients are still there."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.base_model.update_and_allocate(state.global_step)


def as_lora(model: PeftModel) -> PeftModel:
    """The same function as LoRA of scale 1: ``B diag(E) A`` with E and PEFT's scale in A.

    Its one rank is the largest of a layer; layers that have fewer are filled with zeros. AdaLoRA's layers are taken out
    of the model.

    Args:
        model: AdaLoRA's, trained.
    """
    config = model.peft_config["default"]
    found = {name: _factors(module) for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)}
    rank = max(1, *(len(A) for A, _ in found.values()))
    plain = LoraConfig(r=rank, lora_alpha=rank, target_modules=config.target_modules, task_type=config.task_type)
    made = get_peft_model(model.unload(), plain).eval()
    with torch.no_grad():
        for name, (A, B) in factors_of(made).items():
            kept_A, kept_B = found[name]
            A.zero_()[: len(kept_A)] = kept_A
            B.zero_()[:, : len(kept_A)] = kept_B
    return made


def _factors(layer: AdaLoraLayer) -> tuple[Tensor, Tensor]:
    """A and B of the directions that are not masked."""
    E = layer.lora_E["default"].detach()
    kept = E.squeeze(1) != 0
    scale = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)  # as in PEFT's forward
    return (layer.lora_A["default"].detach() * E * scale)[kept], layer.lora_B["default"].detach()[:, kept]
