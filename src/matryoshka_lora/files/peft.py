"""PEFT's folders: open an adapter, and write a nested one or a rank that plain PEFT reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.factors import checksum
from matryoshka_lora.files.card import write_card
from matryoshka_lora.files.layers import (
    NOTE,
    AdapterFile,
    Layer,
    Lost,
    Plan,
    by_pattern,
    scale_of,
)
from matryoshka_lora.files.output import PathLike, new_folder
from matryoshka_lora.files.single import open_single
from matryoshka_lora.files.tensors import FLOATS, Stored, open_tensors, read_json
from matryoshka_lora.nesting import Nesting

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

Ranks = int | Mapping[str, int]
"""One rank for all layers, or one for each by its name."""

_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# What is stored as factors and computes something else than s B A.
_OTHER_METHODS = (
    *("use_dora", "use_bdlora", "use_qalora", "kasa_config", "velora_config", "monteclora_config"),
    *("arrow_config", "alora_invocation_tokens", "lora_bias"),
)
_INITS = ("pissa", "corda", "olora", "lora_ga", "loftq")


def open_adapter(path: PathLike) -> AdapterFile:
    """Open a LoRA adapter: PEFT's folder, also sharded, or a single ``.safetensors`` file.

    Raises:
        MatryoshkaError: It is none, it is damaged, or it is of a kind that has no ranks to choose.
    """
    folder = Path(path)
    if not folder.is_dir():
        return open_single(folder)
    config = _read_config(folder)
    stored, metadata = dict[str, Stored](), dict[str, str]()
    files = _weight_files(folder)
    for file in files:
        tensors, own = open_tensors(file)
        stored |= tensors
        metadata |= own
    layers = _find_layers(stored, config, str(path))
    return _with_nesting(AdapterFile(str(path), layers, stored, config, metadata, files=files))


def from_tensors(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    nesting: Nesting,
    order: str | None,
    rule: str,
) -> AdapterFile:
    """Return an adapter in memory as if it had been opened.

    Args:
        name: For messages.
        config: PEFT's, as ``LoraConfig.to_dict()`` gives it.
        tensors: PEFT's state dict, as ``get_peft_model_state_dict`` gives it.
        nesting: Its ranks and scales.
        order: How its factors were reordered; None where they were not.
        rule: The rule it was trained with.
    """
    stored = {key: Stored.of(tensor) for key, tensor in tensors.items()}
    plain = json.loads(json.dumps(dict(config), default=_plain))
    layers = _find_layers(stored, plain, name)
    return AdapterFile(name, layers, stored, plain, {}, nesting, order, rule)


def _plain(value: Any) -> Any:
    """Return what JSON has for a set or an enum of PEFT's config."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def write_nested(
    adapter: AdapterFile,
    path: PathLike,
    force: bool = False,
    on_layer: Callable[[], object] | None = None,
) -> Lost:
    """Write a nested adapter that plain PEFT reads as the one of its largest rank.

    Factors without an order are reordered by SVD. Ranks that differ by layer are filled up.

    Args:
        adapter: Any LoRA adapter; one that is not nested gets the ranks 1, 2, 4, ... R.
        path: The folder to write.
        force: Whether the folder that is there is replaced.
        on_layer: Called after each layer.
    """
    nesting = adapter.nesting or Nesting.powers_of_two(adapter.max_rank)
    note = {
        "ranks": nesting.ranks,
        "scaling": nesting.scaling,
        "order": adapter.order or "svd",
        "rule": adapter.rule,
        "checksum": checksum(()),
    }
    with new_folder(path, force, adapter.source) as folder:
        plan = plan_rank(adapter, nesting.max_rank, {NOTE: json.dumps(note)})
        lost = plan.write(folder / WEIGHTS_NAME, on_layer)
        config = _config_at(plan)
        _write_config(folder, config)
        errors = {rank: lost.error(rank) for rank in nesting.ranks}
        write_card(folder, config, adapter.order or "svd", errors)
    return lost


