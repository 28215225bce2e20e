"""Write and read the files of a nested adapter: PEFT's own and the sidecar."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from matryoshka_lora.adapter.attach import check_config
from matryoshka_lora.adapter.factors import gathered
from matryoshka_lora.adapter.sidecar import read_sidecar, write_sidecar
from matryoshka_lora.adapter.slicing import factor_keys, slice_config, slice_tensors
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_directory

# PEFT begins to change the base model for some of these before the layers can be looked at.
_OTHER_METHODS = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "megatron_config",
)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save_adapter(
    model: PeftModel, adapter: str, state: NestedState, path: str | PathLike[str], is_main_process: bool | None = None
) -> None:
    """See `NestedAdapter.save`."""
    rank = state.nesting.max_rank
    tensors = slice_tensors(_state_dict(model, adapter), state, rank)
    if not _writes(is_main_process):
        return
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    folded = state.form == "raw" and state.inference == "keep"
    with replace_directory(path) as folder:
        _write(folder, tensors, config)
        write_sidecar(folder, state, "folded" if folded else state.form)


def export_rank(
    model: PeftModel,
    adapter: str,
    state: NestedState,
    path: str | PathLike[str],
    rank: int,
    is_main_process: bool | None = None,
) -> None:
    """See `NestedAdapter.export`."""
    tensors = _state_dict(model, adapter)
    if _writes(is_main_process):
        _export(tensors, model.peft_config[adapter], state, path, rank)


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
    if Path(path).resolve() == Path(source).resolve():
        raise MatryoshkaError(f"{path} is the adapter itself: its other ranks would be lost. Choose another directory")
    _export(tensors, config, state, path, rank)


def read_adapter(path: str | PathLike[str]) -> tuple[NestedState, LoraConfig, dict[str, Tensor]]:
    """Read and check the files of a nested adapter; touches no model.

    Raises:
        MatryoshkaError: A file is missing, damaged, contradicts another, or holds a number that is not finite.
    """
    folder = Path(path)
    state = read_sidecar(folder)
    try:
        # PEFT would look for a folder without a config on the hub.
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError("there is no such file")
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(
            f"{folder / CONFIG_NAME} is missing or damaged: {error}. Copy the adapter again"
        ) from error
    for field in _OTHER_METHODS:
        if getattr(config, field, None) not in (None, False):
            raise MatryoshkaError(
                f"{folder / CONFIG_NAME}: {field} makes another method of LoRA, which has no nested ranks: leave it out"
            )
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
    _check_factors(tensors, config, f"{weights}")
    return state, config, tensors


def _check_factors(tensors: Mapping[str, Tensor], config: LoraConfig, where: str) -> None:
    """Each layer has both of its factors, both have R columns, and nothing else is called a factor."""
    again = "The file is damaged or not ours: copy the adapter again"
    factors = set()
    for module, key_A, key_B in factor_keys(tensors):
        factors |= {key_A, key_B}
        if key_B not in tensors:
            raise MatryoshkaError(f"{where} lacks tensor {key_B}. {again}")
        A, B = tensors[key_A], tensors[key_B]
        columns = B.shape[1] if B.ndim > 1 else 0
        rows = A.shape[0] if A.ndim > 1 else 0
        # One expert has R of both; a stack of them has the same multiple of R.
        whole = rows % config.r == 0 if config.target_parameters else rows == config.r
        if not rows or not whole or columns != rows:
            raise MatryoshkaError(
                f"{where}: A and B of layer {module} have shapes {list(A.shape)} and {list(B.shape)}, which are not "
                f"of rank {config.r}. {again}"
            )
    if not factors:
        raise MatryoshkaError(f"{where} holds no factors. {again}")
    others = config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    for key in sorted(tensors.keys() - factors):
        if ".lora_" in key or not (others or key.endswith(".base_layer.weight")):
            raise MatryoshkaError(f"{where} holds tensor {key}, which belongs to no layer. {again}")


def _state_dict(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    # The base model's embeddings are not part of the adapter, though PEFT would add them when they are a target.
    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: gathered(tensor.detach()) for key, tensor in found.items()}
    _check_finite(tensors, f"adapter {adapter!r}")
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def _writes(is_main_process: bool | None) -> bool:
    if is_main_process is not None:
        return is_main_process
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise MatryoshkaError(
                f"{where}: {key} has dtype {tensor.dtype}; an adapter is written in fp32, bf16 or fp16. Save it again"
            )
        if not tensor.float().isfinite().all():
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
