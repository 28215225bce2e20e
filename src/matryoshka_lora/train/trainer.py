"""TRL's `SFTTrainer`, with a loss that skips what has no label on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer


class CompletionTrainer(SFTTrainer):
    """An `SFTTrainer` that computes logits only where a token of some row has a label.

    With Triton, TRL's fused head does so by itself. Without it, TRL 1.16 scores every position of every row, which on a
    CPU is a third of a step when only short answers have labels. Where TRL's loss is more than the mean negative log
    likelihood, TRL computes it.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not self._is_plain_loss(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        positions = (targets != -100).any(dim=0).nonzero().squeeze(1)
        labels = targets[:, positions].contiguous()
        others = {key: value for key, value in inputs.items() if key != "labels"}
        loss: torch.Tensor = model(
            **others,
            use_cache=False,
            logits_to_keep=positions,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=num_items_in_batch,
        ).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over the processes what is already a sum
        return loss

    def _is_plain_loss(self, inputs: dict[str, Any]) -> bool:
        labels = inputs.get("labels")
        return (
            labels is not None
            and labels.device.type == "cpu"
            and bool((labels[:, 1:] != -100).any())
            and self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
        )
