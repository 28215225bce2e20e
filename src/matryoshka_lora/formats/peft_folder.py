"""LoRA in PEFT's format: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``.

A nested adapter whose low ranks were trained has a small adapter in a subfolder, which PEFT reads
with ``subfolder="small"``.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.formats.hub import CARD_NAME, SMALL_FOLDER, copy_companion_files
from matryoshka_lora.formats.lora_config import RanksAndScales, check_plain_lora
from matryoshka_lora.formats.model_card import copy_license_files, model_card, read_source_card
from matryoshka_lora.formats.safetensors_io import (
    NESTING_KEY,
    lora_file_size,
    open_safetensors,
    pop_error,
    read_json,
    stored_checksum,
    weighted_values_record,
    with_weighted_values,
    write_lora_tensors,
)
from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.lora.convert import part_of_pipeline
from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.lora.layer import Layer, LayerKeys, StoredTensor, are_factors
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import Scores
from matryoshka_lora.lora.save import Written
from matryoshka_lora.lora.truncate import with_small
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.registry import Target

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FOR_LANGUAGE_MODELS = (
    "Evaluation, reordering with examples, training of ranks, serving, and the formats merged, "
    "gguf and mlx are for causal language models."
)

_FACTOR_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
# Valid (order, deploy) pairs.
_ORDERS = (("svd", "reordered"), ("weighted", "reordered"), (None, "paper"))


# Reading


def read(path: PathLike, name: str | None = None) -> Lora:
    """Open a folder that PEFT has saved.

    Nesting metadata and the small adapter are ignored, with a warning, unless the checksum matches.
    Messages have the name, or else the path.
    """
    name = name or str(path)
    lora, nesting, tensors = _read_adapter(Path(path), name)
    return lora if nesting is None else _with_nesting(lora, nesting, tensors)


def _read_adapter(folder: Path, name: str) -> tuple[Lora, str | None, Mapping[str, StoredTensor]]:
    """Return a LoRA without its nesting, the metadata of the nesting, and all tensors by key."""
    weights_file = folder / WEIGHTS_NAME
    if not (folder / CONFIG_NAME).is_file():
        hint = "Pass the folder that PEFT has saved: its config holds the scale."
        loras = [file.parent for file in folder.glob(f"*/{CONFIG_NAME}")]
        loras += folder.glob("*.safetensors")
        if (folder / "config.json").is_file():
            hint = "It is a full model. Extract a LoRA from it first."
        elif loras and not weights_file.exists():
            hint = f"Pass one of the LoRAs in it, such as {min(loras)}."
        raise MatryoshkaError(f"{name} has no {CONFIG_NAME}. {hint}")
    if not weights_file.exists():
        raise MatryoshkaError(
            f"{name} has no {WEIGHTS_NAME}. An adapter_model.bin is a pickle and may execute code. "
            "Save it again as safetensors."
        )
    config = read_json(folder / CONFIG_NAME)
    tensors, metadata = open_safetensors(weights_file)
    nesting = metadata.pop(NESTING_KEY, None)
    original_error = pop_error(metadata)
    layers, other_tensors = find_layers(tensors, config, name)
    lora = Lora(
        name,
        layers,
        other_tensors,
        metadata,
        config=config,
        files=(weights_file,),
        original_error=original_error,
    )
    return lora, nesting, tensors


def find_layers(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], name: str
) -> tuple[tuple[Layer, ...], dict[str, StoredTensor]]:
    """Return the layers of an adapter, sorted by name, and the tensors that are not factors.

    Args:
        tensors: The tensors of the file by key, or PEFT's state dict of the adapter.
        config: PEFT's LoraConfig as a dictionary.
        name: The adapter's name in messages.
    """
    check_plain_lora(config, name)
    ranks_and_scales = RanksAndScales(config, name)
    layers: list[Layer] = []
    other_tensors = {key: tensors[key] for key in sorted(tensors)}
    for key_A, A in tensors.items():
        for suffix_A, suffix_B in _FACTOR_SUFFIXES:
            if not key_A.endswith(suffix_A):
                continue
            module = key_A.removesuffix(suffix_A)
            key_B = module + suffix_B
            layer_name = module.removeprefix(PEFT_PREFIX)
            rank, scale = ranks_and_scales.of(layer_name)
            if key_B not in tensors:
                raise MatryoshkaError(
                    f"{name} lacks the tensor {short(key_B)}. Save the adapter again."
                )
            B = tensors[key_B]
            # The parameters of n experts are one factor of n * rank rows.
            has_experts = bool(config.get("target_parameters"))
            num_experts = A.shape[0] // rank if has_experts and A.shape else 1
            if not are_factors(A, B) or A.shape[0] != num_experts * rank:
                raise MatryoshkaError(
                    f"{name}: the factors of {short(layer_name)} do not fit each other, or do not "
                    f"have rank {rank}, as the config says. Save the adapter again."
                )
            keys = LayerKeys(key_A, key_B)
            layers.append(Layer.from_tensors(layer_name, A, B, scale, keys, num_experts, name))
            del other_tensors[key_A], other_tensors[key_B]
    for key in other_tensors:
        if ".lora_" in key:
            raise MatryoshkaError(
                f"{name}: the tensor {short(key)} is unknown, or its matching A or B is missing. "
                "Copy the adapter or save it again."
            )
    if not layers:
        raise MatryoshkaError(f"{name} has no LoRA factors. Copy the adapter or save it again.")
    layers.sort(key=lambda layer: layer.name)
    return tuple(layers), other_tensors


def _with_nesting(lora: Lora, record: str, tensors: Mapping[str, StoredTensor]) -> Lora:
    """Return a LoRA with the nesting of its metadata, if that still describes its factors."""
    first = lora.layers[0]
    try:
        saved = json.loads(record)
        nesting = Nesting(tuple(saved["ranks"]), saved["scaling"], first.scale)
        order, deploy, checksum = saved["order"], saved["deploy"], saved["checksum"]
        small_rank = saved.get("small_rank", 0)
        if (order, deploy) not in _ORDERS:
            raise ValueError
        layers = lora.layers
        if order == "weighted":
            values = saved["weighted_values"]
            layers = tuple(with_weighted_values(layer, values) for layer in layers)
        scores = tuple(map(_read_scores, saved.get("scores", ())))
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        is_unchanged = False
    else:
        expected = (nesting.max_rank, nesting.scale)
        is_unchanged = stored_checksum(lora.layers, tensors) == checksum and all(
            (layer.rank, layer.scale) == expected for layer in lora.layers
        )
    if not is_unchanged:
        warnings.warn(
            f"{lora.name}: the factors have changed since their nesting was recorded, or the "
            "record is damaged, so it is read as plain LoRA. Ranks that were trained are lost.",
            stacklevel=4,
        )
        return lora
    lora = replace(lora, layers=layers, nesting=nesting, order=order, deploy=deploy, scores=scores)
    if small_rank == 0:
        return lora
    folder = lora.files[0].parent / SMALL_FOLDER
    name = f"{lora.name}/{SMALL_FOLDER}"
    if not folder.is_dir():
        raise MatryoshkaError(f"{name} is missing. Copy the whole folder again.")
    small, _, _ = _read_adapter(folder, name)
    if small.ranks != dict.fromkeys(lora.ranks, small_rank):
        raise MatryoshkaError(f"{name} is from another adapter. Copy the whole folder again.")
    return with_small(lora, small)


def _read_scores(saved: Mapping[str, Any]) -> Scores:
    errors = saved["standard_errors"].items()
    return Scores(
        str(saved["task"]),
        str(saved["metric"]),
        int(saved["num_questions"]),
        str(saved["dtype"]),
        {int(rank): float(value) for rank, value in saved["values"].items()},
        {int(rank): None if error is None else float(error) for rank, error in errors},
    )


def base_model_of(
    lora: Lora, base_model: str | None = None, base_revision: str | None = None
) -> tuple[str, str | None]:
    """Return the base model of a LoRA and its revision, which is None for the default, ``main``.

    Args:
        lora: The LoRA, of a PEFT folder.
        base_model: A folder or Hub id. Defaults to the one that the config names.
        base_revision: Its revision on the Hub. Defaults to the one that the config names, if
            ``base_model`` is None too.

    Raises:
        MatryoshkaError: The config names no base model, or one that is not a causal LM.
    """
    if part_of_pipeline(lora):
        raise MatryoshkaError(
            f"{lora.name} is for an image model. {FOR_LANGUAGE_MODELS} preview() draws "
            "pictures at several ranks."
        )
    name = base_model or lora.config.get("base_model_name_or_path")
    if not name:
        raise MatryoshkaError(f"{lora.name} does not name its base model. Pass `base_model`.")
    task_type = lora.config.get("task_type") or "CAUSAL_LM"
    if task_type != "CAUSAL_LM":
        raise MatryoshkaError(
            f"{lora.name} has task_type={short(task_type)}, but base models are loaded as "
            "CAUSAL_LM. Use an operation that needs no base model, such as reorder, or export "
            "as a PEFT folder."
        )
    if base_revision is None and base_model is None:
        base_revision = lora.config.get("revision")
    return str(name), None if base_revision == "main" else base_revision


# Writing


def write(lora: Lora, folder: Path, target: Target) -> Written:
    """Write a LoRA, with a model card and the companion files of its source.

    PEFT reads a nested adapter as an ordinary one of its largest rank. Its small adapter is written
    to a subfolder.

    Raises:
        MatryoshkaError: Layers of experts have different ranks.
    """
    lora = _prepare(lora)
    written = _write_adapter(lora, folder)
    if lora.nesting is not None and lora.small is not None:
        (folder / SMALL_FOLDER).mkdir()
        small = _write_adapter(_prepare(lora.small), folder / SMALL_FOLDER)
        written = written.with_small(small)
    # The files in a folder that is not PEFT's may belong to anything.
    source_folders = [file.parent for file in lora.files if (file.parent / CONFIG_NAME).is_file()]
    cards = [read_source_card(source) for source in source_folders]
    errors: dict[int, float] = {}
    if lora.nesting is not None:
        written = replace(written, error_ranks=lora.nesting.ranks)
        errors = written.relative_errors(lora.nesting.ranks)
    card = model_card(lora, _output_config(lora), errors, written.original_error(lora), cards)
    # A path that is not UTF-8 has lone surrogates, which UTF-8 cannot represent.
    (folder / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
    if source_folders:
        copy_companion_files(source_folders[0], folder)
    copy_license_files(source_folders, folder)
    return written


def _write_adapter(lora: Lora, folder: Path) -> Written:
    """Write the config and the weights."""
    config_text = json.dumps(_output_config(lora), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(config_text, encoding="utf-8")
    return write_lora_tensors(lora, folder / WEIGHTS_NAME)


def file_size(lora: Lora) -> int:
    """Return the size in bytes of the weights file that `write` writes."""
    return lora_file_size(_prepare(lora))


def _prepare(lora: Lora) -> Lora:
    """Return a LoRA whose layers have one scale, with the metadata of its weights file."""
    if len(set(lora.ranks.values())) > 1 and any(layer.num_experts > 1 for layer in lora.layers):
        raise MatryoshkaError(
            f"{lora.name}: target_parameters requires one rank for all layers. Pass `rank` alone."
        )
    scale = lora.layers[0].scale
    if lora.nesting is not None:
        scale = lora.nesting.scale
    elif any(layer.has_new_factors for layer in lora.layers):
        scale = lora.new_scale
    metadata = {"format": "pt"}
    if lora.nesting is not None:
        nesting: dict[str, Any] = {
            "ranks": lora.nesting.ranks,
            "scaling": lora.nesting.scaling,
            "order": lora.order,
            "deploy": lora.deploy,
            "small_rank": lora.small_rank,
            # A placeholder of equal length, which is replaced once the factors are written.
            "checksum": Checksum().hexdigest(),
        }
        if lora.scores:  # the card of an exported rank shows them
            nesting["scores"] = [asdict(scores) for scores in lora.scores]
        if lora.order == "weighted":
            nesting["weighted_values"] = weighted_values_record(lora)
        metadata[NESTING_KEY] = json.dumps(nesting)
    layers = tuple(layer.with_scale(scale) for layer in lora.layers)
    return replace(lora, layers=layers, metadata=metadata)


def _output_config(lora: Lora) -> dict[str, Any]:
    max_rank = lora.max_rank
    scale = lora.layers[0].scale
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for name, rank in lora.ranks.items():
        if rank != max_rank:
            # PEFT matches patterns at the end of names: `fc` would match `sub.fc` too.
            pattern = f"^{re.escape(name)}"
            rank_pattern[pattern] = rank
            alpha_pattern[pattern] = scale * rank
    return {
        **lora.config,
        "r": max_rank,
        "lora_alpha": scale * max_rank,
        # Some runtimes ignore use_rslora, so lora_alpha has the scale.
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "init_lora_weights": True,
        "inference_mode": True,
    }
