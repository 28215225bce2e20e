"""Read the files of an adapter, and check them before anything is done with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_lora.adapter.attach import check_config, trained_besides
from matryoshka_lora.formats.directions import DIRECTIONS_NAME, read_directions, truncate
from matryoshka_lora.formats.sidecar import read_sidecar
from matryoshka_lora.adapter.slicing import check_layer_name, factor_keys, layer_name, shorten_tensors
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.files import one_state

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


# Of the layers whose weights PEFT stores when a vocabulary has grown: its own list, and GPT-2's, NeoX's and Falcon's.
_EMBEDDINGS = {*EMBEDDING_LAYER_NAMES, "wte", "embed_in", "embed_out", "word_embeddings"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_adapter(
    path: str | PathLike[str], max_rank: int | None = None
) -> tuple[NestedState, LoraConfig, dict[str, Tensor]]:
    """Read and check the files of a nested adapter; touches no model.

    Args:
        path: Its directory, with weights in PEFT's format or as `matryoshka_lora.formats.directions`.
        max_rank: Read the first directions of a reordered adapter only, as an adapter of that rank.

    Raises:
        MatryoshkaError: A file is missing, damaged, contradicts another, or holds a number that is not finite.
    """
    with one_state(path):
        return _read_adapter(Path(path), max_rank)


def _read_adapter(folder: Path, max_rank: int | None) -> tuple[NestedState, LoraConfig, dict[str, Tensor]]:
    state = read_sidecar(folder)
    config = read_config(folder)
    try:
        check_config(config, state)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{folder / CONFIG_NAME} does not go with its sidecar: {error}") from error
    whole = config.r
    if max_rank is not None:
        state, config = truncate(state, config, max_rank)
    weights, directions = folder / SAFETENSORS_WEIGHTS_NAME, folder / DIRECTIONS_NAME
    if directions.is_file() and not weights.exists():
        weights, tensors = directions, read_directions(directions, whole, config.r)
    else:
        tensors = _read_weights(weights)
        if config.r < whole:
            _check_rank(tensors, whole, config, f"{weights}")
            tensors = shorten_tensors(tensors, whole, config.r)
    check_finite(tensors, f"{weights}")
    _check_rank(tensors, config.r, config, f"{weights}")
    return state, config, tensors


def _check_rank(tensors: Mapping[str, Tensor], rank: int, config: LoraConfig, where: str) -> None:
    check_factors({key: tensor.shape for key, tensor in tensors.items()}, lambda _: rank, config, where)


def no_weights(folder: Path) -> MatryoshkaError:
    """The error for a folder without weights that can be read."""
    pickled = f" ({WEIGHTS_NAME} is a pickle, which can run code when it is read)" * (folder / WEIGHTS_NAME).exists()
    return MatryoshkaError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}{pickled}: copy or save the adapter again")


def _read_weights(weights: Path) -> dict[str, Tensor]:
    if not weights.is_file():
        raise no_weights(weights.parent)
    try:
        tensors: dict[str, Tensor] = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise MatryoshkaError(f"{weights} is damaged or cut short: {error}. Copy the adapter again") from error
    return tensors


def read_config(folder: Path) -> LoraConfig:
    """Read PEFT's config of a LoRA adapter.

    Raises:
        MatryoshkaError: It is missing, damaged, or of another method.
    """
    try:
        # PEFT would look for a folder without a config on the hub.
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError("there is no such file")
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
        raise MatryoshkaError(
            f"{folder / CONFIG_NAME} is missing or damaged: {error}. Copy the adapter again"
        ) from error
    for field in _OTHER_METHODS:
        if getattr(config, field, None) not in (None, False):
            raise MatryoshkaError(
                f"{folder / CONFIG_NAME}: {field} makes another method of LoRA, which has no nested ranks: leave it out"
            )
    for pattern in _patterns(config):
        if _SLOW.search(pattern) or len(re.findall(r"[*+{]", pattern)) > 4 or len(pattern) > 1000:
            raise MatryoshkaError(
                f"{folder / CONFIG_NAME}: the pattern {pattern[:80]!r} could take for ever to match. Write it without "
                "nested repetitions, or list the names of the layers"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise MatryoshkaError(
                f"{folder / CONFIG_NAME}: {pattern[:80]!r} is no regular expression ({error}). Copy the adapter again"
            ) from error
    return config


# A repetition of a group that repeats something itself.
_SLOW = re.compile(r"[*+}?]\)[*+{]|[*+}][^()]*\)[*+{]")


def _patterns(config: Any) -> Iterator[str]:
    """What PEFT takes as regular expressions."""
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            yield value
    for field in ("rank_pattern", "alpha_pattern"):
        yield from (key for key in getattr(config, field, None) or () if isinstance(key, str))


def check_factors(
    shapes: Mapping[str, Sequence[int]], rank_of: Callable[[str], int], config: LoraConfig, where: str
) -> list[tuple[str, str, str]]:
    """Each layer has both of its factors, both have its rank, and nothing else is called a factor.

    Args:
        shapes: Of all tensors, by key.
        rank_of: The rank of a layer, by its name in the base model.
        config: PEFT's.
        where: What is checked, for the message.

    Returns:
        What `factor_keys` gives.
    """
    again = "The file is damaged or not ours: copy the adapter again"
    found = list(factor_keys(shapes))
    for module, key_A, key_B in found:
        check_layer_name(module, where)
        if key_B not in shapes:
            raise MatryoshkaError(f"{where} lacks tensor {key_B}. {again}")
        shape_A, shape_B, rank = shapes[key_A], shapes[key_B], rank_of(layer_name(module))
        columns = shape_B[1] if len(shape_B) > 1 else 0
        rows = shape_A[0] if len(shape_A) > 1 else 0
        # One expert has R of both; a stack of them has the same multiple of R.
        whole = rows % rank == 0 if config.target_parameters else rows == rank
        if not (whole and rows and columns == rows and all(shape_A) and all(shape_B)):
            raise MatryoshkaError(
                f"{where}: A and B of layer {module} have shapes {list(shape_A)} and {list(shape_B)}, which are not "
                f"of rank {rank}. {again}"
            )
    if not found:
        raise MatryoshkaError(f"{where} holds no factors. {again}")
    others = trained_besides(config)
    factors = {key for _, *keys in found for key in keys}
    for key in sorted(shapes.keys() - factors):
        if ".lora_" in key or not (others or key.endswith(".base_layer.weight")):
            raise foreign(key, where)
    return found


def foreign(key: str, where: str) -> MatryoshkaError:
    """The error for a tensor that is no part of the adapter."""
    if ".lora_" not in key and not _EMBEDDINGS.isdisjoint(key.split(".")):
        return MatryoshkaError(
            f"{where} holds {key}, a whole embedding, which a nested adapter does not carry: PEFT stores it where "
            "tokens were added to the model, or where it is a target and not the base model's. Load this adapter with "
            "PEFT, save it with save_embedding_layers=False, and its base model (unload()) beside it; or train one on "
            "the enlarged model, saved first, with the new tokens in LoraConfig's trainable_token_indices, which are "
            "carried"
        )
    return MatryoshkaError(
        f"{where} holds tensor {key}, which belongs to no part of the adapter. The file is damaged or not ours: copy "
        "the adapter again"
    )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises MatryoshkaError, with ``where`` in it, if a tensor has another dtype than adapters have, or holds NaN."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise MatryoshkaError(
                f"{where}: {key} has dtype {tensor.dtype}; an adapter is written in fp32, bf16 or fp16. Save it again"
            )
        if not tensor.float().isfinite().all():
            raise NotFiniteError(
                f"{where}: {key} holds NaN or infinity, so it would destroy every answer. If training diverged, train "
                "again with a lower learning rate"
            )
