"""A plugin of vLLM: requests name any rank of the adapters in a folder, such as ``chat@8``.

vLLM loads it if VLLM_PLUGINS names it. VLLM_LORA_RESOLVER_CACHE_DIR is the folder, as for vLLM's
own plugin, and VLLM_ALLOW_RUNTIME_LORA_UPDATING must be set.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError

PLUGIN_NAME = "matryoshka"
"""The name for VLLM_PLUGINS. It is the name of the entry point in pyproject.toml."""


def register() -> None:
    """Register the resolver. vLLM calls it in each of its processes.

    Raises:
        MatryoshkaError: VLLM_LORA_RESOLVER_CACHE_DIR is not a folder.
    """
    # Without VLLM_PLUGINS, vLLM loads every plugin that is installed.
    if PLUGIN_NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    folder = os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR", "")
    if not os.path.isdir(folder):
        raise MatryoshkaError(
            f"VLLM_LORA_RESOLVER_CACHE_DIR must be a folder of adapters, got {folder!r}."
        )
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(PLUGIN_NAME, RankResolver(Path(folder)))


class RankResolver:
    """Finds adapters for requests. It has the method of vLLM's ``LoRAResolver``.

    A rank is truncated when it is requested first, and stays in a temporary folder until the server
    ends, because vLLM reads it again after it has evicted it from memory.

    Args:
        folder: A folder of PEFT folders. It may change while the server runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a ``LoRARequest`` for the name of a request, or None if there is no such adapter.

        vLLM answers None with HTTP 404, and a ValueError, which MatryoshkaError is, with 400. It
        also rejects ranks above its ``--max-lora-rank`` with 400.

        Args:
            base_model_name: The base model of the server.
            lora_name: The name of a folder, or NAME@RANK for a rank of it.
        """
        from vllm.lora.request import LoRARequest

        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="matryoshka-")
        path = await asyncio.to_thread(
            self._find, Path(self._temporary.name), base_model_name, lora_name
        )
        # vLLM sets the id.
        return path and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    def _find(self, temporary: Path, base_model_name: str, lora_name: str) -> Path | None:
        """Return the folder of an adapter at a rank, which is written unless it exists."""
        from matryoshka_lora.bundled_model import resolve_model_path
        from matryoshka_lora.formats import peft_folder
        from matryoshka_lora.formats.open import find_loras
        from matryoshka_lora.formats.vllm import check_for_vllm

        # Names are compared, and not joined to a path: a request may name "../other".
        folders = {path.name: path for path in find_loras(self._folder) if path.is_dir()}
        name, rank = lora_name, None
        if name not in folders:
            name, _, rank = lora_name.rpartition("@")
            # Each spelling of a rank would be another copy on the disk.
            if name not in folders or not re.fullmatch(r"0|[1-9][0-9]{0,5}", rank):
                return None
        adapter = peft_folder.read(folders[name], name)
        check_for_vllm(adapter)
        base_model = peft_folder.base_model_of(adapter)
        if resolve_model_path(*base_model) != base_model_name:
            raise MatryoshkaError(
                f"{name} has the base model {base_model[0]}, and the server has {base_model_name}."
            )
        if rank is None:
            return folders[name]
        # A new version gets another path: the keys of vLLM's prefix cache have the path.
        version = max(file.stat().st_mtime_ns for file in folders[name].rglob("adapter_*"))
        output = temporary / str(version) / lora_name
        if not output.exists():
            adapter.at_rank(int(rank)).save(output)
        return output
