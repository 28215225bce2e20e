"""Write the files of a nested adapter: PEFT's own, the sidecar and the card."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, distributed

from matryoshka_lora.formats.card import has_own_card, write_card
from matryoshka_lora.adapter.factors import gathered
from matryoshka_lora.adapter.reading import check_finite, read_adapter
from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.adapter.slicing import (
    Ranks,
    slice_config,
    slice_tensors,
)
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import output_directory, replace_directory


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
        write_adapter(folder, tensors, config)
        write_sidecar(folder, state, "folded" if folded else state.form)
        write_card(folder, config, replace(state, form="folded") if folded else state, Path(path))


def export_rank(
    model: PeftModel,
    adapter: str,
    state: NestedState,
    path: str | PathLike[str],
    rank: int,
    is_main_process: bool | None = None,
    overwrite: bool = False,
) -> None:
    """See `NestedAdapter.export`."""
    state.check_rank(rank)
    tensors = _state_dict(model, adapter)
    if _writes(is_main_process):
        with output_directory(path, overwrite) as folder:
            write_slice(folder, tensors, model.peft_config[adapter], state, rank, home=Path(path))


def export_adapter(
    source: str | PathLike[str], path: str | PathLike[str], rank: int, *, overwrite: bool = False
) -> None:
    """Write one rank of a saved adapter as an ordinary LoRA adapter. No base model is loaded.

    Args:
        source: A directory written by `NestedAdapter.save`, or a training checkpoint.
        path: The directory to write.
        rank: One of the trained ranks; after `NestedAdapter.reorder` any from 1 to R.
        overwrite: Whether the directory may hold an adapter, a model or an evaluation, of which nothing is left then.

    Raises:
        MatryoshkaError: The source is damaged or not nested, the rank was not trained, or the path cannot be written
            or holds something that may not be overwritten.
    """
    state, config, tensors = read_adapter(source)
    check_apart(source, path)
    state.check_rank(rank)
    with output_directory(path, overwrite) as folder:
        write_slice(folder, tensors, config, state, rank, home=Path(path))


def check_apart(source: str | PathLike[str], path: str | PathLike[str]) -> None:
    """Raises MatryoshkaError if writing to ``path`` would replace the adapter that is read."""
    target, read = Path(path).resolve(), Path(source).resolve()
    if target == read or (target == read.parent and read.name.startswith("rank-")):
        what = "is" if target == read else "holds"
        raise MatryoshkaError(f"{path} {what} the adapter itself, which would be lost: choose another directory")


def write_slice(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    state: NestedState,
    rank: Ranks,
    pad: bool = False,
    home: Path | None = None,
) -> None:
    """Write a prefix as an ordinary adapter into a folder, with its card: see `slice_tensors`.

    Args:
        folder: Where to write.
        tensors: Of the whole adapter.
        config: Of the whole adapter.
        state: Of the whole adapter.
        rank: One, or one for each layer.
        pad: Give all layers the largest of the ranks.
        home: Where the folder will be: a card that somebody has written there stays.
    """
    new = slice_config(config, state, rank, pad)
    write_adapter(folder, slice_tensors(tensors, state, rank, pad), new)
    if home is None or not has_own_card(home):
        write_card(folder, new, None)


def _state_dict(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    # The base model's embeddings are not part of the adapter, though PEFT would add them when they are a target.
    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: gathered(tensor.detach()) for key, tensor in found.items()}
    check_finite(tensors, f"adapter {adapter!r}")
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def _writes(is_main_process: bool | None) -> bool:
    if is_main_process is not None:
        return is_main_process
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write PEFT's two files of an adapter into a folder."""
    # "pt" is what transformers asks of a file before it reads it.
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )
    write_config(folder, config)


def write_config(folder: Path, config: LoraConfig) -> None:
    """Write PEFT's config into a folder: equal ones are equal bytes, though sets have another order each time."""
    ordered = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(ordered, name, sorted(value))
    ordered.save_pretrained(folder)
