"""Rivals that minimise something else than the loss under a rule's diagonal, as Trainers; their rule is ``lora``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.hooks import RemovableHandle

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import get_factors
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.training.config import TrainConfig
from matryoshka_lora.training.trainer import CompletionTrainer


class SumTrainer(CompletionTrainer):
    """Minimises the mean of the losses of all nested ranks, as Matryoshka representations do (arXiv 2205.13147).

    Each batch is repeated in place of several passes: copy k of its rows is at the k-th rank.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = NestedAdapter(self.model)

    @staticmethod
    def copies(ranks: Sequence[int], seed: int, step: int) -> tuple[int, ...]:
        """The rank of each copy at an optimizer step, ascending; the same arguments give the same ranks.

        Args:
            ranks: The nested ranks.
            seed: Any integer.
            step: The number of optimizer steps done so far.
        """
        return tuple(ranks)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        rows, copies = len(inputs["input_ids"]), self._copies()
        repeated = {key: torch.cat([value] * len(copies)) for key, value in inputs.items()}
        items = None if num_items_in_batch is None else num_items_in_batch * len(copies)
        # Here and not in compute_loss: gradient checkpointing runs the forward again in backward.
        with self.adapter.rows([rank for rank in copies for _ in range(rows)]):
            loss: Tensor = super().training_step(model, repeated, items)
        return loss

    def _copies(self) -> tuple[int, ...]:
        return self.copies(self.adapter.nesting.ranks, self.adapter.state.seed, self.state.global_step)


class SandwichTrainer(SumTrainer):
    """The sandwich rule with in-place distillation of universally slimmable networks (arXiv 1903.05134).

    At each step the largest nested rank learns the labels. The smallest and a random one between learn the largest's
    distribution, by KL divergence and without a gradient to the largest. The loss is the mean over the copies.
    """

    @staticmethod
    def copies(ranks: Sequence[int], seed: int, step: int) -> tuple[int, ...]:
        middle = ranks[1:-1] and [random.Random(f"{seed}/{step}").choice(ranks[1:-1])]
        return tuple(dict.fromkeys((ranks[0], *middle, ranks[-1])))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:  # then there are no copies
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = inputs["labels"][:, 1:]
        positions = (targets != -100).any(dim=0).nonzero().squeeze(1)
        others = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**others, use_cache=False, logits_to_keep=positions).logits
        labelled = targets[:, positions] != -100
        copies = len(self._copies())
        *smaller, largest = logits[labelled].float().log_softmax(-1).chunk(copies)
        loss = nll_loss(largest, targets[:, positions][labelled].chunk(copies)[-1], reduction="sum")
        for student in smaller:
            loss = loss + kl_div(student, largest.detach(), reduction="sum", log_target=True)
        return loss / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)


class LearnedDiagonalTrainer(CompletionTrainer):
    """Trains a diagonal for each layer with its factors, from the paper's P on, and folds it into B at the end.

    A checkpoint would lack the diagonals.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        adapter = NestedAdapter(self.model)
        modules = [module for _, module, _ in adapter._layers()]
        # The fused layer of training takes p for a constant, and leaves a factor with a hook to PEFT's own forward.
        hooks = [self._learn(adapter, module) for module in modules]
        result = super().train(*args, **kwargs)
        with torch.no_grad():
            for module, hook in zip(modules, hooks, strict=True):
                hook.remove()
                _, B = get_factors(module, adapter.name)
                B *= module.learned_diagonal
                del module.learned_diagonal
        return result

    @staticmethod
    def _learn(adapter: NestedAdapter, module: Any) -> RemovableHandle:
        A = module.lora_A[adapter.name]
        diagonal = module.learned_diagonal = nn.Parameter(adapter.nesting.diagonal().to(A.weight))
        handle: RemovableHandle = A.register_forward_hook(lambda _, inputs, hidden: hidden * diagonal)
        return handle


class ColumnRatesTrainer(CompletionTrainer):
    """Plain LoRA in which column c of B has p_c times the learning rate, p being the paper's P.

    Adam's steps do not depend on the size of the gradients. So training with P between the factors is, but for Adam's
    epsilon and for clipped gradients, training without it where ``B diag(p)`` is the B, and its columns move that much
    faster. This is here to see whether P is anything else. It needs a weight decay of 0, which P leaves alone and a
    learning rate multiplies.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        adapter = NestedAdapter(self.model)
        factors = [get_factors(module, adapter.name)[1] for _, module, _ in adapter._layers()]
        rates = adapter.nesting.diagonal().to(factors[0])
        before: list[Tensor] = []

        def remember(*_: object) -> None:
            before[:] = [B.detach().clone() for B in factors]

        @torch.no_grad()
        def rescale(*_: object) -> None:
            for B, old in zip(factors, before, strict=True):
                B.copy_(old + rates * (B - old))

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(rescale)
        return optimizer


TRAINERS: dict[str, type[CompletionTrainer]] = {
    "sum": SumTrainer,
    "sandwich": SandwichTrainer,
    "p-learned": LearnedDiagonalTrainer,
    "p-rates": ColumnRatesTrainer,
}
"""By the name of the objective."""


def copies(objective: str | None, ranks: Sequence[int]) -> int:
    """How often an objective passes each batch through the model at a step."""
    trainer = TRAINERS.get(objective or "", CompletionTrainer)
    return len(trainer.copies(ranks, 0, 0)) if issubclass(trainer, SumTrainer) else 1


def check_objective(objective: str | None, config: TrainConfig) -> None:
    """Whether an objective can do what a config asks: those that are not the loss itself are made for the plain one.

    Raises:
        MatryoshkaError: It asks for another loss, joins rows, or is nothing for this objective.
    """
    if objective is None:
        return
    arguments = config.sft_config()
    if objective == "p-rates" and arguments.weight_decay:
        raise MatryoshkaError(
            f"training.weight_decay is {arguments.weight_decay}, which p-rates would multiply by p: leave it out"
        )
    plain = {"loss_type": "nll", "label_smoothing_factor": 0.0, "packing": False, "padding_free": False}
    for option, value in plain.items():
        if getattr(arguments, option) != value:
            raise MatryoshkaError(
                f"training.{option} is {getattr(arguments, option)!r}, which not every method can do: leave it out"
            )
