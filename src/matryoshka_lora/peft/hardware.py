"""What the hardware of this machine computes quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions for bfloat16, which is very slow without them."""
    capabilities: Mapping[str, Any] = {}
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
