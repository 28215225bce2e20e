"""Write and read the files of a nested adapter: PEFT's own and the sidecar."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora.adapter.attach import check_config
from matryoshka_lora.adapter.sidecar import read_sidecar, write_sidecar
from matryoshka_lora.adapter.slicing import slice_config, slice_tensors
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_directory


def save_adapter(model: PeftModel, adapter: str, state: NestedState, path: str | PathLike[str]) -> None:
    """See `NestedAdapter.save`."""
    rank = state.nesting.max_rank
    tensors = slice_tensors(_state_dict(model, adapter), state, rank)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    folded = state.form == "raw" and state.inference == "keep"
    with replace_directory(path) as folder:
        _write(folder, tensors, config)
        write_sidecar(folder, state, "folded" if folded else state.form)


def export_rank(model: PeftModel, adapter: str, state: NestedState, path: str | PathLike[str], rank: int) -> None:
    """See `NestedAdapter.export`."""
    _export(_state_dict(model, adapter), model.peft_config[adapter], state, path, rank)


def export_adapter(source: str | PathLike[str], path: str | PathLike[str], rank: int) -> None:
    """Write one rank of a saved adapter as an ordinary LoRA adapter. No base model is loaded.

    Args:
        source: A directory written by `NestedAdapter.save`, or a training checkpoint.
        path: The directory to write.
        rank: One of the trained ranks; after `NestedAdapter.reorder` any from 1 to R.

    Raises:
        MatryoshkaError: The source is damaged or not nested, the rank was not trained, or the path cannot be written.
    """
    state, config, tensors = read_adapter(source)
    _export(tensors, config, state, path, rank)


def read_adapter(path: str | PathLike[str]) -> tuple[NestedState, LoraConfig, dict[str, Tensor]]:
    """Read and check the files of a nested adapter; touches no model.

    Raises:
        MatryoshkaError: A file is missing, damaged, contradicts another, or holds a number that is not finite.
    """
    folder = Path(path)
    state = read_sidecar(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MatryoshkaError(
            f"{folder / CONFIG_NAME} is missing or damaged: {error}. Copy the adapter again"
        ) from error
    try:
        check_config(config, state)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{folder / CONFIG_NAME} does not go with its sidecar: {error}") from error
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        pickled = (
            f" ({WEIGHTS_NAME} is a pickle, which can run code when it is read)" * (folder / WEIGHTS_NAME).exists()
        )
        raise MatryoshkaError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}{pickled}: copy or save the adapter again")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise MatryoshkaError(f"{weights} is damaged or cut short: {error}. Copy the adapter again") from error
    _check_finite(tensors, f"{weights}")
    return state, config, tensors


def _state_dict(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    # The base model's embeddings are not part of the adapter, though PEFT would add them when they are a target.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    _check_finite(tensors, f"adapter {adapter!r}")
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MatryoshkaError(
                f"{where}: {key} holds NaN or infinity, so it would destroy every answer. If training diverged, train "
                "again with a lower learning rate"
            )


def _export(tensors: dict[str, Tensor], config: Any, state: NestedState, path: str | PathLike[str], rank: int) -> None:
    state.check_rank(rank)
    sliced = slice_tensors(tensors, state, rank)
    with replace_directory(path) as folder:
        _write(folder, sliced, slice_config(config, state, rank))


def _write(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    # "pt" is what transformers asks of a file before it reads it.
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )
    config.save_pretrained(folder)
