"""Measure the loss of some ranks during the training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting, check_rank, check_ranks
from matryoshka_lora.peft.lora_layers import lora_layers, model_factors
from matryoshka_lora.peft.variant import NestedVariant
from matryoshka_lora.tensors import restored_modes
from matryoshka_lora.training.data import Batch, TrainingData, read_training_data
from matryoshka_lora.training.factors import ModelFactors
from matryoshka_lora.training.train_ranks import validation_losses


class RankLossCallback(TrainerCallback):
    """Log the evaluation loss of some ranks at each evaluation of a Trainer.

    It answers which rank is enough while the training is still going on. A rank is truncated by
    SVD, as `reorder` would do now. `train_ranks` can lower the losses of low ranks further. The
    factors are restored, bit for bit, so the training is the same as without the callback.

    The Trainer logs ``eval_rank_1_loss`` and so on, and ``eval_rank_losses_runtime`` in seconds:
    the time of an SVD of each layer, and of one evaluation of up to 64 examples for each rank.

    Example::

        trainer.add_callback(RankLossCallback(trainer))

    Args:
        trainer: A Trainer of plain LoRA, with an evaluation set. It needs no nested adapter.
        ranks: The ranks to measure. Defaults to the powers of two up to R.
        max_examples: The maximum number of examples, the same ones each time.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(
        self,
        trainer: Trainer,
        ranks: Iterable[int] | None = None,
        *,
        max_examples: int = 64,
        adapter_name: str = "default",
    ) -> None:
        self._trainer = trainer
        self._ranks = None if ranks is None else check_ranks(ranks)
        self._max_examples = max_examples
        self._adapter_name = adapter_name
        self._data: TrainingData | None = None
        self._batches: list[Batch] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the evaluation set.

        Raises:
            MatryoshkaError: There is none; or a rank is above R; or the adapter is sharded, or
                trained with another rule than ``lora``.
        """
        if args.eval_strategy == "no":
            warnings.warn(
                "The Trainer evaluates nothing during the training, so RankLossCallback measures "
                "nothing. Pass eval_strategy='steps' to its arguments.",
                stacklevel=2,
            )
        factors = self._factors()
        for rank in self._ranks or ():
            check_rank(rank, factors.max_rank)
        layers = lora_layers(self._trainer.model, self._adapter_name)
        variants = [layer.lora_variant.get(self._adapter_name) for _, layer in layers]
        if any(isinstance(v, NestedVariant) and v.state.rule.name != "lora" for v in variants):
            raise MatryoshkaError("RankLossCallback measures plain LoRA. Use `rule='lora'`.")
        if factors.are_sharded:
            raise MatryoshkaError(
                "RankLossCallback cannot measure sharded factors. Train without it."
            )
        with restored_modes(self._trainer.model), torch.random.fork_rng():
            data = read_training_data(self._trainer.model, self._trainer).validation
            if data is None:
                raise MatryoshkaError(
                    "RankLossCallback needs an evaluation set. Pass `eval_dataset` to the Trainer."
                )
            data.show_progress = False
            self._data, self._batches = data, data.batches(data.sample(self._max_examples, seed=0))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the ranks, and log their losses."""
        if self._data is None:  # evaluated before the training
            return
        start = time.perf_counter()
        factors = self._factors()
        ranks = self._ranks or Nesting.powers_of_two(factors.max_rank).ranks
        model = self._trainer.model
        with restored_modes(model), torch.random.fork_rng(), factors.restored():
            model.eval()
            factors.reorder(np.ones(factors.max_rank))
            losses = validation_losses(factors, ranks, self._data, self._batches)
        seconds = time.perf_counter() - start
        metrics = {f"eval_rank_{rank}_loss": loss for rank, loss in losses.items()}
        self._trainer.log({**metrics, "eval_rank_losses_runtime": round(seconds, 3)})

    def _factors(self) -> ModelFactors:
        layers = dict(lora_layers(self._trainer.model, self._adapter_name))
        if not layers:
            raise MatryoshkaError(f"The model has no LoRA adapter {self._adapter_name!r}.")
        return model_factors(self._trainer.model, layers, self._adapter_name)
