"""Take one adapter out of the base weights, where others may be merged too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError


def unmerge(layers: Sequence[Any], adapter: str) -> None:
    """Undo the merge of a nested adapter; PEFT's own ``unmerge_adapter`` would take out all that are merged.

    Args:
        layers: PEFT's modules that hold the adapter.
        adapter: Its name.

    Raises:
        MatryoshkaError: An adapter of another kind was merged on top of it. Nothing has been changed then.
    """
    merged = [module for module in layers if adapter in module.merged_adapters]
    for module in merged:
        for other in module.merged_adapters[module.merged_adapters.index(adapter) :]:
            if not isinstance(module.lora_variant.get(other), NestedVariant | None):
                raise MatryoshkaError(
                    f"adapter {other!r} is of another kind and was merged on top of {adapter!r}: take both out "
                    "with adapter.model.unmerge_adapter()"
                )
    for module in merged:
        others = [name for name in module.merged_adapters if name != adapter]
        module.merged_adapters = [adapter]
        module.unmerge()
        module.merged_adapters = others
