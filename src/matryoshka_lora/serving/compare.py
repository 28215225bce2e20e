"""Compare an exported adapter, as it lies in its file, with the adapter that it was cut out of; no model is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.formats.write import Ranks, stored_ranks

TOLERANCE = 1e-2
"""Of a layer's update, and of what the adapter does to the logits. Factors in half precision are rounded by 0.4 %."""


def check_layers(found: OpenedAdapter, source: OpenedAdapter, ranks: Ranks, pad: bool = False) -> None:
    """Compare every layer.

    Args:
        found: The export.
        source: The nested adapter.
        ranks: That were exported, see `matryoshka_lora.formats.write.cut`.
        pad: As there.

    Raises:
        MatryoshkaError: A layer is missing, has another rank or another update, or another tensor is not the same.
    """
    state = source.nested
    widths = {} if isinstance(ranks, int) else stored_ranks(ranks, pad)
    left = {layer.name: layer for layer in found.layers}
    for layer in source.layers:
        own = ranks if isinstance(ranks, int) else ranks[layer.name]
        wanted_rank, other = widths.get(layer.name, own), left.pop(layer.name, None)
        if (other.rank if other else 0) != wanted_rank:
            raise wrong(f"layer {layer.name} has rank {other.rank if other else 0} and not {wanted_rank}")
        if other is not None:
            A, B = source.factors(layer)
            other_A, other_B = (factor.double() for factor in found.factors(other))
            share = _distance((B.double() * state.diagonal(own), A.double()), (other_B * other.scale, other_A))
            if not share <= TOLERANCE:
                raise wrong(f"the update of layer {layer.name} differs by {100 * share:.2g} % of it")
    if left or set(source.others) != set(found.others):
        raise wrong(f"it holds {sorted((*left, *set(source.others) ^ set(found.others)))[0]} or lacks it")
    for key in source.others:
        if not found.tensor(key).equal(source.tensor(key)):
            raise wrong(f"{key} has other values")


def wrong(how: str, what: str = "the adapter") -> MatryoshkaError:
    """The error for an export that is not what it should be."""
    return MatryoshkaError(f"{what} was made and then thrown away, because it computes something else: {how}")


def _distance(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> float:
    """The norm of the difference of two products ``B A``, over that of the first. Neither is formed."""
    B, A = torch.cat([wanted[0], -found[0]], dim=-1), torch.cat([wanted[1], found[1]], dim=-2)
    size, difference = (float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)) for b, a in (wanted, (B, A)))
    return (difference / size) ** 0.5 if size > 0 else float(difference > 0)
