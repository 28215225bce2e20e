"""See that an exported file computes what the nested adapter computes at that rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.slicing import Ranks
from matryoshka_lora.adapter.variant import Gate
from matryoshka_lora.errors import MatryoshkaError

# As a share of what the adapter changes. Weights that are stored in half precision are rounded when they are merged.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
_HALF_TOLERANCE = 0.5


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
    state = adapter.state
    for name, _, variant in adapter._layers():
        rank = ranks[name]
        gate = state.mask(rank) * state.scale(rank) if rank else torch.zeros(state.nesting.max_rank)
        variant.stand_before(Gate.on(variant.device, gate))


def check(found: Tensor, wanted: Tensor, without: Tensor, dtype: torch.dtype, what: str) -> Verified:
    """Compare logits.

    Args:
        found: Of the export.
        wanted: Of the nested adapter at its rank.
        without: Of the base model.
        dtype: Of the weights, which says how exact they can be.
        what: Is compared, for the message.

    Raises:
        MatryoshkaError: The export computes something else.
    """
    effect = (wanted - without).norm()
    share = float((found - wanted).norm() / effect) if effect > 0 else float((found - wanted).norm() > 0)
    result = Verified(float((found - wanted).abs().max()), share, float(wanted.abs().max()))
    if not share <= _TOLERANCE.get(dtype, _HALF_TOLERANCE):
        raise MatryoshkaError(
            f"{what} was made and then thrown away, because it computes something else: {result}. Use a base model in "
            "a finer dtype, and check that it is the one that the adapter was trained on"
        )
    return result
