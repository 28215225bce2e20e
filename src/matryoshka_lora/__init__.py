"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter, export_adapter, load, nest, read_sidecar
    from matryoshka_lora.serving.reorder import reorder_adapter
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.metrics import aurac
    from matryoshka_lora.nesting import Nesting
    from matryoshka_lora.reordering.factors import reorder_factors
    from matryoshka_lora.training.order import learn_from_trainer

__all__ = [
    "MatryoshkaError",
    "NestedAdapter",
    "Nesting",
    "aurac",
    "export_adapter",
    "learn_from_trainer",
    "load",
    "nest",
    "read_sidecar",
    "reorder_adapter",
    "reorder_factors",
]
__version__ = "0.1.0"

# Imported at first use, so that `matryoshka --help` does not wait for torch and PEFT.
_MODULES = {
    "MatryoshkaError": "errors",
    "NestedAdapter": "adapter",
    "Nesting": "nesting",
    "aurac": "metrics",
    "export_adapter": "adapter",
    "learn_from_trainer": "train.order",
    "load": "adapter",
    "nest": "adapter",
    "read_sidecar": "adapter",
    "reorder_adapter": "deploy.reorder",
    "reorder_factors": "reorder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
