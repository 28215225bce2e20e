"""`load`: a saved adapter onto its base model, checked before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from matryoshka_lora.adapter.attach import attach
from matryoshka_lora.adapter.fits import check_fits
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.undo import undone_on_error
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import CONFIG_NAME, AdapterConfig
from matryoshka_lora.formats.layout import foreign
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter


def load(
    base_model: nn.Module,
    path: str | PathLike[str],
    rank: int | Mapping[str, int] | None = None,
    adapter: str = "default",
    trainable: bool = False,
    max_rank: int | None = None,
) -> NestedAdapter:
    """Load a nested adapter onto its base model.

    Args:
        base_model: The model that it was trained on, or a `PeftModel` of it that gets one more adapter.
        path: A directory written by `NestedAdapter.save`, or a training checkpoint.
        rank: The rank in eval mode, see `NestedAdapter.set_rank`; None means the largest.
        adapter: The name it gets in PEFT.
        trainable: Whether its weights will be trained on: the model is put into training mode, else into eval mode.
        max_rank: Take only so many directions of a reordered adapter into memory: a larger rank then does not exist.
            Of a file written by ``matryoshka export --format directions``, no more than those are read.

    Raises:
        MatryoshkaError: A file is damaged or incomplete, the adapter does not fit the model, or the rank was not
            trained. The model is unchanged then.
    """
    if not isinstance(base_model, nn.Module):
        raise MatryoshkaError(
            f"load() takes the base model, not {type(base_model).__name__}: load it with transformers first"
        )
    return load_opened(base_model, open_adapter(path, max_rank, trained=trainable), rank, adapter, trainable)


def load_opened(
    base_model: nn.Module,
    opened: OpenedAdapter,
    rank: int | Mapping[str, int] | None = None,
    adapter: str = "default",
    trainable: bool = False,
) -> NestedAdapter:
    """As `load`, of an adapter that is opened already."""
    path = opened.name
    state, config, tensors = opened.nested, _peft_config(opened.config, path), opened.tensors()
    for value in rank.values() if isinstance(rank, Mapping) else () if rank is None else (rank,):
        state.check_rank(value)
    existing = base_model if isinstance(base_model, PeftModel) else None
    _check_name(adapter)
    if existing is not None and adapter in existing.peft_config:
        raise MatryoshkaError(f"the model already has an adapter {adapter!r}: load this one under another name")
    if existing is None and any(isinstance(module, LoraLayer) for module in base_model.modules()):
        raise MatryoshkaError(
            "the model's layers already hold an adapter, though it is no PeftModel: give the PeftModel (the first "
            "adapter's .model) and another adapter name, or load the base model anew"
        )
    config.inference_mode = not trainable
    try:
        with undone_on_error(base_model):
            check_fits(existing.get_base_model() if existing is not None else base_model, config, tensors, path)
            if existing is not None:
                existing.add_adapter(adapter, config)
            model = existing if existing is not None else get_peft_model(base_model, config, adapter_name=adapter)
            tensors = _check_tensors(model, adapter, tensors, path)
            set_peft_model_state_dict(model, tensors, adapter_name=adapter)
            attach(model, state, adapter)
            nested = NestedAdapter(model, adapter)
            if rank is not None:
                nested.set_rank(rank)
    except MatryoshkaError:
        raise
    except Exception as error:  # whatever PEFT says to a config that it cannot build
        raise MatryoshkaError(
            f"{path} could not be loaded: {error} (from its {CONFIG_NAME}). Copy the adapter again, or load the model "
            "that it was trained on"
        ) from error
    model.train(trainable)
    return nested


def _peft_config(config: AdapterConfig, path: str) -> LoraConfig:
    try:
        made: LoraConfig = LoraConfig.from_peft_type(**config.data)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise MatryoshkaError(
            f"PEFT does not take the {CONFIG_NAME} of {path}: {error}. Copy the adapter again, or upgrade PEFT"
        ) from error
    return made


def _check_name(adapter: Any) -> None:
    try:
        nn.ModuleDict({adapter: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise MatryoshkaError(f"{adapter!r} is no adapter name: use letters, digits, - and _") from error


def _check_tensors(model: PeftModel, adapter: str, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors that the adapter in the model wants, no more and no fewer, in their shapes."""
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for key in sorted(expected.keys() - tensors.keys()):
        raise MatryoshkaError(f"{path} lacks tensor {key}: the file is incomplete, copy the adapter again")
    base = model.state_dict()
    for key in sorted(tensors.keys() - expected.keys()):
        # PEFT's own checkpoints carry an embedding that is a target along.
        if not (key.endswith(".base_layer.weight") and key in base and torch.equal(base[key].cpu(), tensors[key])):
            raise foreign(key, path)
    for key, tensor in expected.items():
        if tensor.shape != tensors[key].shape:
            raise MatryoshkaError(
                f"{path} does not fit this model: {key} has shape {list(tensors[key].shape)}, and the model needs "
                f"{list(tensor.shape)}. It was trained on another base model"
            )
    return {key: tensors[key] for key in expected}
