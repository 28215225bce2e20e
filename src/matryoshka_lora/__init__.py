"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter as NestedAdapter
    from matryoshka_lora.combining import combine as combine
    from matryoshka_lora.convert import export as export
    from matryoshka_lora.convert import reorder as reorder
    from matryoshka_lora.errors import MatryoshkaError as MatryoshkaError
    from matryoshka_lora.errors import NotFiniteError as NotFiniteError
    from matryoshka_lora.evaluation.evaluate import evaluate as evaluate
    from matryoshka_lora.evaluation.results import aurac as aurac
    from matryoshka_lora.evaluation.select import select as select
    from matryoshka_lora.extracting import extract as extract
    from matryoshka_lora.nested import load as load
    from matryoshka_lora.nested import nest as nest
    from matryoshka_lora.nesting import Nesting as Nesting

# Each name is imported at its first use, so that `matryoshka --help` and work on files need no
# PEFT.
_MODULES = {
    "MatryoshkaError": "errors",
    "NestedAdapter": "adapter",
    "Nesting": "nesting",
    "NotFiniteError": "errors",
    "aurac": "evaluation.results",
    "combine": "combining",
    "evaluate": "evaluation.evaluate",
    "export": "convert",
    "extract": "extracting",
    "load": "nested",
    "nest": "nested",
    "reorder": "convert",
    "select": "evaluation.select",
}
__all__ = [*_MODULES]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
