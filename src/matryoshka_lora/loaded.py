"""A base model that is loaded: what its rows may be, its evaluation mode, and logits only where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def context_length(model: Any) -> int | None:
    """The most tokens that a model was made to read, where its config says it."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def pad_token(tokenizer: PreTrainedTokenizerBase, model: Any) -> int:
    """What fills short rows: the tokenizer's own, or else the end of a text, or else the first token.

    Nothing sees it, but the model must know it: a tokenizer may have a pad token that was never added to the model.
    """
    known = model.config.get_text_config().vocab_size
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None and token < known), 0)


def rotation_limit(model: Any) -> int | None:
    """The most tokens of a row, where longer ones turn all their positions otherwise (longrope); None where none do.

    Such a row changes its neighbours in a batch, and what was computed of it while it was shorter. The frequencies of
    the type ``dynamic`` change too, but beyond `context_length`. In Llama 4, longer rows have another temperature of
    attention, by a position that it counts by transformers' own cache.
    """
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    by_layer = [found, *(each for each in found.values() if isinstance(each, dict))]
    limits = [each["original_max_position_embeddings"] for each in by_layer if each.get("rope_type") == "longrope"]
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale - 1)
    return min(limits, default=None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; each of its modules has its own mode again afterwards.

    Layers with 4-bit weights are in training mode meanwhile, which computes the same: in evaluation mode, bitsandbytes
    repacks them for the CPU at the first forward, and they cannot be merged into from then on.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = _is_4bit(module)
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


@contextmanager
def logits_at(model: Any, positions: Tensor) -> Iterator[None]:
    """A context in which a model makes logits only at some tokens of each row.

    The others are left out before the output layer, so that whatever a model does to its logits still happens, and a
    row is still a row.

    Args:
        model: A causal language model of transformers, or PEFT's around one, that is not compiled.
        positions: Of the tokens in their rows, shape (rows, k): the logits' shape is (rows, k, vocabulary).
    """

    def chosen(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.gather(1, positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()


def places(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens stand that are wanted, for `logits_at`.

    Args:
        wanted: Which tokens of each row, bool, shape (rows, tokens).

    Returns:
        Their places, ascending, shape (rows, k), where k is the most that a row has, or one more, so that k is not the
        number of rows; and which of these are of wanted tokens, as a row that has fewer has others behind them.
    """
    k = int(wanted.sum(dim=1).max())
    # By its shape, a layer with a rank for each row tells rows from tokens.
    k += k == len(wanted) and k < wanted.shape[1]
    positions = wanted.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    return positions, wanted.gather(1, positions)
