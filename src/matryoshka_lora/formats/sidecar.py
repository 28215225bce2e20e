"""The sidecar: ``nesting.json`` beside PEFT's files, with what they cannot say.

::

    {"format_version": 2, "ranks": [1, 2, 4, 8], "scaling": "none", "rule": "matryoshka", "seed": 0,
     "deploy": "reordered", "reordered": "svd", "weights": "0c9e...", "trained": "81f2..."}

``weights`` is the hash of the weights that it was written for, see `matryoshka_lora.formats.weights_hash`. ``trained``
is that of the factors as they are trained, where those stand beside. Earlier versions wrote neither. The scale of the
largest rank is that of PEFT's config and stands there alone. The other fields are those of
`matryoshka_lora.state.State`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import yaml
from safetensors import SafetensorError, safe_open

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import SPECTRA_NAME, read_text, write_text
from matryoshka_lora.formats.config import CONFIG_NAME, AdapterConfig
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.rules import get_rule, is_named
from matryoshka_lora.state import By, State

SIDECAR_NAME = "nesting.json"
FORMAT_VERSION = 2

_MAX_BYTES = 1 << 20  # a sidecar is under a kilobyte; anything large is not one
_KEYS = {"format_version", "ranks", "scaling", "rule", "seed", "deploy", "reordered"}
_HASHES = ("weights", "trained")
_KEYS_1 = {"format_version", "nesting", "rule", "inference", "seed", "form", "trained_ranks"}
_STUDY_RULES_1 = ("mean", "reversed", "random", "geometric-0.97", "geometric-0.9", "geometric-0.8")
_AGAIN = "Copy the adapter again"


class Sidecar(NamedTuple):
    """What a sidecar says.

    Attributes:
        state: The nesting.
        weights: The hash of the weights that it was written for; None where it does not say.
        trained: That of the factors as they are trained, which stand beside; None where it knows of none.
    """

    state: State
    weights: str | None = None
    trained: str | None = None


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write the sidecar into a folder."""
    hashes = {name: getattr(sidecar, name) for name in _HASHES if getattr(sidecar, name) is not None}
    write_text(folder / SIDECAR_NAME, json.dumps(as_json(sidecar.state) | hashes, indent=2) + "\n")


def as_json(state: State) -> dict[str, Any]:
    """What a sidecar says of the nesting: plain JSON types."""
    return {
        "format_version": FORMAT_VERSION,
        "ranks": list(state.nesting.ranks),
        "scaling": state.nesting.scaling,
        "rule": _rule_name(state),
        "seed": state.seed,
        "deploy": state.deploy,
        "reordered": state.reordered,
    }


def _rule_name(state: State) -> str:
    """The rule's. Reordered factors are plain LoRA's, by whatever they were trained."""
    if is_named(state.rule):
        return state.rule.name
    if state.reordered:
        return "lora"
    raise MatryoshkaError(
        f"rule {state.rule.name!r} is none of this package's, and no file can say what it does: call adapter.reorder() "
        "first, or leave deploy='paper' out"
    )


def has_sidecar(folder: Path) -> bool:
    """Whether a folder holds a sidecar, readable or not."""
    return os.path.lexists(folder / SIDECAR_NAME)


def read_sidecar(folder: Path, config: AdapterConfig) -> Sidecar:
    """Read the sidecar of an adapter.

    Args:
        folder: The adapter's.
        config: The adapter's, which says what the scale is.

    Raises:
        MatryoshkaError: It is damaged, it contradicts the config, or a newer version of this package
            wrote it.
    """
    file = folder / SIDECAR_NAME
    try:
        data = json.loads(read_text(file, _MAX_BYTES))
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise MatryoshkaError(f"{file} cannot be read as a sidecar: {error}. {_AGAIN}") from error
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise MatryoshkaError(f"{file} names no format version: it is damaged or not ours. {_AGAIN}")
    if version > FORMAT_VERSION:
        raise MatryoshkaError(
            f"{file} has format version {version} and this matryoshka-lora reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U matryoshka-lora`"
        )
    keys = _KEYS if version == FORMAT_VERSION else _KEYS_1
    hashes = {name: data.pop(name) for name in _HASHES if version == FORMAT_VERSION and name in data}
    wrong = sorted(map(str, keys ^ set(data)))
    if wrong:
        raise MatryoshkaError(f"{file}: keys are missing or unknown: {', '.join(wrong)}. {_AGAIN}")
    for field in ("rank_pattern", "alpha_pattern"):
        if config[field]:
            raise MatryoshkaError(
                f"{folder / CONFIG_NAME} does not go with its sidecar: {field} gives layers ranks or scales of their "
                f"own. {_AGAIN}"
            )
    if version == 1 and data["rule"] in _STUDY_RULES_1 and data["form"] == "raw":
        raise MatryoshkaError(
            f"{file}: rule {data['rule']!r} was one of version 0.1 for studies, and its P stands in no file. Reorder "
            "the adapter with matryoshka-lora 0.1 first, which puts P into the factors"
        )
    try:
        state = _state(data, config) if version == FORMAT_VERSION else _state_1(data, config, folder)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{file}: {error}. {_AGAIN}") from error
    if state.nesting.max_rank != config.r:
        raise MatryoshkaError(
            f"{folder / CONFIG_NAME} does not go with its sidecar: it says r={config.r}, and the largest nested rank "
            f"is {state.nesting.max_rank}. {_AGAIN}"
        )
    for name, value in hashes.items():
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise MatryoshkaError(f"{file}: {name} is {value!r:.80}, not a hash. {_AGAIN}")
    return Sidecar(state, **hashes)


