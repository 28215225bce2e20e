"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_lora.adapter.handle import NestedAdapter
    from matryoshka_lora.adapter.loading import load
    from matryoshka_lora.adapter.nest import nest
    from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
    from matryoshka_lora.evaluation.evaluate import evaluate
    from matryoshka_lora.evaluation.results import aurac
    from matryoshka_lora.evaluation.select import select
    from matryoshka_lora.nesting import Nesting
    from matryoshka_lora.serving.export import export
    from matryoshka_lora.serving.reorder import reorder

__all__ = [
    "MatryoshkaError",
    "NestedAdapter",
    "Nesting",
    "NotFiniteError",
    "aurac",
    "evaluate",
    "export",
    "load",
    "nest",
    "reorder",
    "select",
]
__version__ = "0.2.0"

# Imported at first use, so that `matryoshka --help` does not wait for torch and PEFT.
_MODULES = {
    "MatryoshkaError": "errors",
    "NestedAdapter": "adapter.handle",
    "Nesting": "nesting",
    "NotFiniteError": "errors",
    "aurac": "evaluation.results",
    "evaluate": "evaluation.evaluate",
    "export": "serving.export",
    "load": "adapter.loading",
    "nest": "adapter.nest",
    "reorder": "serving.reorder",
    "select": "evaluation.select",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
