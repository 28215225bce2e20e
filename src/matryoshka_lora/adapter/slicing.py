"""Cut a rank out of an adapter's tensors: no model is needed, only the file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig
from torch import Tensor

from matryoshka_lora.adapter.factors import as_matrices, as_parameters
from matryoshka_lora.adapter.state import NestedState

_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def factor_keys(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """For each layer of a PEFT state dict: its module's name as PEFT writes it, the key of A and the key of B."""
    for key in tensors:
        for suffix_A, suffix_B in _SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                yield module, key, module + suffix_B


def slice_tensors(tensors: Mapping[str, Tensor], state: NestedState, rank: int) -> dict[str, Tensor]:
    """The tensors of the deployed prefix of one rank, in PEFT's layout; a kept diagonal is folded into B.

    Args:
        tensors: A PEFT state dict at the largest rank. Tensors that are not LoRA factors are passed on.
        state: How the adapter is deployed.
        rank: From 1 to R; R gives the whole adapter in its deployed form.
    """
    sliced = dict(tensors)
    mask = state.mask(rank)
    for _, key_A, key_B in factor_keys(tensors):
        A, B = as_matrices(tensors[key_A], tensors[key_B], state.nesting.max_rank)
        A = A[..., :rank, :]
        B = (B * mask.to(B.device, torch.promote_types(B.dtype, torch.float32)))[..., :rank].to(B.dtype)
        new = as_parameters(A, B, tensors[key_A].shape, tensors[key_B].shape)
        sliced[key_A], sliced[key_B] = (factor.contiguous().clone() for factor in new)
    return sliced


def slice_config(config: LoraConfig, state: NestedState, rank: int) -> LoraConfig:
    """The config of that prefix: a plain LoRA adapter for any engine.

    ``use_rslora`` is off because some converters ignore it; the scale is in ``lora_alpha``.
    """
    sliced = copy.deepcopy(config)
    sliced.r = rank
    sliced.lora_alpha = state.scale(rank) * rank
    sliced.use_rslora = False
    sliced.rank_pattern = {}
    sliced.alpha_pattern = {}
    sliced.init_lora_weights = True
    sliced.inference_mode = True
    return sliced
