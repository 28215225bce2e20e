"""How a trained adapter of the study is deployed at each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from matryoshka_lora import MatryoshkaError, NestedAdapter, export
from research.measure import measure
from research.recipes import GAINS, MOMENT_ROWS, ORDER_ROWS, SQUEEZE_POWER, learning_rows, squeeze_steps
from research.trainers import AnswerTrainer, DistillingTrainer, factors_of
from research.training import Trained

Cut = Callable[[Trained], Iterator[tuple[NestedAdapter, int]]]
"""Makes the adapter of each nested rank, one after the other, and says at which rank it is to be used."""


def _as_trained(deploy: Literal["paper", "reordered"]) -> Cut:
    """Prefixes with the scale of their rank, or with the P of training."""

    def cut(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
        adapter = trained.adapter(deploy)
        for rank in trained.ranks:
            yield adapter, rank

    return cut


def _reordered(by: Any) -> Cut:
    def cut(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
        adapter, rows = trained.adapter(), len(trained.trainer.train_dataset)
        if by == "svd":
            adapter.reorder()
        elif len(trained.ranks) == 1 and by == "learned":
            adapter.reorder()  # one rank alone has no order
        else:
            wanted = ORDER_ROWS if by == "learned" else min(MOMENT_ROWS, rows)
            adapter.reorder(by, trained.trainer, rows=wanted, seed=trained.seed)
        for rank in trained.ranks:
            yield adapter, rank

    return cut


def _each_trained(cut_name: str) -> Cut:
    """`train_ranks` on a share of the rows of training."""

    def cut(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
        adapter, args = trained.adapter(), trained.trainer.args
        if len(trained.ranks) == 1:
            adapter.reorder()  # one rank alone has no order
        else:
            seen = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
            wanted = learning_rows(cut_name, seen)
            adapter.reorder("trained", trained.trainer, rows=wanted, seed=trained.seed)
        for rank in trained.ranks:
            yield adapter, rank

    return cut


def _distilled(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """An order that follows the distribution of the adapter at full rank in place of the answers."""
    adapter, trainer = trained.adapter(), trained.trainer
    teaching = DistillingTrainer(
        model=trained.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    adapter.reorder("learned", teaching, rows=ORDER_ROWS, seed=trained.seed)
    for rank in trained.ranks:
        yield adapter, rank


def _squeezed(in_turn: bool) -> Cut:
    """LoRA-Squeeze (arXiv 2602.10993): cut by SVD to a rank, then train on at that rank; a file for each rank.

    ``in_turn`` begins each rank with what the next larger one has become, as its In-Squeeze does; else each begins
    with the whole adapter (Cont-Squeeze). A rank r gets half the steps of the next smaller one, at
    (R / r)^0.4 times the rate of R.
    """

    def cut(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
        *ranks, top = trained.ranks
        found: dict[int, list[Tensor]] = {}
        for rank, steps in reversed(squeeze_steps(ranks, trained.trainer.args.max_steps).items()):
            if not in_turn or not found:
                adapter = _by_svd(trained)
            else:
                adapter.reorder()
            _keep(trained, dict.fromkeys(factors_of(trained.model), rank))
            args = trained.trainer.args
            with tempfile.TemporaryDirectory() as folder:
                trainer = AnswerTrainer(
                    model=trained.model,
                    args=replace(
                        args,
                        output_dir=folder,
                        max_steps=steps,
                        learning_rate=args.learning_rate * (top / rank) ** SQUEEZE_POWER,
                        seed=args.seed + rank,
                    ),
                    train_dataset=trained.trainer.train_dataset,
                    processing_class=trained.trainer.processing_class,
                )
                trainer.train()
            trained.model.eval()
            found[rank] = [factor.detach().clone() for pair in factors_of(trained.model).values() for factor in pair]
        for rank in ranks:
            adapter = trained.adapter()
            with torch.no_grad():
                factors = [factor for pair in factors_of(trained.model).values() for factor in pair]
                for factor, squeezed in zip(factors, found[rank], strict=True):
                    factor.copy_(squeezed)
            yield adapter, top  # what the rank leaves out is zero
        yield _by_svd(trained), top

    return cut


def _para(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """One threshold for the singular values of all layers, with as many parameters: PARA (arXiv 2604.27796)."""
    top = trained.ranks[-1]
    for rank in trained.ranks:
        adapter = _by_svd(trained)
        factors = list(factors_of(trained.model).values())
        sizes = torch.cat([_sizes(A, B) for A, B in factors])
        widths = torch.cat([torch.full((len(A),), A.shape[1] + B.shape[0]) for A, B in factors]).to(sizes.device)
        order = sizes.argsort(descending=True)
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[order] = widths[order].cumsum(dim=0) <= rank / top * widths.sum() + 1e-6
        with torch.no_grad():
            for (_, B), keep in zip(factors, torch.split(kept, [len(A) for A, _ in factors]), strict=True):
                B[:, ~keep] = 0
        yield adapter, top


def _budget(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """The ranks of each layer that `matryoshka_lora.export` chooses for as many parameters."""
    top = trained.ranks[-1]
    for rank in trained.ranks:
        adapter = _by_svd(trained)
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(Path(folder) / "whole")
            whole, part = Path(folder) / "whole", Path(folder) / "part"
            chosen = export(whole, part, budget=rank / top, verify=False).chosen
        assert chosen is not None  # as a budget was given
        # PEFT's model stands before the names that the package gives to layers.
        _keep(trained, {f"base_model.model.{name}": kept for name, kept in chosen.ranks.items()})
        yield adapter, top


def _gains(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Each prefix times the gain that is best on training rows."""
    *ranks, top = trained.ranks
    rows = trained.trainer.train_dataset.select(range(min(MOMENT_ROWS, len(trained.trainer.train_dataset))))

    def scaled(rank: int, gain: float) -> NestedAdapter:
        adapter = _by_svd(trained)
        _keep(trained, dict.fromkeys(factors_of(trained.model), rank), gain)
        return adapter

    for rank in ranks:
        losses = {gain: measure(scaled(rank, gain), trained.trainer, top, rows)[0] for gain in GAINS}
        yield scaled(rank, min(losses, key=losses.__getitem__)), top
    yield scaled(top, 1.0), top


