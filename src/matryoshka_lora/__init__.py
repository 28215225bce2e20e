"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from matryoshka_lora.adapter import NestedAdapter, export_adapter, load, nest, read_sidecar
from matryoshka_lora.aurac import aurac
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reorder import reorder_factors

__all__ = [
    "MatryoshkaError",
    "NestedAdapter",
    "Nesting",
    "aurac",
    "export_adapter",
    "load",
    "nest",
    "read_sidecar",
    "reorder_factors",
]
__version__ = "0.1.0"
