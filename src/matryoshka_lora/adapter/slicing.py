"""Cut a rank out of an adapter's tensors: no model is needed, only the file."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft import LoraConfig
from torch import Tensor

from matryoshka_lora.adapter.factors import as_matrices, as_parameters
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError

_STRANGE = re.compile(r"[/\\]|^__")
_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def factor_keys(tensors: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """For each layer of a PEFT state dict: its module's name as PEFT writes it, the key of A and the key of B."""
    for key in tensors:
        for suffix_A, suffix_B in _SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                yield module, key, module + suffix_B


Ranks = int | Mapping[str, int]
"""One rank for all layers, or one for each by its name in the base model; 0 leaves a layer out."""


def slice_tensors(
    tensors: Mapping[str, Tensor], state: NestedState, rank: Ranks, pad: bool = False
) -> dict[str, Tensor]:
    """The tensors of the deployed prefix of one rank, in PEFT's layout; a kept diagonal is folded into B.

    Args:
        tensors: A PEFT state dict at the largest rank. Tensors that are not LoRA factors are passed on.
        state: How the adapter is deployed.
        rank: From 1 to R; R gives the whole adapter in its deployed form. Ranks that differ must be a reordered
            adapter's.
        pad: Fill all layers up to the largest of the ranks, with zeros in B.
    """
    sliced, widths = dict(tensors), {} if isinstance(rank, int) else stored_ranks(rank, pad)
    for module, key_A, key_B in factor_keys(tensors):
        own = rank if isinstance(rank, int) else rank[layer_name(module)]
        filled = widths.get(layer_name(module), own)
        if filled == 0:
            del sliced[key_A], sliced[key_B]
            continue
        A, B = as_matrices(tensors[key_A], tensors[key_B], state.nesting.max_rank)
        mask = state.mask(own).to(B.device, torch.promote_types(B.dtype, torch.float32))
        new = as_parameters(
            A[..., :filled, :], (B * mask)[..., :filled].to(B.dtype), tensors[key_A].shape, tensors[key_B].shape
        )
        sliced[key_A], sliced[key_B] = (factor.contiguous().clone() for factor in new)
    return sliced


def stored_ranks(ranks: Mapping[str, int], pad: bool) -> dict[str, int]:
    """How many columns each layer has in the file; 0 leaves it out.

    With ``pad`` all have the largest rank. Without, a layer has its own; but one that is left out, and whose name ends
    like that of another, has a column of zeros, since PEFT would make factors for both and miss those of one.
    """
    if pad:
        return dict.fromkeys(ranks, max(ranks.values()))
    kept = {name for name, rank in ranks.items() if rank > 0}
    return {name: rank or int(not kept.isdisjoint(_ends(name))) for name, rank in ranks.items()}


def _ends(name: str) -> Iterator[str]:
    """The parts of a dotted name that begin after one of its dots."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def check_layer_name(module: str, where: str) -> None:
    """Raises MatryoshkaError for a name that no module of a model has, such as a path."""
    parts = module.split(".")
    if len(module) > 500 or not module.isprintable() or not all(parts) or any(_STRANGE.search(part) for part in parts):
        raise MatryoshkaError(f"{where} has factors for {module[:80]!r}, which is no layer. Copy the adapter again")


def layer_name(module: str) -> str:
    """The name in the base model of a module as PEFT writes it."""
    return module.removeprefix("base_model.model.")


def shorten_tensors(tensors: Mapping[str, Tensor], max_rank: int, rank: int) -> dict[str, Tensor]:
    """The tensors with the first ``rank`` of ``max_rank`` columns, as they are."""
    shorter = dict(tensors)
    for _, key_A, key_B in factor_keys(tensors):
        A, B = as_matrices(tensors[key_A], tensors[key_B], max_rank)
        new = as_parameters(A[..., :rank, :], B[..., :rank], tensors[key_A].shape, tensors[key_B].shape)
        shorter[key_A], shorter[key_B] = (factor.contiguous().clone() for factor in new)
    return shorter


def slice_config(config: LoraConfig, state: NestedState, rank: Ranks, pad: bool = False) -> LoraConfig:
    """The config of that prefix: a plain LoRA adapter for any engine.

    ``use_rslora`` is off because some converters ignore it; the scale is in ``lora_alpha``. Where ranks differ, every
    layer has the one scale of a reordered adapter, so an engine that ignores the patterns still scales rightly.
    """
    ranks = {} if isinstance(rank, int) else stored_ranks(rank, pad)
    top = rank if isinstance(rank, int) else max(ranks.values())
    sliced = copy.deepcopy(config)
    sliced.r = top
    sliced.lora_alpha = state.scale(top) * top
    sliced.use_rslora = False
    kept = {name: own for name, own in ranks.items() if own > 0}
    # PEFT takes these as regular expressions for the end of a name: `fc` would stand for `sub.fc` too.
    sliced.rank_pattern = {f"^{re.escape(name)}": own for name, own in kept.items() if own != top}
    sliced.alpha_pattern = {name: state.scale(top) * own for name, own in sliced.rank_pattern.items()}
    if len(kept) < len(ranks):
        sliced.target_modules, sliced.layers_to_transform, sliced.layers_pattern = set(kept), None, None
    sliced.init_lora_weights = True
    sliced.inference_mode = True
    return sliced
