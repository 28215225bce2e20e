"""How a trained adapter of the study is deployed at each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import get_factors, get_parameters
from matryoshka_lora.formats.opened import Layer
from matryoshka_lora.serving.budget import choose_ranks
from matryoshka_lora.serving.calibrate import ROWS, learn_order_from, measure_moments
from matryoshka_lora.formats.spectra import Spectra
from matryoshka_lora.data.questions import Question
from matryoshka_lora.reordering.factors import reweigh_factors
from research.measure import measure
from research.recipes import GAINS, LEARNED


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
                found = moments.get(name)
                if found is None:  # no token came by, as may be with an expert
                    continue
                for factor, value in zip((A, B), reweigh_factors(A, B, found.inner, found.outer), strict=False):
                    factor.copy_(value)

    @torch.no_grad()
    def keep_budget(self, share: float) -> None:
        """Keep the singular values with the largest square per parameter, within a share of all layers' parameters.

        As ``matryoshka export --budget`` does.
        """
        self.svd()
        factors = {name: get_parameters(module, self.adapter.name) for name, module, _ in self.adapter._layers()}
        layers = [Layer(name, "", "", A.shape, B.shape, len(A), 1.0) for name, (A, B) in factors.items()]
        sizes = {name: A.double().norm(dim=1) * B.double().norm(dim=0) for name, (A, B) in factors.items()}
        for name, rank in choose_ranks(layers, Spectra("frobenius", sizes), share).ranks.items():
            factors[name][1][:, rank:] = 0

    @torch.no_grad()
    def keep_above_threshold(self, share: float) -> None:
        """Zero the singular values below one threshold for all layers: PARA (arXiv 2604.27796).

        The threshold is the lowest whose directions fit in a share of all layers' parameters.
        """
        self.svd()
        factors = self._factors()
        sizes = torch.cat([A.double().norm(dim=1) * B.double().norm(dim=0) for A, B in factors])
        widths = torch.cat([torch.full((len(A),), A.shape[1] + B.shape[0]) for A, B in factors])
        order = sizes.argsort(descending=True)
        fits = widths[order].cumsum(dim=0) <= share * widths.sum() + 1e-6
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[order[fits]] = True
        for (_, B), keep in zip(factors, kept.split_with_sizes([len(A) for A, _ in factors]), strict=True):
            B[:, ~keep] = 0

    @torch.no_grad()
    def keep_prefix(self, rank: int, gain: float) -> None:
        """Zero all but the first singular values of each layer, and multiply these."""
        self.svd()
        for _, B in self._factors():
            B[:, :rank] *= gain
            B[:, rank:] = 0

    def loss(self) -> float:
        """On as many training rows as the metric ``loss`` takes, at R."""
        return measure(self.adapter, self.tokenizer, self.rows[: ROWS["loss"]], (self.adapter.nesting.max_rank,)).loss[
            0
        ]

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        name = self.adapter.name
        return [get_parameters(module, name) for _, module, _ in self.adapter._layers()]


Cut = Callable[[Trained], "Sequence[Callable[[], None]] | None"]
"""Puts an adapter into the form whose prefixes are measured. A cut without prefixes returns what makes the adapter of
each nested rank instead, which is then measured at R."""


def _raw(inference: str) -> Cut:
    def cut(trained: Trained) -> None:
        trained.adapter.inference = inference  # type: ignore[assignment]

    return cut


def _shares(keep: Callable[[Trained, float], None]) -> Cut:
    def cut(trained: Trained) -> Sequence[Callable[[], None]]:
        ranks = trained.adapter.nesting.ranks
        return [partial(keep, trained, rank / ranks[-1]) for rank in ranks]

    return cut


def _gains(trained: Trained) -> Sequence[Callable[[], None]]:
    *ranks, largest = trained.adapter.nesting.ranks
    found = []
    for rank in ranks:
        losses = {}
        for gain in GAINS:
            trained.keep_prefix(rank, gain)
            losses[gain] = trained.loss()
        found.append(partial(trained.keep_prefix, rank, min(GAINS, key=losses.__getitem__)))
    return [*found, partial(trained.keep_prefix, largest, 1.0)]


def _learned(name: str) -> Cut:
    steps, learning_rate = LEARNED[name]

    def cut(trained: Trained) -> None:
        trained.svd()
        learn_order_from(
            trained.adapter,
            trained.tokenizer,
            trained.rows,
            steps,
            trained.batch_size,
            learning_rate,
            seed=trained.seed,
            distil=name == "distilled",
        )

    return cut


CUTS: dict[str, Cut] = {
    "prefix": _raw("prefix"),
    "keep": _raw("keep"),
    "frobenius": Trained.svd,
    "activations": lambda trained: trained.reweigh(gradients=False),
    "loss": lambda trained: trained.reweigh(gradients=True),
    "para": _shares(Trained.keep_above_threshold),
    "budget": _shares(Trained.keep_budget),
    "gains": _gains,
    **{name: _learned(name) for name in LEARNED},
}
"""By name; in this order, since the first two need the factors as they were trained."""