def _of_version_1(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    raise MatryoshkaError(
        "learned-20 is 20 steps at half the rate, which version 0.1 could set and this one cannot: its recorded runs "
        "can be reported, and no new ones made"
    )


def _by_svd(trained: Trained) -> NestedAdapter:
    adapter = trained.adapter()
    adapter.reorder()
    return adapter


def _sizes(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of a reordered layer, but for its scale."""
    left: Tensor = torch.linalg.vector_norm(A.detach().double(), dim=1)
    right: Tensor = torch.linalg.vector_norm(B.detach().double(), dim=0)
    return left * right


@torch.no_grad()
def _keep(trained: Trained, ranks: dict[str, int], gain: float = 1.0) -> None:
    """Zero all but the first directions of each layer, and multiply these. What is zero stays so when trained on."""
    for name, (A, B) in factors_of(trained.model).items():
        B[:, : ranks[name]] *= gain
        A[ranks[name] :] = 0
        B[:, ranks[name] :] = 0


MAKERS: dict[str, Cut] = {
    "prefix": _as_trained("paper"),
    "keep": _as_trained("reordered"),
    "svd": _reordered("svd"),
    "activations": _reordered("activations"),
    "loss": _reordered("loss"),
    "para": _para,
    "budget": _budget,
    "gains": _gains,
    "learned": _reordered("learned"),
    "learned-20": _of_version_1,
    "distilled": _distilled,
    "trained": _each_trained("trained"),
    "trained-1": _each_trained("trained-1"),
    "squeezed": _squeezed(in_turn=False),
    "squeezed-in-turn": _squeezed(in_turn=True),
}
"""By the names of `research.recipes.CUTS`."""

_WEIGHED = ("svd", "activations", "loss")
_LEARNED = ("learned", "distilled", "trained", "trained-1")
SAME_AT_ALL_RANKS = ("prefix", "keep", *_WEIGHED, *_LEARNED)
"""The cuts whose adapter is the same at each rank, so that all ranks can be measured in one pass."""
