"""Learn the order of a trained adapter's directions from what its Trainer trained on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.order import ROWS, STEPS, Part, learn_order
from matryoshka_lora.errors import MatryoshkaError

if TYPE_CHECKING:
    from trl import SFTTrainer


def learn_from_trainer(adapter: NestedAdapter, trainer: SFTTrainer, *, steps: int = STEPS, seed: int = 0) -> None:
    """Reorder a trained adapter and learn its order from the rows that its Trainer trained on, 12 of them a step.

    At full rank the adapter stays what it is; see `matryoshka_lora.adapter.order`. Collator, loss and precision are the
    Trainer's. Under torch.distributed every process takes the same rows, so that all of them learn the same order.

    Args:
        adapter: What was trained; its model is no longer wrapped.
        trainer: TRL's ``SFTTrainer``, after ``train()``.
        steps: How many; the learning rate was chosen for the default.
        seed: Of the order of the rows, and of their ranks.

    Raises:
        MatryoshkaError: The training data are a stream or have no labels, there are no steps, there is no nested rank
            below R, or a loss is not finite. The adapter is reordered by its SVD in the last case, and as it was in
            the others.
    """
    if steps < 1:
        raise MatryoshkaError(f"an order cannot be learned in {steps} steps: take 1 or more, or call adapter.reorder()")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise MatryoshkaError(
            "the Trainer's data are a stream, of which no rows can be taken again: call adapter.reorder() for the "
            "SVD's order, or give the Trainer a dataset that is not streamed"
        )
    if "labels" not in trainer.data_collator([trainer.train_dataset[0]]):
        raise MatryoshkaError(
            f"the rows of {type(trainer).__name__} have no labels by which an order could be learned: call "
            "adapter.reorder() for the SVD's order"
        )
    quiet = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    batches = tqdm(_steps(adapter, trainer, steps, seed), desc="learning the order", total=steps, disable=quiet)
    learn_order(adapter, batches, steps, seed=seed)


def _steps(adapter: NestedAdapter, trainer: SFTTrainer, count: int, seed: int) -> Iterator[list[Part]]:
    rows: Any = trainer.train_dataset
    endless = cycle(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist())
    size = trainer.args.per_device_train_batch_size
    for _ in range(count):
        step = list(islice(endless, ROWS))
        chunks = [step[start : start + size] for start in range(0, ROWS, size)]
        batches = [trainer._prepare_inputs(trainer.data_collator([rows[i] for i in chunk])) for chunk in chunks]
        yield [
            Part(len(batch["input_ids"]), int((batch["labels"] != -100).sum()), partial(_loss, adapter, trainer, batch))
            for batch in batches
        ]


def _loss(adapter: NestedAdapter, trainer: SFTTrainer, inputs: dict[str, Any]) -> Tensor:
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(adapter.model, dict(inputs))
    return loss
