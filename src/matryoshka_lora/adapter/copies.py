"""The copies that TRL keeps of an adapter that it trains: nested like it."""

from __future__ import annotations

from dataclasses import replace

from peft import PeftModel

from matryoshka_lora.adapter.gates import lora_layers
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.state import State

COPIES = ("ref", "teacher")
"""What TRL names a copy of the adapter that it trains: as it was before training, and its moving average."""


def nest_copies(model: PeftModel, adapter: str) -> dict[str, State]:
    """Nest the copies that TRL keeps of a nested adapter, as far as they are not, and return their states by name.

    DPO, KTO, GRPO and RLOO measure how far training has gone from adapter "ref"; SDFT and SDPO learn from "teacher".
    TRL adds both by the nested adapter's own config and fills in its factors. Without p between them, they would be
    another function than what they are copies of.
    """
    config = model.peft_config[adapter]
    states: dict[str, State] = {}
    for name in COPIES:
        if name == adapter or model.peft_config.get(name) != config:
            continue
        for _, module in lora_layers(model, name):
            original, copy = module.lora_variant.get(adapter), module.lora_variant.get(name)
            if copy is None and isinstance(original, NestedVariant):
                # A state of their own, since the adapter may be reordered and its copies are not.
                copy = original.copied(states.get(name) or replace(original.state), module, name)
                module.lora_variant[name] = copy
            if isinstance(copy, NestedVariant):
                states[name] = copy.state
    return states