def write_rank(
    adapter: AdapterFile,
    path: PathLike,
    rank: Ranks,
    force: bool = False,
    on_layer: Callable[[], object] | None = None,
) -> Lost:
    """Write an ordinary PEFT adapter of one rank, or of a rank for each layer.

    Args:
        adapter: Any LoRA adapter.
        path: The folder to write.
        rank: The rank, or ranks by the layers' names.
        force: Whether the folder that is there is replaced.
        on_layer: Called after each layer.

    Raises:
        MatryoshkaError: There is no such rank, or the layers cannot have ranks of their own.
    """
    with new_folder(path, force, adapter.source) as folder:
        plan = plan_rank(adapter, rank)
        lost = plan.write(folder / WEIGHTS_NAME, on_layer)
        config = _config_at(plan)
        _write_config(folder, config)
        write_card(folder, config)
    return lost


def plan_rank(adapter: AdapterFile, rank: Ranks, metadata: Mapping[str, str] | None = None) -> Plan:
    """Return the weights of `write_rank` before they are computed; see there."""
    own = {layer.name: rank for layer in adapter.layers} if isinstance(rank, int) else rank
    for each in set(own.values()):
        adapter.check_rank(each)
    one = adapter.order == "paper" or any(layer.experts > 1 for layer in adapter.layers)
    if one and len(set(own.values())) > 1:
        raise MatryoshkaError(
            f"{adapter.name} has one rank for all layers, as the paper's deployment and PEFT's "
            "target_parameters do: give --rank"
        )
    top = max(own.values())
    scale = adapter.nesting.scale if adapter.nesting else 1.0
    if adapter.order is not None:
        scale = adapter.scale_at(adapter.layers[0], top)
    layers = tuple((layer, layer.at(own[layer.name], scale)) for layer in adapter.layers)
    others = {key: adapter.stored[key] for key in adapter.others}
    return Plan(adapter, layers, others, {"format": "pt", **(metadata or {})})


def check_factors(adapter: AdapterFile, reader: str) -> None:
    """Raise MatryoshkaError if an adapter holds more than pairs of linear layers."""
    strange = list(adapter.others)
    strange += [x.key_A for x in adapter.layers if x.experts > 1 or len(x.shape_A) > 2]
    strange += [x.key_A for x in adapter.layers if not x.key_A.endswith(_SUFFIXES[0][0])]
    if strange:
        raise MatryoshkaError(
            f"{adapter.name} holds {strange[0]}, which {reader} cannot read: use --format merged"
        )


