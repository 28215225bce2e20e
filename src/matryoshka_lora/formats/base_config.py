"""The base model of a LoRA, as other programs need it: its config."""

from __future__ import annotations

from typing import Any

from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.hub import local_path
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.formats.safetensors_io import read_json
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.registry import Target


def read_base_config(lora: Lora, target: Target) -> dict[str, Any]:
    """Return the ``config.json`` of the base model of an output.

    Raises:
        MatryoshkaError: There is no such model, or its config cannot be read.
    """
    base_model, revision = base_model_of(lora, target.base_model, target.base_revision)
    path = resolve_model_path(base_model)
    try:
        folder = local_path(path, ("config.json",), revision)
        return read_json(folder / "config.json")
    except MatryoshkaError as error:
        raise MatryoshkaError(
            f"Cannot read the config of the base model {base_model!r}. {error} Pass another "
            "`base_model`."
        ) from error
