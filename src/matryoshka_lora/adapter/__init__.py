"""Life inside PEFT: a nested adapter is an ordinary LoRA adapter with a diagonal between its factors."""

from matryoshka_lora.adapter.adapter import NestedAdapter, nest
from matryoshka_lora.adapter.checkpoint import export_adapter, load, read_adapter
from matryoshka_lora.adapter.sidecar import read_sidecar

__all__ = ["NestedAdapter", "export_adapter", "load", "nest", "read_adapter", "read_sidecar"]
