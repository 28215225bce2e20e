"""The exchange of a model's attention for a forward pass of `matryoshka_lora.engine.attention`.

transformers hands each layer's queries, keys and values to a function that is registered by name, and lets another one
make the masks. Whether this gives the model's own answers, `matryoshka_lora.engine.agreement` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from matryoshka_lora.engine.attention import Mask, Pass, Settings
from matryoshka_lora.errors import MatryoshkaError

NAME = "matryoshka_rows"

WAY_OUT = "export the ranks and evaluate each with lm_eval's own hf backend"
"""For models that the engine refuses."""

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers that know of other tokens by nothing but keys, values and a mask."""

_PASS: ContextVar[Pass] = ContextVar("matryoshka_pass")


@contextmanager
def attending(row_pass: Pass) -> Iterator[None]:
    """A context in which a model's layers attend through a pass."""
    token = _PASS.set(row_pass)
    try:
        yield
    finally:
        _PASS.reset(token)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    row_pass = _PASS.get(None)
    if row_pass is None:
        raise MatryoshkaError("this attention works only inside the engine; call the model as it was before")
    for name in ("position_bias", "sinks", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise MatryoshkaError(f"its attention takes {name}, which the engine does not know")
    if not isinstance(attention_mask, Mask | None):
        raise MatryoshkaError("its layers make masks of their own")
    settings = Settings(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if attention_mask is None or attention_mask.sees is causal_mask_function else attention_mask,
        softcap=kwargs.get("softcap") or None,
        sinks=kwargs.get("s_aux"),
    )
    return row_pass.attend(query, key, value, settings).transpose(1, 2).contiguous(), None


def _mask(mask_function: Callable[..., Tensor], **_: Any) -> Mask:
    return Mask(mask_function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _implementations(config: Any) -> str | dict[str, Any]:
    """The attention of a config and of those in it, as ``set_attn_implementation`` takes it.

    Parts that have none, for what the model does not use, are left out.
    """
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: _implementations(part) for name, part in parts.items() if part is not None}
    inner = {name: found for name, found in inner.items() if found is not None}
    own: str = config._attn_implementation
    return {"": own, **inner} if inner else own


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model's layers attend through the pass of `attending`.

    Raises:
        MatryoshkaError: The model has layers of another kind, or an attention that cannot be replaced.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds or not getattr(model, "_supports_attention_backend", False):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "an attention that cannot be exchanged"
        raise MatryoshkaError(f"{type(model).__name__} has {what}, so its ranks cannot share a batch: {WAY_OUT}")
    before = _implementations(model.config)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