def _state(data: dict[str, Any], config: AdapterConfig) -> State:
    nesting = Nesting(data["ranks"], data["scaling"], config.scale)
    if data["reordered"] is not None and data["reordered"] not in get_args(By):
        raise MatryoshkaError(f"reordered is {data['reordered']!r}, not one of {', '.join(get_args(By))}")
    return State(nesting, get_rule(data["rule"]), _seed(data), data["deploy"], data["reordered"])


def _state_1(data: dict[str, Any], config: AdapterConfig, folder: Path) -> State:
    """Of a sidecar of version 0.1, whose words were others."""
    given, allowed = data["nesting"], {"ranks", "scaling", "alpha"}
    if not isinstance(given, dict) or "ranks" not in given or not set(given) <= allowed:
        raise MatryoshkaError(f"a nesting has the keys ranks, scaling and alpha, not {given!r:.200}")
    scaling, alpha = given.get("scaling", "none"), given.get("alpha", 1.0)
    # What is in the factors already is plain LoRA, whatever it was trained by.
    rule = get_rule("lora" if data["rule"] in _STUDY_RULES_1 else data["rule"])
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= sys.float_info.max:
        raise MatryoshkaError(f"alpha is {alpha!r:.80}, not a positive number")
    nesting = Nesting(given["ranks"], scaling, config.scale)
    root = {"none": alpha, "rank": nesting.max_rank, "sqrt": math.sqrt(nesting.max_rank)}[scaling]
    if not math.isclose(alpha / root, config.scale, rel_tol=1e-9):
        raise MatryoshkaError(
            f"it scales the adapter by {alpha / root:g}, and {CONFIG_NAME} by {config.scale:g} "
            f"(lora_alpha={config['lora_alpha']}, use_rslora={config['use_rslora']})"
        )
    for key, words in (("inference", ("prefix", "keep")), ("form", ("raw", "folded", "reordered"))):
        if data[key] not in words:
            raise MatryoshkaError(f"{key} is {data[key]!r:.80}, not one of {', '.join(words)}")
    if data["trained_ranks"] != list(rule.trained_ranks(nesting)):
        raise MatryoshkaError("trained_ranks contradicts the nesting and the rule")
    if data["inference"] == "keep" and not rule.fixed:
        raise MatryoshkaError(f"rule {rule.name!r} has no fixed diagonal that inference 'keep' could keep")
    if data["form"] == "reordered":
        return State(nesting, rule, _seed(data), reordered=_reordered_by_1(folder))
    if data["form"] == "folded":  # P was multiplied into B: what is left between the factors is plain LoRA's scale
        return State(nesting, get_rule("lora"), _seed(data))
    return State(nesting, rule, _seed(data), "paper" if data["inference"] == "prefix" else "reordered")


def _reordered_by_1(folder: Path) -> By:
    """Version 0.1 wrote it beside the singular values; `matryoshka train` wrote none, and named it in its config."""
    said: Any = None
    try:
        if (folder / SPECTRA_NAME).is_file():
            with safe_open(folder / SPECTRA_NAME, framework="pt") as spectra:
                said = (spectra.metadata() or {}).get("metric")
        else:
            said = yaml.safe_load(read_text(folder / "train.yaml", _MAX_BYTES))["nesting"]["reorder"]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        pass  # whoever needs these files says what is wrong with them
    return cast(By, said) if said in get_args(By) else "svd"


def _seed(data: dict[str, Any]) -> int:
    if isinstance(data["seed"], bool) or not isinstance(data["seed"], int):
        raise MatryoshkaError(f"seed is {data['seed']!r:.80}, not an integer")
    return int(data["seed"])


def check_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of an adapter.

    Raises:
        MatryoshkaError: It is no folder.
    """
    if not os.path.isdir(path):  # to pathlib, no path at all is the folder that one is in
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise MatryoshkaError(
            f"{path} {what}: give the directory that holds {CONFIG_NAME}. An adapter of the hub must be downloaded "
            "first, with hf download"
        )
    return Path(path)