def _config_at(plan: Plan) -> dict[str, Any]:
    """Return PEFT's config of the weights of a plan.

    ``use_rslora`` is off because some readers ignore it: the scale is in ``lora_alpha``.
    """
    rank, scale = plan.rank, plan.layers[0][1].scale
    # PEFT takes names as regular expressions for their ends: `fc` would stand for `sub.fc` too.
    own = {f"^{re.escape(new.name)}": new.rank for _, new in plan.layers if new.rank != rank}
    return {
        **plan.adapter.config,
        "r": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,
        "rank_pattern": own,
        "alpha_pattern": {name: scale * r for name, r in own.items()},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG_NAME).write_text(
        json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        single = next(iter(sorted(folder.glob("*.safetensors"))), None)
        if (folder / "config.json").exists():
            hint = "it is a whole model"
        elif single and single.name != WEIGHTS_NAME:
            hint = f"if its files are LoRAs of their own, name one, such as {single}"
        else:
            hint = "give a folder that PEFT has saved, with this file, since the scale stands in it"
        raise MatryoshkaError(f"{folder} holds no {CONFIG_NAME}: {hint}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise MatryoshkaError(f"{file} is of type {config.get('peft_type')!r:.80} and not LoRA")
    return config


def _check_config(config: dict[str, Any], where: str) -> None:
    """Refuse a damaged config, and what is stored as factors and computes something else."""
    numbers = [config.get("r", 8), config.get("lora_alpha", 8)]
    for name in ("rank_pattern", "alpha_pattern"):
        given = config.get(name) or {}
        numbers += given.values() if isinstance(given, dict) else [None]
    if not all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers):
        raise MatryoshkaError(f"{where}: a rank or an alpha of {CONFIG_NAME} is no positive number")
    init = str(config.get("init_lora_weights"))
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    reason = next((name for name in _OTHER_METHODS if config.get(name)), "")
    if reason:
        reason = f"{reason} adds to its layers what belongs to no rank: use it whole"
    elif init.startswith(_INITS):
        reason = (
            f"init_lora_weights={init!r:.80} lets PEFT change the base model: save it first with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    elif config.get("target_parameters") and patterns:
        reason = (
            "its target_parameters have ranks by layer, as PEFT makes of 'all-linear' for routed "
            "experts: train again, and name all layers"
        )
    if reason:
        raise MatryoshkaError(f"{where} has no lower ranks: {reason}")


def _weight_files(folder: Path) -> tuple[Path, ...]:
    whole, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if whole.exists():
        return (whole,)
    if (folder / "adapter_model.bin").exists():
        raise MatryoshkaError(
            f"{folder} holds a pickle, which may run code: save it again with PEFT"
        )
    if not index.exists():
        return (whole,)  # whose absence is said when it is opened
    shards = read_json(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise MatryoshkaError(f"{index} is damaged: it names no files beside it. Copy it again")
    return tuple(folder / name for name in names)


def _find_layers(
    stored: Mapping[str, Stored], config: dict[str, Any], where: str
) -> tuple[Layer, ...]:
    _check_config(config, where)
    found, factors = [], set[str]()
    for key in stored:
        for suffix_A, suffix_B in _SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                found.append(_layer(module, key, module + suffix_B, stored, config, where))
                factors |= {key, module + suffix_B}
    strange = next((key for key in sorted(stored.keys() - factors) if ".lora_" in key), None)
    if strange or not found:
        what = f"{strange[:200]!r}, which is no factor" if strange else "no factors"
        raise MatryoshkaError(f"{where} holds {what}: copy or save the adapter again")
    return tuple(sorted(found, key=lambda layer: layer.name))


def _layer(
    module: str,
    key_A: str,
    key_B: str,
    stored: Mapping[str, Stored],
    config: dict[str, Any],
    where: str,
) -> Layer:
    name = module.removeprefix("base_model.model.")
    rank = by_pattern(config, "rank_pattern", name, config.get("r", 8))
    A, B = stored[key_A], stored.get(key_B, stored[key_A])
    rows = A.shape[0] if A.shape else 0
    whole = rows % rank == 0 if config.get("target_parameters") else rows == rank
    fits = key_B in stored and len(A.shape) > 1 < len(B.shape) and B.shape[1] == rows
    if not (whole and fits and 0 not in A.shape + B.shape and {A.dtype, B.dtype} <= FLOATS.keys()):
        raise MatryoshkaError(
            f"{where}: the factors of {module[:200]} are {A.dtype} {list(A.shape)} and {B.dtype} "
            f"{list(B.shape)}, which is no LoRA of rank {rank} in fp32, bf16 or fp16: copy it again"
        )
    scale = scale_of(config, name, rank)
    return Layer(name, key_A, key_B, A.shape, B.shape, rank, scale, rows // rank)


def _with_nesting(adapter: AdapterFile) -> AdapterFile:
    """Return an adapter with the nesting in its metadata, if that was written for its factors.

    Whoever else writes the weights drops the nesting or changes the factors: it is plain LoRA then.
    """
    first = adapter.layers[0]
    try:
        note = json.loads(adapter.metadata[NOTE])
        nesting = Nesting(tuple(note["ranks"]), note["scaling"], first.scale)
        order, rule, wanted = note["order"], str(note["rule"]), note["checksum"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return adapter
    if any((x.rank, x.scale) != (nesting.max_rank, first.scale) for x in adapter.layers):
        return adapter
    stored = adapter.stored
    found = checksum((stored[x.key_A].read(), stored[x.key_B].read()) for x in adapter.layers)
    if found != wanted or order not in ("svd", "learned", "trained", "paper"):
        return adapter
    return replace(adapter, nesting=nesting, order=order, rule=rule)
