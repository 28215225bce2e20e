"""PEFT's LoraConfig as a dictionary: which variants are plain LoRA, and the ranks and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.nesting import check_rank, is_valid_scale
from matryoshka_lora.registry import DORA_HINT

# Fields of LoraConfig of variants whose update is not s B A, although their files hold factors.
_UNSUPPORTED_VARIANTS = {
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "Activated LoRA",
    "lora_bias": "LoRA with a bias",
}
# Initializations that change the base model's weights.
_UNSUPPORTED_INITIALIZATIONS = ("pissa", "corda", "olora", "lora_ga", "loftq")
# A name, with its special characters escaped, perhaps after the anchor of its beginning.
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<name>(?:[^.^$*+?{}\[\]\\|()]|\\[^A-Za-z0-9])*)")
_MAX_REPETITIONS = 8  # in a regular expression


def check_plain_lora(config: Mapping[str, Any], name: str) -> None:
    """Raise MatryoshkaError for adapters that are not LoRA, or whose update is not ``s B A``."""
    if config.get("peft_type") != "LORA":
        raise MatryoshkaError(
            f"{name} has peft_type={short(config.get('peft_type'))}, which is not supported. "
            "PEFT's save_as_lora converts many types to LoRA."
        )
    for option, variant in _UNSUPPORTED_VARIANTS.items():
        if config.get(option):
            hint = f" {DORA_HINT}" if variant == "DoRA" else ""
            raise MatryoshkaError(f"{name}: {variant} is not supported ({option} is set).{hint}")
    initialization = str(config.get("init_lora_weights")).lower()  # PEFT ignores the case too
    if initialization.startswith(_UNSUPPORTED_INITIALIZATIONS):
        raise MatryoshkaError(
            f"{name} has init_lora_weights={short(initialization)}, with which PEFT changes the "
            "base model. Train with PEFT alone, and save with its "
            "path_initial_model_for_weight_conversion."
        )
    has_patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    if config.get("target_parameters") and has_patterns:
        # PEFT creates such patterns for 'all-linear', under names that no key of the file has.
        raise MatryoshkaError(
            f"{name} has target_parameters together with rank_pattern or alpha_pattern, which is "
            "not supported. Train again, and name all layers in target_modules."
        )


class RanksAndScales:
    """The rank and the scale of each layer according to PEFT's LoraConfig."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config = config
        self._name = name
        self._ranks = _Patterns(config.get("rank_pattern"), name)
        self._alphas = _Patterns(config.get("alpha_pattern"), name)

    def of(self, layer_name: str) -> tuple[int, float]:
        """Return the rank and the scale of a layer.

        Raises:
            MatryoshkaError: They are not positive numbers.
        """
        try:
            rank = check_rank(self._ranks.get(layer_name, self._config["r"]))
            alpha = self._alphas.get(layer_name, self._config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            is_valid = is_valid_scale(scale)
        except (ArithmeticError, KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise MatryoshkaError(
                f"{self._name}: the rank and alpha of {short(layer_name)} must be positive "
                "numbers. Save the adapter again."
            )
        return rank, scale


class _Patterns:
    """The patterns of a config. As in PEFT, the first one that matches the end of a name counts.

    A large file may have a pattern for each layer, so names are looked up, and only patterns with
    special characters are matched.
    """

    def __init__(self, patterns: Mapping[str, Any] | None, name: str) -> None:
        if not isinstance(patterns, (Mapping, NoneType)):
            raise MatryoshkaError(
                f"{name}: rank_pattern and alpha_pattern must be objects, got {short(patterns)}. "
                "Save the adapter again."
            )
        self._literals: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        for index, (pattern, value) in enumerate((patterns or {}).items()):
            literal = _LITERAL.fullmatch(pattern)
            if literal is None:
                expression = _compile(pattern, name)
                self._expressions.append((index, expression, value))
                continue
            key = literal["anchor"] + re.sub(r"\\(.)", r"\1", literal["name"])
            self._literals.setdefault(key, (index, value))

    def get(self, name: str, default: Any) -> Any:
        """Return the value of the first pattern that matches a name."""
        keys = [f"^{name}", name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]
        matches = [self._literals[key] for key in keys if key in self._literals]
        for index, expression, value in self._expressions:
            if expression.match(name):
                matches.append((index, value))
                break
        return min(matches, key=lambda match: match[0])[1] if matches else default


def _compile(pattern: str, name: str) -> re.Pattern[str]:
    # A repetition of a repetition takes exponential time, and k in a row take the time n^k.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MAX_REPETITIONS:
        raise MatryoshkaError(
            f"{name} has the regular expression {short(pattern)}, which may take forever to match. "
            "Write the names of the layers into its adapter_config.json."
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise MatryoshkaError(
            f"{name}: {short(pattern)} is not a regular expression ({error}). Correct it in "
            "adapter_config.json."
        ) from error
