"""See that what was exported computes, on its base model, what the nested adapter computes at that rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from matryoshka_lora.adapter.gate import Gate
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.in_model import nested_layers
from matryoshka_lora.adapter.loading import load_opened
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.formats.write import Ranks
from matryoshka_lora.serving.compare import TOLERANCE, wrong

Base = Callable[[torch.dtype | None], Any]
"""Loads the base model, a fresh one at each call, in a dtype; None is the one that it is stored in."""

_MOST_ROUNDING = 0.5
"""What the rounding of merged weights may take of what the adapter does."""


@dataclass(frozen=True)
class Verified:
    """How far the logits of an export are from those of the nested adapter.

    Attributes:
        difference: The largest absolute difference of a logit.
        share: The norm of the difference over the norm of what the adapter does to the logits.
        largest: The largest absolute logit.
    """

    difference: float
    share: float
    largest: float

    def __str__(self) -> str:
        return (
            f"the largest difference of a logit from the nested adapter is {self.difference:.2g} (the largest logit is "
            f"{self.largest:.3g}; {100 * self.share:.2g} % of what the adapter changes)"
        )


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """The logits of 2 x 24 fixed random tokens, shape (2, 24, vocabulary), float32."""
    size = model.get_input_embeddings().weight.shape[0]  # PEFT's layer around an embedding has no num_embeddings
    ids = torch.randint(size, (2, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits: Tensor = model.eval()(input_ids=ids).logits.float().cpu()
    return logits


def nested_logits(adapter: NestedAdapter, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The logits with the adapter at a rank, or at ranks by layer, and without it."""
    use_ranks(adapter, ranks)
    wanted = probe_logits(adapter.model)
    with adapter.model.disable_adapter():
        return wanted, probe_logits(adapter.model)


def use_ranks(adapter: NestedAdapter, ranks: Ranks) -> None:
    """As `NestedAdapter.set_rank`, with 0 for layers that are left out; until the adapter is gone."""
    if isinstance(ranks, int):
        adapter.set_rank(ranks)
        return
    for name, _, variant in nested_layers(adapter.model, adapter.name):
        variant.stand_before(Gate.on(variant.device, adapter.state.diagonal(ranks[name])))


def compare_all(source: OpenedAdapter, ranks: Sequence[Ranks], folders: Sequence[Path], base: Base) -> list[Verified]:
    """Each folder as plain PEFT reads it, on one base model in float32, against the nested adapter at its rank.

    Raises:
        MatryoshkaError: One computes something else.
    """
    adapter = load_opened(base(torch.float32), source)
    wanted = [nested_logits(adapter, each) for each in ranks]
    model, found = adapter.model.unload(), []
    for folder, logits in zip(folders, wanted, strict=True):
        plain = PeftModel.from_pretrained(model, str(folder))
        found.append(check(probe_logits(plain), *logits, "the adapter"))
        model = plain.unload()
    return found


def check(found: Tensor, wanted: Tensor, without: Tensor, what: str) -> Verified:
    """Compare logits.

    Args:
        found: Of the export.
        wanted: Of the nested adapter at its rank.
        without: Of the base model.
        what: Is compared, for the message.

    Raises:
        MatryoshkaError: The export computes something else.
    """
    result = measure(found, wanted, without)
    if not result.share <= TOLERANCE:
        raise wrong(f"{result}. Check that the base model is the one that the adapter was trained on", what)
    return result


def check_rounding(found: Tensor, wanted: Tensor, without: Tensor, dtype: torch.dtype) -> Verified:
    """As `check`, for a model that is known to be what it should be, rounded to a dtype.

    Raises:
        MatryoshkaError: Too little is left of the adapter.
    """
    result = measure(found, wanted, without)
    if not result.share <= _MOST_ROUNDING:
        raise MatryoshkaError(
            f"the merged model was made and then thrown away, because rounding its weights to {dtype} takes too much "
            f"of the adapter: {result}. Use a base model in a finer dtype"
        )
    return result


def measure(found: Tensor, wanted: Tensor, without: Tensor) -> Verified:
    """How far logits are from those that are wanted; the arguments are those of `check`."""
    effect = (wanted - without).norm()
    share = float((found - wanted).norm() / effect) if effect > 0 else float((found - wanted).norm() > 0)
    return Verified(float((found - wanted).abs().max()), share, float(wanted.abs().max()))
