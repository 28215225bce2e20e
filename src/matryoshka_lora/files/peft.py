"""PEFT's folders: open an adapter, and write a nested one or a rank that plain PEFT reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.factors import checksum
from matryoshka_lora.files.hub import BESIDE, local
from matryoshka_lora.files.layers import NOTE, AdapterFile, Layer, Plan, one_thread, rank_and_scale
from matryoshka_lora.files.output import PathLike, new_file, new_folder
from matryoshka_lora.files.single import open_single, plan_single
from matryoshka_lora.files.tensors import Stored, open_tensors, read_json
from matryoshka_lora.nesting import Nesting

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

Ranks = int | Mapping[str, int]
"""One rank for all layers, or one for each by its name."""

_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# LoRA variants whose files hold factors, but whose update is not s B A.
_OTHER_METHODS = (
    *("use_dora", "use_bdlora", "use_qalora", "kasa_config", "velora_config", "monteclora_config"),
    *("arrow_config", "alora_invocation_tokens", "lora_bias"),
)
_INITS = ("pissa", "corda", "olora", "lora_ga", "loftq")
_US = "[matryoshka-lora](https://arxiv.org/abs/2605.07850)"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The hub id of the base model that is embedded in a package.
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def open_adapter(path: PathLike) -> AdapterFile:
    """Open a LoRA adapter: PEFT's folder, a single ``.safetensors`` file, or either on the hub, see
    `matryoshka_lora.files.hub.local`.

    The nesting counts only if its checksum matches the factors; else the adapter is plain LoRA.

    Raises:
        MatryoshkaError: The path is no LoRA adapter, is damaged, or is a variant without ranks.
    """
    folder = local(path)
    if not folder.is_dir():
        return open_single(folder)
    if not (folder / CONFIG_NAME).is_file():
        configs = folder.glob(f"*/{CONFIG_NAME}")
        inside = [*(file.parent for file in configs), *folder.glob("*.safetensors")]
        way = "give the folder that PEFT has saved, since the scale stands in that file"
        if inside and not (folder / WEIGHTS_NAME).exists():
            way = f"name one in it, such as {min(inside)}"
        if (folder / "config.json").is_file():
            way = "it is a whole model, and `matryoshka extract` makes a LoRA of a fine-tuned one"
        raise MatryoshkaError(f"{folder} holds no {CONFIG_NAME}: {way}")
    config, file = read_json(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    if not file.exists():
        raise MatryoshkaError(
            f"{folder} holds no {WEIGHTS_NAME}. An adapter_model.bin is a pickle, which may run "
            "code: save it again with PEFT"
        )
    stored, metadata = open_tensors(file)
    layers, others = find_layers(stored, config, str(path))
    adapter = AdapterFile(str(path), layers, others, config, metadata, files=(file,))
    first = layers[0]
    try:
        note = json.loads(metadata[NOTE])
        nesting = Nesting(tuple(note["ranks"]), note["scaling"], first.scale)
        order, wanted = note["order"], note["checksum"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return adapter
    with one_thread():
        found = checksum((layer.A.read(), layer.B.read()) for layer in layers)
    alike = all((x.rank, x.scale) == (nesting.max_rank, first.scale) for x in layers)
    if found != wanted or not alike:
        return adapter
    return replace(adapter, nesting=nesting, order=order)


def write_nested(adapter: AdapterFile, path: PathLike, force: bool = False) -> Plan:
    """Write a nested adapter that plain PEFT reads as the one of its largest rank; return its plan.

    Factors without an order are reordered by SVD. Smaller layers are padded to the largest nested
    rank. An adapter that is not nested gets the ranks 1, 2, 4, ... R. Raises: as `write_rank`.
    """
    order, scaling = adapter.order or "svd", adapter.nesting.scaling if adapter.nesting else "none"
    note = {"ranks": adapter.ranks, "scaling": scaling, "order": order, "checksum": checksum(())}
    own = dict.fromkeys((layer.name for layer in adapter.layers), adapter.ranks[-1])
    plan = plan_rank(adapter, own, {NOTE: json.dumps(note)})
    with new_folder(path, force, adapter.files) as folder:
        _put(folder, plan)
    return plan


def write_rank(adapter: AdapterFile, path: PathLike, rank: Ranks, force: bool = False) -> Plan:
    """Write an ordinary adapter of one rank, or of a rank for each layer; return its plan.

    Factors without an order are reordered by SVD. A single file stays one. A layer whose own rank
    is smaller keeps it.

    Raises:
        MatryoshkaError: There is no such rank, layers cannot differ, or the place is taken.
    """
    plan = plan_rank(adapter, rank)
    if adapter.is_single:
        with new_file(path, force, adapter.files) as file:
            plan.write(file)
    else:
        with new_folder(path, force, adapter.files) as folder:
            _put(folder, plan)
    return plan


def plan_rank(adapter: AdapterFile, rank: Ranks, metadata: Mapping[str, str] | None = None) -> Plan:
    """Return the `Plan` of `write_rank`."""
    if isinstance(rank, Mapping):
        own = dict(rank)
    else:
        adapter.check_rank(rank)
        own = {layer.name: min(int(rank), layer.rank) for layer in adapter.layers}
    if adapter.is_single:
        return plan_single(adapter, own)
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
    return Plan(adapter, layers, adapter.others, {"format": "pt", **(metadata or {})})


def _put(folder: Path, plan: Plan) -> None:
    """Write PEFT's files, the card, and what lay beside."""
    config = _config_of(plan)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    plan.write(folder / WEIGHTS_NAME)
    (folder / "README.md").write_text(_card(plan, config), encoding="utf-8")
    beside = [x.parent for x in plan.adapter.files[:1] if (x.parent / CONFIG_NAME).is_file()]
    for file in filter(Path.is_file, (x for p in beside for n in BESIDE for x in p.glob(n))):
        shutil.copyfile(file, folder / file.name)


