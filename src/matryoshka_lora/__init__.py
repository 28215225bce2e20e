"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter
    from matryoshka_lora.convert import export, reorder
    from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
    from matryoshka_lora.evaluation.evaluate import evaluate
    from matryoshka_lora.evaluation.results import aurac
    from matryoshka_lora.evaluation.select import select
    from matryoshka_lora.nested import load, nest
    from matryoshka_lora.nesting import Nesting

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
# Each name is imported at its first use, so that `matryoshka --help` and work on files need no
# PEFT.
_MODULES = {
    "MatryoshkaError": "errors",
    "NestedAdapter": "adapter",
    "Nesting": "nesting",
    "NotFiniteError": "errors",
    "aurac": "evaluation.results",
    "evaluate": "evaluation.evaluate",
    "export": "convert",
    "load": "nested",
    "nest": "nested",
    "reorder": "convert",
    "select": "evaluation.select",
}
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
