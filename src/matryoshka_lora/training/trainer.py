"""TRL's `SFTTrainer`, with a loss that skips what has no label on CPUs too, batches of like lengths that resume, and
arguments that may be written into logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from matryoshka_lora.loaded import logits_at, places
from matryoshka_lora.privacy import shown


class Arguments(SFTConfig):
    """TRL's config, whose written forms, such as those in a logger's files, have no token and no absolute path."""

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = shown(super().to_dict())
        return found


class EpochSampler(Sampler[int]):
    """A `LengthGroupedSampler` whose order is a function of the seed and the number of the epoch, and of nothing else.

    So every process has the same, and a run that goes on from a checkpoint has that of the run that never stopped. With
    transformers 5.24 the order depends on all random numbers that were drawn before, such as those of dropout, which
    no other process draws and no checkpoint in mid-epoch can give back.

    Args:
        sampler: What orders the rows.
        seed: Any integer.
        epoch: Gives the number of the epoch that begins.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class CompletionTrainer(SFTTrainer):
    """An `SFTTrainer` that computes logits only before tokens that have a label.

    With Triton, TRL's fused head does so by itself. Without it, TRL 1.16 scores every position of every row, which on a
    CPU is a third of a step when only short answers have labels. Where TRL's loss is more than the mean negative log
    likelihood, the model is compiled, or its code is not that of transformers, TRL computes it.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not self._is_plain_loss(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        positions, labelled = places(targets != -100)
        labels = targets.gather(1, positions).masked_fill(~labelled, -100)
        others = {key: value for key, value in inputs.items() if key != "labels"}
        options = {"labels": labels, "shift_labels": labels, "num_items_in_batch": num_items_in_batch}
        with logits_at(self.accelerator.unwrap_model(model), positions):
            loss: torch.Tensor = model(**others, use_cache=False, **options).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over the processes what is already a sum
        return loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's at each checkpoint would stand where the adapter's own card belongs."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        if not self.args.accelerator_config.split_batches:
            sampler.batch_size *= self.args.world_size  # as one process would group the rows of a step
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Before a step of an epoch its number is the whole part of the Trainer's epoch.
        return EpochSampler(sampler, seed, lambda: int(self.state.epoch or 0))

    def _is_plain_loss(self, model: Any, inputs: dict[str, Any]) -> bool:
        labels = inputs.get("labels")
        own = type(self.accelerator.unwrap_model(model).get_base_model()).__module__
        return (
            labels is not None
            and own.startswith("transformers.")  # code of a model's own may not know `shift_labels`
            and labels.device.type == "cpu"
            and bool((labels[:, 1:] != -100).any())
            and self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and not self.args.torch_compile  # hooks come and go
        )
