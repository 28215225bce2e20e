"""The keys of tensors in files: suffixes of factors, prefixes of models, and names of modules."""

from __future__ import annotations

from typing import NamedTuple


class FactorSuffixes(NamedTuple):
    """The suffixes of the keys of A and B, after the name of a layer."""

    A: str
    B: str


KOHYA_SUFFIXES = FactorSuffixes(".lora_down.weight", ".lora_up.weight")
DIFFUSERS_SUFFIXES = FactorSuffixes(".lora_A.weight", ".lora_B.weight")
ALL_SUFFIXES = (
    KOHYA_SUFFIXES,
    DIFFUSERS_SUFFIXES,
    FactorSuffixes(".lora_A.default.weight", ".lora_B.default.weight"),
    FactorSuffixes(".lora_A", ".lora_B"),
    FactorSuffixes(".down.weight", ".up.weight"),
    FactorSuffixes(".down", ".up"),
)

PEFT_PREFIX = "base_model.model."
"""The start of every key that PEFT writes."""

DIFFUSERS_PARTS = frozenset(
    {
        "unet",
        "transformer",
        "transformer_2",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "connectors",
        "text_conditioner",
        "prior",
    }
)
"""The models of diffusers' pipelines that a LoRA may be for. Its keys begin with their names."""

ORIGINAL_PART = "diffusion_model"
"""The start of keys that name modules as the authors of an image model do."""


def split_part(module: str) -> tuple[str, str]:
    """Split a module's name into the part of the pipeline and the name inside that part.

    The part is empty if the name has none.
    """
    part, _, name = module.partition(".")
    if name and (part in DIFFUSERS_PARTS or part == ORIGINAL_PART):
        return part, name
    return "", module
