"""Which adapter it is: a hash of all that its answers depend on, by which an evaluation knows whose it is."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import torch

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.formats.sidecar import SIDECAR_NAME, as_json


def fingerprint(adapter: OpenedAdapter) -> str:
    """The hash of an adapter: in memory and in any file, and in any process, the same for the same adapter."""
    about = [adapter.config.scale, adapter.config.r, None if adapter.state is None else as_json(adapter.state)]
    found = sha256(json.dumps(about).encode())
    for key in sorted(adapter.stored):
        tensor = adapter.tensor(key).detach().cpu().contiguous()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_measured(evaluation: Path, adapter: OpenedAdapter) -> None:
    """Raises MatryoshkaError if an ``evaluation.json`` is that of other weights than the adapter has.

    A file that does not say whose it is passes.
    """
    try:
        data = json.loads(evaluation.read_text(encoding="utf-8"))
        version, measured = data["format"], data["adapter"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if measured != (_hash_of_files(Path(adapter.name)) if version == 2 else fingerprint(adapter)):
        raise MatryoshkaError(
            f"{evaluation} was measured on other weights than {adapter.name} has now: evaluate it again, with --force"
        )


def _hash_of_files(folder: Path) -> str:
    """As version 0.1 had it."""
    found = sha256()
    descriptions = [folder / name for name in (CONFIG_NAME, SIDECAR_NAME)]
    for file in sorted((*folder.glob("*.safetensors"), *(file for file in descriptions if file.is_file()))):
        found.update(file.name.encode())
        found.update(file.read_bytes())
    return found.hexdigest()
