"""The tensors of a file that are not factors of a layer, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

# The tensors of a module by kind: the first one that a module has is its kind.
_KINDS = {
    "DoRA": r"dora_scale|(lora_)?mag\w+(\.\w+)*",
    "LoHa": r"hada_\w+",
    "LoKr": r"lokr_\w+",
    "OFT": r"oft_\w+",
    "LoRA with a third matrix": r"lora_mid(\.weight)?",
    "bias": r"(lora_[AB]\.)?bias",
    "difference": r"diff(_b)?",
    "norm": r"[wb]_norm",
    "embedding": r"emb_params|string_to_param(\..+)?",
    "LoRA with alpha 0": r"(lora(_linear_layer)?[._])?(down|up)(\.weight)?|lora_[AB](\.\w+)*",
}
_MODULE = re.compile(rf"(?P<module>.+?)\.(?P<tensor>{'|'.join(_KINDS.values())}|alpha)")


def modules_by_kind(keys: Iterable[str]) -> dict[str, int]:
    """Return how many modules have other tensors of a kind, such as ``"DoRA"`` or ``"norm"``."""
    tensors_by_module: dict[str, list[str]] = {}
    for key in keys:
        match = _MODULE.fullmatch(key)
        module, tensor = (match["module"], match["tensor"]) if match else (key, "")
        tensors_by_module.setdefault(module, []).append(tensor)
    return dict(Counter(_kind_of(tensors) for tensors in tensors_by_module.values()))


def _kind_of(tensors: Sequence[str]) -> str:
    for kind, pattern in _KINDS.items():
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            return kind
    return "other"
