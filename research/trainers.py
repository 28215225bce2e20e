"""The Trainers of the study: the loss under a rule's diagonal, and rivals that minimise something else.

The rule of every rival is ``lora``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.hooks import RemovableHandle
from trl import SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter
from matryoshka_lora.training import TrainConfig


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers that hold a LoRA adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A}


def factors_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every layer that holds a LoRA adapter."""
    return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in lora_layers(model).items()}


class AnswerTrainer(SFTTrainer):
    """Computes logits only before the tokens that have a label; the others would take much of a CPU's step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        wanted, targets, others = _answers(inputs)
        labels = targets[None]
        options = {"labels": labels, "shift_labels": labels, "num_items_in_batch": num_items_in_batch}
        with _logits_only_at(model, wanted):
            return model(**others, use_cache=False, **options).loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: nothing of a run stays but its numbers."""


def _answers(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Where a token with a label is next, these tokens, row after row, and the inputs without labels."""
    labels = inputs["labels"]
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    return wanted, labels[:, 1:][wanted[:, :-1]], {key: value for key, value in inputs.items() if key != "labels"}


@contextmanager
def _logits_only_at(model: Any, wanted: Tensor) -> Iterator[None]:
    """A context in which a model's logits are one row: those at the wanted tokens, row after row."""

    def choose(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][wanted][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def answer_logits(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The logits before every token that has a label, (tokens, vocabulary), and these tokens, row after row."""
    wanted, targets, others = _answers(inputs)
    with _logits_only_at(model, wanted):
        return model(**others, use_cache=False).logits[0].float(), targets


class SumTrainer(AnswerTrainer):
    """Minimises the mean of the losses of all nested ranks, as Matryoshka representations do (arXiv 2205.13147).

    Each batch is repeated in place of several passes: copy k of its rows is at the k-th rank.
    """

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
        with NestedAdapter(self.model).rows([rank for rank in copies for _ in range(rows)]):
            loss: Tensor = super().training_step(model, repeated, items)
        return loss

    def _copies(self) -> tuple[int, ...]:
        return self.copies(NestedAdapter(self.model).nesting.ranks, self.args.seed, self.state.global_step)


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
        logits, targets = answer_logits(model, inputs)
        copies = len(self._copies())
        *smaller, largest = logits.log_softmax(-1).chunk(copies)
        loss = nll_loss(largest, targets.chunk(copies)[-1], reduction="sum")
        for student in smaller:
            loss = loss + kl_div(student, largest.detach(), reduction="sum", log_target=True)
        return loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)


class LearnedDiagonalTrainer(AnswerTrainer):
    """Trains a diagonal for each layer with its factors, from the paper's P on, and folds it into B at the end.

    A checkpoint would lack the diagonals.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        diagonal = NestedAdapter(self.model).nesting.diagonal()
        layers = list(lora_layers(self.model).values())
        # The fused layer of training takes p for a constant, and leaves a factor with a hook to PEFT's own forward.
        hooks = [self._learn(layer, diagonal) for layer in layers]
        result = super().train(*args, **kwargs)
        with torch.no_grad():
            for layer, hook in zip(layers, hooks, strict=True):
                hook.remove()
                layer.lora_B["default"].weight *= layer.learned_diagonal
                del layer.learned_diagonal
        return result

    @staticmethod
    def _learn(layer: Any, diagonal: Tensor) -> RemovableHandle:
        A = layer.lora_A["default"]
        learned = layer.learned_diagonal = nn.Parameter(diagonal.to(A.weight, copy=True))
        handle: RemovableHandle = A.register_forward_hook(lambda _, inputs, hidden: hidden * learned)
        return handle


class ColumnRatesTrainer(AnswerTrainer):
    """Plain LoRA in which column c of B has p_c times the learning rate, p being the paper's P.

    Adam's steps do not depend on the size of the gradients. So training with P between the factors is, but for Adam's
    epsilon and for clipped gradients, training without it where ``B diag(p)`` is the B, and its columns move that much
    faster. This is here to see whether P is anything else. It needs a weight decay of 0, which P leaves alone and a
    learning rate multiplies.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        factors = [B for _, B in factors_of(self.model).values()]
        rates = NestedAdapter(self.model).nesting.diagonal().to(factors[0])
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


class DistillingTrainer(AnswerTrainer):
    """Its loss is the KL divergence from the adapter at full rank, where the answers stand; it orders directions."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        adapter = NestedAdapter(model)
        with torch.no_grad(), adapter.rows([adapter.nesting.max_rank] * len(inputs["input_ids"]), exact=False):
            teacher = answer_logits(model, inputs)[0].log_softmax(-1)
        student = answer_logits(model, inputs)[0].log_softmax(-1)
        return kl_div(student, teacher, reduction="batchmean", log_target=True)


TRAINERS: dict[str, type[AnswerTrainer]] = {
    "sum": SumTrainer,
    "sandwich": SandwichTrainer,
    "p-learned": LearnedDiagonalTrainer,
    "p-rates": ColumnRatesTrainer,
}
"""By the name of the objective."""


def copies(objective: str | None, ranks: Sequence[int]) -> int:
    """How often an objective passes each batch through the model at a step."""
    trainer = TRAINERS.get(objective or "", AnswerTrainer)
    return len(trainer.copies(ranks, 0, 0)) if issubclass(trainer, SumTrainer) else 1


def check_objective(objective: str | None, config: TrainConfig) -> None:
    """Whether an objective can do what a config asks: all of them are made for the plain loss of single rows.

    Raises:
        MatryoshkaError: It asks for another loss, joins rows, or is nothing for this objective.
    """
    arguments = config.sft_config()
    if objective == "p-rates" and arguments.weight_decay:
        raise MatryoshkaError(
            f"training.weight_decay is {arguments.weight_decay}, which p-rates would multiply by p: leave it out"
        )
    if objective == "adalora" and arguments.max_steps < 2:
        raise MatryoshkaError(f"training.max_steps is {arguments.max_steps}, and adalora needs 2 to choose ranks")
    plain = {"loss_type": "nll", "label_smoothing_factor": 0.0, "packing": False, "padding_free": False}
    for option, value in plain.items():
        if getattr(arguments, option) != value:
            raise MatryoshkaError(
                f"training.{option} is {getattr(arguments, option)!r}, which a study cannot do: leave it out"
            )
