"""See that an exported file computes what the nested adapter computes at that rank: layer by layer, and as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import as_matrices
from matryoshka_lora.adapter.slicing import Ranks, factor_keys, layer_name, stored_ranks
from matryoshka_lora.formats.opened import LoraFiles
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.adapter.variant import Gate
from matryoshka_lora.errors import MatryoshkaError

_TOLERANCE = 1e-2
"""Of a layer's update, and of what the adapter does to the logits. Factors in half precision are rounded by 0.4 %."""

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
    state = adapter.state
    for name, _, variant in adapter._layers():
        rank = ranks[name]
        gate = state.mask(rank) * state.scale(rank) if rank else torch.zeros(state.nesting.max_rank)
        variant.stand_before(Gate.on(variant.device, gate))


def check_layers(
    found: LoraFiles, state: NestedState, tensors: Mapping[str, Tensor], ranks: Ranks, pad: bool = False
) -> None:
    """Compare every layer of an exported adapter, as it lies in its file, with the nested adapter's.

    Args:
        found: The export.
        state: The nested adapter's.
        tensors: Those of the nested adapter.
        ranks: That were exported, see `matryoshka_lora.adapter.slicing.slice_tensors`.
        pad: As there.

    Raises:
        MatryoshkaError: A layer is missing, has another rank or another update, or another tensor is not the same.
    """
    widths = {} if isinstance(ranks, int) else stored_ranks(ranks, pad)
    left = {layer.name: layer for layer in found.layers}
    others = dict(tensors)
    for module, key_A, key_B in factor_keys(tensors):
        name = layer_name(module)
        own = ranks if isinstance(ranks, int) else ranks[name]
        A, B = as_matrices(others.pop(key_A), others.pop(key_B), state.nesting.max_rank)
        layer = left.pop(name, None)
        if (layer.rank if layer else 0) != widths.get(name, own):
            raise _wrong(f"layer {name} has rank {layer.rank if layer else 0} and not {widths.get(name, own)}")
        if layer is not None:
            wanted = B.double() * (state.mask(own) * state.scale(own if own else 1)), A.double()
            other_A, other_B = (factor.double() for factor in found.factors(layer))
            share = _distance(wanted, (other_B * layer.scale, other_A))
            if not share <= _TOLERANCE:
                raise _wrong(f"the update of layer {name} differs by {100 * share:.2g} % of it")
    different = sorted((*left, *others.keys() ^ set(found.others)))
    if different:
        raise _wrong(f"{different[0]} is in one of the two only")
    for key, tensor in others.items():
        if not found.tensor(key).equal(tensor):
            raise _wrong(f"{key} has other values")


def _distance(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> float:
    """The norm of the difference of two products ``B A``, over that of the first. Neither is formed."""
    B, A = torch.cat([wanted[0], -found[0]], dim=-1), torch.cat([wanted[1], found[1]], dim=-2)
    size, difference = (float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)) for b, a in (wanted, (B, A)))
    return (difference / size) ** 0.5 if size > 0 else float(difference > 0)


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
    if not result.share <= _TOLERANCE:
        raise _wrong(f"{result}. Check that the base model is the one that the adapter was trained on", what)
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


def _wrong(how: str, what: str = "the adapter") -> MatryoshkaError:
    return MatryoshkaError(f"{what} was made and then thrown away, because it computes something else: {how}")
