"""The sidecar: one JSON file beside PEFT's own, with what they cannot say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

from matryoshka_lora.adapter.state import Form, Inference, NestedState
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import settle, write_text
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.rules import get_rule

SIDECAR_NAME = "nesting.json"
FORMAT_VERSION = 1
_MAX_BYTES = 1 << 20  # a sidecar is under a kilobyte; anything large is not one
_KEYS = {"format_version", "nesting", "rule", "inference", "seed", "form", "trained_ranks"}


def write_sidecar(folder: Path, state: NestedState, form: Form | None = None) -> None:
    """Write the sidecar into a folder; ``form`` says what the factors there are, if not what they are in memory."""
    data = {
        "format_version": FORMAT_VERSION,
        "nesting": state.nesting.to_dict(),
        "rule": state.rule.name,
        "inference": state.inference,
        "seed": state.seed,
        "form": form or state.form,
        "trained_ranks": list(state.rule.trained_ranks(state.nesting)),
    }
    write_text(folder / SIDECAR_NAME, json.dumps(data, indent=2) + "\n")


def read_sidecar(path: str | Path) -> NestedState:
    """Read the sidecar of an adapter directory: its nesting, rule, inference, seed and form.

    Raises:
        MatryoshkaError: There is none, it is damaged, or a newer version of this package wrote it.
    """
    file = Path(path) / SIDECAR_NAME
    if not os.path.isdir(path):
        raise MatryoshkaError(f"{path} is not a directory: give the directory that holds adapter_config.json")
    settle(path)
    if not file.is_file():
        raise MatryoshkaError(
            f"{path} holds no {SIDECAR_NAME}, so it is not a nested adapter. Any LoRA adapter becomes one by "
            "`matryoshka reorder`, or is one when it is trained with `matryoshka train` or nest() and written by save()"
        )
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise MatryoshkaError(f"{file} cannot be read as a sidecar: {error}. Copy the adapter again") from error
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise MatryoshkaError(f"{file} names no format version: it is damaged or not ours. Copy the adapter again")
    if version > FORMAT_VERSION:
        raise MatryoshkaError(
            f"{file} has format version {version} and this matryoshka-lora reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U matryoshka-lora`"
        )
    return _state(data, file)


def _state(data: dict[str, Any], file: Path) -> NestedState:
    wrong = sorted(_KEYS ^ set(data))
    if wrong:
        raise MatryoshkaError(f"{file}: keys are missing or unknown: {', '.join(wrong)}. Copy the adapter again")
    for key, allowed in (("inference", get_args(Inference)), ("form", get_args(Form))):
        if data[key] not in allowed:
            raise MatryoshkaError(
                f"{file}: {key} is {data[key]!r}, not one of {', '.join(allowed)}. Copy the adapter again"
            )
    if isinstance(data["seed"], bool) or not isinstance(data["seed"], int):
        raise MatryoshkaError(f"{file}: seed is {data['seed']!r}, not an integer. Copy the adapter again")
    try:
        nesting, rule = Nesting.from_dict(data["nesting"]), get_rule(data["rule"])
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{file}: {error}. Copy the adapter again") from error
    if data["trained_ranks"] != list(rule.trained_ranks(nesting)):
        raise MatryoshkaError(f"{file}: trained_ranks contradicts the nesting and the rule. Copy the adapter again")
    return NestedState(nesting, rule, data["inference"], data["seed"], data["form"])
