"""The base model of a LoRA, as other programs need it: its config, or a path to load."""

from __future__ import annotations

from typing import Any

from matryoshka_lora.errors import MatryoshkaError, optional_imports
from matryoshka_lora.lora_file.hub import BUNDLED_MODEL, local_path
from matryoshka_lora.lora_file.safetensors_io import read_json

_CONFIG_NAME = "config.json"


def read_base_config(base_model: str, base_revision: str | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a base model.

    Args:
        base_model: A folder, a Hub id, or the bundled model.
        base_revision: Branch, tag or commit on the Hugging Face Hub.

    Raises:
        MatryoshkaError: There is no such model, or its config cannot be read.
    """
    path = resolve_base_model(base_model)
    try:
        folder = local_path(path, (_CONFIG_NAME,), base_revision)
        return read_json(folder / _CONFIG_NAME)
    except MatryoshkaError as error:
        raise MatryoshkaError(
            f"Cannot read the config of the base model {base_model!r}. {error} Pass another "
            "`base_model`."
        ) from error


def resolve_base_model(base_model: str) -> str:
    """Return a path or Hub id that other programs can load.

    It is the base model itself, but the bundled one is unpacked into a folder first.

    Raises:
        MatryoshkaError: The bundled model is not installed.
        MissingDependencyError: Unpacking it needs packages that are not installed.
    """
    if base_model != BUNDLED_MODEL:
        return base_model
    with optional_imports("peft,gguf"):
        from matryoshka_lora.peft.base_model import resolve_model_path
    return str(resolve_model_path(base_model))
