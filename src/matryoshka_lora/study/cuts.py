"""How a trained adapter of the study is deployed at each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import get_factors, get_parameters
from matryoshka_lora.deploy.calibrate import ROWS, learn_order_from, measure_moments
from matryoshka_lora.evaluate.questions import Question
from matryoshka_lora.reorder import reweigh_factors


@dataclass
class Trained:
    """A trained adapter, and what may be used to cut it.

    Attributes:
        adapter: In memory, trainable, with raw factors until `svd`.
        tokenizer: The base model's.
        rows: The training rows; nothing held out.
        batch_size: Of training.
        seed: Of training.
    """

    adapter: NestedAdapter
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Question]
    batch_size: int
    seed: int
    _svd: list[tuple[Tensor, Tensor]] | None = None

    def svd(self) -> None:
        """Put the factors into the order of their SVD, whatever another cut has made of them."""
        if self._svd is None:
            self.adapter.reorder()
            self._svd = [(A.clone(), B.clone()) for A, B in self._factors()]
        with torch.no_grad():
            for factors, kept in zip(self._factors(), self._svd, strict=True):
                for factor, value in zip(factors, kept, strict=True):
                    factor.copy_(value)

    def reweigh(self, gradients: bool) -> None:
        """Order the directions by second moments, as ``matryoshka reorder --metric`` does with 128 rows."""
        self.svd()
        moments = measure_moments(self.adapter, self.tokenizer, self.rows[: ROWS["loss"]], gradients)
        with torch.no_grad():
            for name, module, _ in self.adapter._layers():
                A, B = get_factors(module, self.adapter.name)
                found = moments[name]
                for factor, value in zip((A, B), reweigh_factors(A, B, found.inner, found.outer), strict=False):
                    factor.copy_(value)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        name = self.adapter.name
        return [get_parameters(module, name) for _, module, _ in self.adapter._layers()]


def _raw(inference: str) -> Callable[[Trained], None]:
    def cut(trained: Trained) -> None:
        trained.adapter.inference = inference  # type: ignore[assignment]

    return cut


_LEARNED = {"learned": 20, "learned-40": 40}


def learned_steps(cut: str) -> int:
    """How many batches of training rows a cut takes, forward and backward, after training."""
    return _LEARNED.get(cut, 0)


def _learned(steps: int) -> Callable[[Trained], None]:
    def cut(trained: Trained) -> None:
        trained.svd()
        learn_order_from(trained.adapter, trained.tokenizer, trained.rows, steps, trained.batch_size, seed=trained.seed)

    return cut


CUTS: dict[str, Callable[[Trained], None]] = {
    "prefix": _raw("prefix"),
    "keep": _raw("keep"),
    "frobenius": Trained.svd,
    "activations": lambda trained: trained.reweigh(gradients=False),
    "loss": lambda trained: trained.reweigh(gradients=True),
    **{name: _learned(steps) for name, steps in _LEARNED.items()},
}
"""By name; in this order, since the first two need the factors as they were trained."""