def _card(plan: Plan, config: Mapping[str, Any]) -> str:
    """Return the model card, made of an allow-list of what is known about the adapter."""
    base = str(config.get("base_model_name_or_path") or "a model")
    base = _HUB_NAMES.get(base, base)
    is_id = bool(_HUB_ID.fullmatch(base)) and not Path(base).exists()
    head = ["library_name: peft", "tags:", "- lora", "- matryoshka-lora"]
    head += [f"base_model: {base}"] if is_id else []
    # Do not publish local paths.
    title = f"LoRA of rank {plan.rank} for {base if is_id else Path(base).name}"
    readers = "PEFT reads" if plan.others else "PEFT, vLLM and others read"
    text = f"{readers} this folder as rank {plan.rank}. {_US} wrote it."
    if NOTE in plan.metadata:
        note = json.loads(plan.metadata[NOTE])
        ranks = "Its nested ranks" if note["order"] == "paper" else "Every rank"
        text += f" {ranks} can be cut out of it, in the order `{note['order']}`: "
        text += "`matryoshka export THIS_FOLDER --rank RANK -o OUT`.\n\n"
        text += "| rank | norm of the update that it leaves out |\n|---|---|\n"
        text += "\n".join(f"| {r} | {100 * plan.error(r):.1f} % |" for r in note["ranks"])
    return "\n".join(["---", *head, "---", "", f"# {title}", "", text, ""])


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


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse adapters that are not LoRA, or whose update is not s B A."""
    method = next((name for name in _OTHER_METHODS if config.get(name)), "")
    init, reason = str(config.get("init_lora_weights")), ""
    if config.get("peft_type") != "LORA":
        kind = f"{config.get('peft_type')!r:.80}"
        reason = f"it is of type {kind} and not LoRA. PEFT's save_as_lora makes LoRA of many types"
    elif method:
        reason = f"with {method} its layers are more than pairs of factors: use it whole"
    elif init.startswith(_INITS):
        reason = (
            f"init_lora_weights={init!r:.80} lets PEFT change the base model: train with PEFT "
            "alone, and save with its path_initial_model_for_weight_conversion"
        )
    elif config.get("target_parameters") and (
        config.get("rank_pattern") or config.get("alpha_pattern")
    ):
        # 'all-linear' creates such patterns for routed experts, under names that no key has.
        reason = "its target_parameters have ranks by layer: train again, and name all layers"
    if reason:
        raise MatryoshkaError(f"{where} has no lower ranks: {reason}")


def find_layers(
    stored: dict[str, Stored], config: dict[str, Any], where: str
) -> tuple[tuple[Layer, ...], dict[str, Stored]]:
    """Return the layers sorted by name, and the tensors that are no factors."""
    check_config(config, where)
    found, others = list[Layer](), dict(sorted(stored.items()))
    for key, A in stored.items():
        suffix, partner = next((pair for pair in _SUFFIXES if key.endswith(pair[0])), ("", ""))
        if suffix:
            module = key.removesuffix(suffix)
            name, key_B = module.removeprefix("base_model.model."), module + partner
            rank, scale = rank_and_scale(config, name, where)
            B, rows = stored.get(key_B), A.shape[0] if A.shape else 0
            # Expert parameters hold R rows per expert.
            experts = rows // rank if config.get("target_parameters") else 1
            fits = A.is_factor and rows == experts * rank
            if not (fits and B and B.is_factor and B.shape[1] == rows):
                raise MatryoshkaError(f"{where}: {name[:200]} is not of rank {rank}: save it again")
            found.append(Layer(name, key, key_B, A, B, rank, scale, experts))
            del others[key], others[key_B]
    strange = next((key for key in others if ".lora_" in key), "" if found else "no factors")
    if strange:
        raise MatryoshkaError(f"{where} holds {strange[:200]}: copy or save the adapter again")
    return tuple(sorted(found, key=lambda layer: layer.name)), others
