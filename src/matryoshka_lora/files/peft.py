"""PEFT's folders: open an adapter, and write a nested one or a rank that plain PEFT reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
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
    OnLayer,
    Plan,
    one_thread,
    rank_and_scale,
)
from matryoshka_lora.files.output import PathLike, new_folder
from matryoshka_lora.files.single import open_single
from matryoshka_lora.files.tensors import Stored, open_tensors, read_json
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

    A nesting that was not written for the factors that are there is left out: whoever else writes
    weights drops the nesting or changes the factors, and the adapter is plain LoRA then.

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
    adapter = AdapterFile(str(path), layers, stored, config, metadata, files=files)
    first = layers[0]
    try:
        note = json.loads(metadata[NOTE])
        nesting = Nesting(tuple(note["ranks"]), note["scaling"], first.scale)
        order, rule, wanted = note["order"], str(note["rule"]), note["checksum"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return adapter
    with one_thread():
        found = checksum((stored[x.key_A].read(), stored[x.key_B].read()) for x in layers)
    alike = all((x.rank, x.scale) == (nesting.max_rank, first.scale) for x in layers)
    if found != wanted or not alike:
        return adapter
    return replace(adapter, nesting=nesting, order=order, rule=rule)


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
    adapter: AdapterFile, path: PathLike, force: bool = False, on_layer: OnLayer = None
) -> Lost:
    """Write a nested adapter that plain PEFT reads as the one of its largest rank.

    Factors without an order are reordered by SVD. Ranks that differ by layer are filled up. An
    adapter that is not nested gets the ranks 1, 2, 4, ... R.

    Args:
        adapter: Any LoRA adapter.
        path: The folder to write.
        force: Whether the folder that is there is replaced.
        on_layer: Called after each layer.
    """
    nesting = adapter.nesting or Nesting.powers_of_two(adapter.max_rank)
    order = adapter.order or "svd"
    note = {"ranks": nesting.ranks, "scaling": nesting.scaling, "order": order}
    note |= {"rule": adapter.rule, "checksum": checksum(())}
    plan = plan_rank(adapter, nesting.max_rank, {NOTE: json.dumps(note)})
    with new_folder(path, force, adapter.source) as folder:
        lost = _put(folder, plan, on_layer)
        errors = {rank: lost.error(rank) for rank in nesting.ranks}
        write_card(folder, _config_of(plan), order, errors)
    return lost


def write_rank(
    adapter: AdapterFile, path: PathLike, rank: Ranks, force: bool = False, on_layer: OnLayer = None
) -> Lost:
    """Write an ordinary PEFT adapter of one rank, or of a rank for each layer.

    Args and Raises: as `write_nested`, and a MatryoshkaError where there is no such rank or the
    layers cannot have ranks of their own.
    """
    plan = plan_rank(adapter, rank)
    with new_folder(path, force, adapter.source) as folder:
        lost = _put(folder, plan, on_layer)
        write_card(folder, _config_of(plan))
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
    scale = adapter.nesting.scale if adapter.nesting else 1.0
    if adapter.order is not None:
        scale = adapter.scale_at(adapter.layers[0], max(own.values()))
    layers = tuple((layer, layer.at(own[layer.name], scale)) for layer in adapter.layers)
    others = {key: adapter.stored[key] for key in adapter.others}
    return Plan(adapter, layers, others, {"format": "pt", **(metadata or {})})


def check_factors(adapter: AdapterFile, reader: str) -> None:
    """Raise MatryoshkaError if an adapter holds more than pairs of linear layers."""
    strange = [*adapter.others]
    for x in adapter.layers:
        if x.experts > 1 or len(x.shape_A) > 2 or not x.key_A.endswith(".lora_A.weight"):
            strange.append(x.key_A)
    if strange:
        raise MatryoshkaError(
            f"{adapter.name} holds {strange[0]}, which {reader} cannot read: use --format merged"
        )


def _put(folder: Path, plan: Plan, on_layer: OnLayer) -> Lost:
    text = json.dumps(_config_of(plan), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return plan.write(folder / WEIGHTS_NAME, on_layer)


def _config_of(plan: Plan) -> dict[str, Any]:
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


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        single = next(iter(sorted(folder.glob("*.safetensors"))), None)
        hint = "give a folder that PEFT has saved, with this file, since the scale stands in it"
        if (folder / "config.json").exists():
            hint = "it is a whole model"
        elif single and single.name != WEIGHTS_NAME:
            hint = f"if its files are LoRAs of their own, name one, such as {single}"
        raise MatryoshkaError(f"{folder} holds no {CONFIG_NAME}: {hint}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise MatryoshkaError(f"{file} is of type {config.get('peft_type')!r:.80} and not LoRA")
    return config


def _check_config(config: dict[str, Any], where: str) -> None:
    """Refuse a damaged config, and what is stored as factors and computes something else."""
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    numbers = [config.get("r", 8), config.get("lora_alpha", 8)]
    for given in patterns:
        numbers += given.values() if isinstance(given, dict) else [None]
    if not all(isinstance(x, int | float) and 0 < x < math.inf for x in numbers):
        raise MatryoshkaError(f"{where}: a rank or an alpha of {CONFIG_NAME} is no positive number")
    method = next((name for name in _OTHER_METHODS if config.get(name)), "")
    init, reason = str(config.get("init_lora_weights")), ""
    if method:
        reason = f"{method} adds to its layers what belongs to no rank: use it whole"
    elif init.startswith(_INITS):
        reason = (
            f"init_lora_weights={init!r:.80} lets PEFT change the base model: save it first with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    elif config.get("target_parameters") and any(patterns):
        reason = (
            "its target_parameters have ranks by layer, as PEFT makes of 'all-linear' for routed "
            "experts: train again, and name all layers"
        )
    if reason:
        raise MatryoshkaError(f"{where} has no lower ranks: {reason}")


def _weight_files(folder: Path) -> tuple[Path, ...]:
    whole, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if not whole.exists() and (folder / "adapter_model.bin").exists():
        raise MatryoshkaError(
            f"{folder} holds a pickle, which may run code: save it again with PEFT"
        )
    if whole.exists() or not index.exists():
        return (whole,)  # if it is absent, opening it says so
    shards = read_json(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise MatryoshkaError(f"{index} is damaged: it names no files beside it. Copy it again")
    return tuple(folder / name for name in names)


def _find_layers(
    stored: Mapping[str, Stored], config: dict[str, Any], where: str
) -> tuple[Layer, ...]:
    _check_config(config, where)
    found = list[Layer]()
    for key, A in stored.items():
        for suffix_A, suffix_B in _SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                name, key_B = module.removeprefix("base_model.model."), module + suffix_B
                rank, scale = rank_and_scale(config, name)
                B = stored.get(key_B, A)
                rows = A.shape[0] if A.shape else 0
                # Parameters with experts have R rows for each of them.
                whole = rows % rank == 0 if config.get("target_parameters") else rows == rank
                if not (
                    whole and A.is_factor and B.is_factor and B.shape[1] == rows and B is not A
                ):
                    raise MatryoshkaError(
                        f"{where}: the factors of {name[:200]} are {A.dtype} {list(A.shape)} and "
                        f"{B.dtype} {list(B.shape)}, no LoRA of rank {rank}: copy or save it again"
                    )
                experts = rows // rank
                found.append(Layer(name, key, key_B, A.shape, B.shape, rank, scale, experts))
    factors = {key for layer in found for key in (layer.key_A, layer.key_B)}
    strange = next((key for key in sorted(stored.keys() - factors) if ".lora_" in key), None)
    if strange or not found:
        what = f"{strange[:200]!r}, which is no factor" if strange else "no factors"
        raise MatryoshkaError(f"{where} holds {what}: copy or save the adapter again")
    return tuple(sorted(found, key=lambda layer: layer.name))
