"""Life inside PEFT: a nested adapter is an ordinary LoRA adapter with a diagonal between its factors."""

from matryoshka_lora.adapter.loading import load
from matryoshka_lora.adapter.handle import NestedAdapter, nest
from matryoshka_lora.adapter.reading import read_adapter
from matryoshka_lora.formats.sidecar import read_sidecar
from matryoshka_lora.adapter.storage import export_adapter

__all__ = ["NestedAdapter", "export_adapter", "load", "nest", "read_adapter", "read_sidecar"]
