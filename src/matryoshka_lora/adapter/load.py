"""`load`: a saved adapter onto its base model, checked before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn

from matryoshka_lora.adapter.attach import attach
from matryoshka_lora.adapter.fits import check_fits
from matryoshka_lora.adapter.nested import NestedAdapter
from matryoshka_lora.adapter.storage import read_adapter
from matryoshka_lora.errors import MatryoshkaError


def load(
    base_model: nn.Module,
    path: str | PathLike[str],
    rank: int | Mapping[str, int] | None = None,
    adapter: str = "default",
    trainable: bool = False,
) -> NestedAdapter:
    """Load a nested adapter onto its base model.

    Args:
        base_model: The model that it was trained on, or a `PeftModel` of it that gets one more adapter.
        path: A directory written by `NestedAdapter.save`, or a training checkpoint.
        rank: The rank in eval mode, see `NestedAdapter.set_rank`; None means the largest.
        adapter: The name it gets in PEFT.
        trainable: Whether its weights will be trained on; otherwise the model is put into eval mode.

    Raises:
        MatryoshkaError: A file is damaged or incomplete, the adapter does not fit the model, or the rank was not
            trained. The model is unchanged then.
    """
    state, config, tensors = read_adapter(path)
    for value in rank.values() if isinstance(rank, Mapping) else [rank]:
        if value is not None:
            state.check_rank(value)
    existing = base_model if isinstance(base_model, PeftModel) else None
    if existing is not None and adapter in existing.peft_config:
        raise MatryoshkaError(f"the model already has an adapter {adapter!r}: load this one under another name")
    check_fits(existing.get_base_model() if existing is not None else base_model, config, tensors, str(path))

    config.inference_mode = not trainable
    if existing is not None:
        existing.add_adapter(adapter, config)
    model = existing if existing is not None else get_peft_model(base_model, config, adapter_name=adapter)
    try:
        result = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
        unknown = list(result.unexpected_keys)
        missing = [key for key in result.missing_keys if f".{adapter}" in key]
        if unknown or missing:
            raise MatryoshkaError(f"{path} does not fit this model: tensor {(unknown + missing)[0]} has no counterpart")
        attach(model, state, adapter)
        nested = NestedAdapter(model, adapter)
        nested._begin()
        if rank is not None:
            nested.set_rank(rank)
    except (MatryoshkaError, RuntimeError) as error:
        if existing is None:
            model.unload()
        else:
            existing.delete_adapter(adapter)
        raise MatryoshkaError(f"{path} could not be loaded: {error}") from error
    if not trainable:
        model.eval()
    return nested
