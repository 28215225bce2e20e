"""PEFT's ``adapter_config.json``: read and checked as JSON, without importing PEFT."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import read_text

CONFIG_NAME = "adapter_config.json"

_MAX_BYTES = 1 << 26
_AGAIN = "Copy or save the adapter again"

# PEFT's own values where its file says nothing.
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "bias": "none", "init_lora_weights": True}

_OTHER_METHODS = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "megatron_config",
)

# These start from factors that are only right when p is the constant scale of R, and some change the base model too.
_INITS = ("pissa", "corda", "olora", "lora_ga", "loftq")

# In a regular expression: an escape or a set of letters, and what lets a comment hide anything.
_LETTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_COMMENT = re.compile(r"\(\?(?:#|[a-zA-Z-]*x)")

# Of one alternative, and of all. One with 4 takes 6 ms for a name of 100 letters at worst; with 5 it is 140 ms.
_MOST_REPETITIONS = (4, 8)


@dataclass(frozen=True)
class AdapterConfig:
    """The config of one LoRA adapter. Made by `read_config` and `check_config`.

    Attributes:
        data: The content of the file.
    """

    data: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.data.get(key, _DEFAULTS.get(key))

    @property
    def r(self) -> int:
        """The rank of layers that ``rank_pattern`` does not name."""
        rank: int = self["r"]
        return rank

    @property
    def base_model(self) -> str | None:
        """The name or folder of the base model, where the file says it."""
        return self["base_model_name_or_path"] or None

    @property
    def revision(self) -> str | None:
        """Of the base model on the hub, where the file says it."""
        return self["revision"] or None

    @property
    def target_parameters(self) -> list[str]:
        """Parameters with LoRA, such as stacks of experts."""
        return list(self["target_parameters"] or ())

    @property
    def scale(self) -> float:
        """What PEFT multiplies ``B A`` with in layers that no pattern names."""
        return self._scale(self.r, self["lora_alpha"])

    @property
    def trained_besides(self) -> list[str]:
        """The fields by which parts of the base model are trained whole, beside the factors."""
        fields = [field for field in ("modules_to_save", "trainable_token_indices") if self[field]]
        return fields if self["bias"] == "none" else [*fields, "bias"]

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its name in the base model."""
        return int(self._by_pattern("rank_pattern", layer, self.r))

    def scale_of(self, layer: str) -> float:
        """What PEFT multiplies ``B A`` of a layer with."""
        return self._scale(self.rank_of(layer), self._by_pattern("alpha_pattern", layer, self["lora_alpha"]))

    def changed(self, **changes: Any) -> AdapterConfig:
        """A copy with other values."""
        return AdapterConfig({**self.data, **changes})

    def at(self, rank: int, scale: float) -> AdapterConfig:
        """Of an adapter with one rank and one scale in all layers, ready to be used.

        ``use_rslora`` is off because some converters ignore it; the scale is in ``lora_alpha``.
        """
        alpha = scale * rank
        return self.changed(
            r=rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            use_rslora=False,
            rank_pattern={},
            alpha_pattern={},
            init_lora_weights=True,
            inference_mode=True,
        )

    def write(self, folder: Path) -> None:
        """Write it into a folder, as PEFT does."""
        (folder / CONFIG_NAME).write_text(json.dumps(dict(self.data), indent=2, sort_keys=True), encoding="utf-8")

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self["use_rslora"] else rank)

    def _by_pattern(self, field: str, layer: str, default: Any) -> Any:
        # As PEFT matches them: at the end of a name, from a dot on; the first one counts.
        patterns = self[field] or {}
        return next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), default)


def read_config(folder: Path) -> AdapterConfig:
    """Read the config of a LoRA adapter.

    Raises:
        MatryoshkaError: It is missing, damaged, of another method, or asks for something that has no nested ranks.
    """
    file = folder / CONFIG_NAME
    if not file.exists():
        is_model = (folder / "config.json").is_file()
        what = "a whole model" if is_model else "no adapter"
        raise MatryoshkaError(f"{folder} is {what}: {CONFIG_NAME} is missing. Give the directory that PEFT has saved")
    try:
        data = json.loads(read_text(file, _MAX_BYTES))
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise MatryoshkaError(f"{file} is missing or damaged: {error}. {_AGAIN}") from error
    return check_config(data, str(file))


def check_config(data: Mapping[str, Any], where: str) -> AdapterConfig:
    """Check the fields that this package reads, and refuse what cannot be nested.

    Args:
        data: The content of the file, or ``LoraConfig.to_dict()``.
        where: What is checked, for messages.

    Raises:
        MatryoshkaError: A field is damaged, or makes another method of LoRA; the message names it.
    """
    config = AdapterConfig(data)
    kind = getattr(config["peft_type"], "value", config["peft_type"])
    if kind != "LORA":
        raise MatryoshkaError(f"{where} is of type {kind!r}: only LoRA adapters can be nested; use LoRA")
    _check_values(config, where)
    reason = next(_unsupported(config), None)
    if reason:
        raise MatryoshkaError(f"{where}: {reason}")
    for pattern in _patterns(config):
        if _is_slow(pattern):
            raise MatryoshkaError(
                f"{where}: the pattern {pattern[:80]!r} could take for ever to match. Write it without nested "
                "repetitions, or list the names of the layers"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise MatryoshkaError(f"{where}: {pattern[:80]!r} is no regular expression ({error}). {_AGAIN}") from error
    return config


def _check_values(config: AdapterConfig, where: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[field] or {}, Mapping):
            raise MatryoshkaError(f"{where}: {field} is {config[field]!r:.80}, not a mapping. {_AGAIN}")
    for rank in (config["r"], *(config["rank_pattern"] or {}).values()):
        if type(rank) is not int or not 1 <= rank <= sys.maxsize:
            raise MatryoshkaError(f"{where}: the rank {rank!r:.80} is no positive integer of 64 bits. {_AGAIN}")
    for alpha in (config["lora_alpha"], *(config["alpha_pattern"] or {}).values()):
        if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
            raise MatryoshkaError(f"{where}: the lora_alpha {alpha!r:.80} is no positive number of 64 bits. {_AGAIN}")
    for field in ("target_parameters", "modules_to_save"):
        _check_type(config, field, (list, set, tuple), where)
    _check_type(config, "base_model_name_or_path", (str,), where)
    _check_type(config, "use_rslora", (bool,), where)


def _check_type(config: AdapterConfig, field: str, kinds: tuple[type, ...], where: str) -> None:
    if config[field] is not None and not isinstance(config[field], kinds):
        raise MatryoshkaError(f"{where}: {field} is {config[field]!r:.80}, which PEFT does not write. {_AGAIN}")


def _unsupported(config: AdapterConfig) -> Iterator[str]:
    """The one list of what a LoRA adapter may not ask for, with the way out."""
    for field in _OTHER_METHODS:
        if config[field] not in (None, False):
            yield f"{field} makes another method of LoRA, which has no nested ranks: leave it out"
    init = str(config["init_lora_weights"])
    if init.startswith(_INITS):
        yield (
            f"init_lora_weights={init!r} assumes plain LoRA's scale, and may change the base model: use True or "
            "'gaussian'. An adapter that was trained with it becomes a plain one when PEFT saves it with "
            "path_initial_model_for_weight_conversion"
        )
    if config["lora_bias"]:
        yield "lora_bias=True adds a bias that belongs to no rank: set it to False"
    if config["layer_replication"]:
        yield "layer_replication is not supported: replicate the layers in the base model, then leave it out"
    if config["bias"] not in ("none", "all", "lora_only"):
        yield f"bias is {config['bias']!r}; write 'none', 'all' or 'lora_only'"
    if config["ensure_weight_tying"]:
        yield "ensure_weight_tying shares factors between layers, which cannot be reordered: turn it off"
    if any(str(key).removeprefix(r".*\.") in config.target_parameters for key in config["rank_pattern"] or ()):
        yield (
            "PEFT takes 'all-linear', and names such as gate_proj, up_proj and w1, for this model's routed experts, "
            "which transformers 5 has stacked, and gives some of them twice the rank. Name the other layers in "
            "target_modules, as in ['q_proj', 'v_proj'], and the experts in target_parameters, as in "
            "['experts.gate_up_proj']"
        )
    if config["target_parameters"] and (config["rank_pattern"] or config["alpha_pattern"]):
        yield (
            "target_parameters with ranks or scales of their own are not supported: leave rank_pattern and "
            "alpha_pattern out"
        )


def _is_slow(pattern: str) -> bool:
    """Whether a regular expression could take for ever: a repetition of repetitions or alternatives, or too many.

    Alternatives at the top are tried one after the other, so that their times add up. Within one, they multiply.
    """
    plain = _LETTER.sub("x", pattern)
    alternatives, groups = [0.0], list[int]()  # repetitions in each; in a group, what makes its own repetition slow
    for before, sign, after in zip(f"({plain}", plain, f"{plain}x"[1:], strict=False):
        repeats = sign in "*+{" or (sign == "?" and before not in "(*+?}")
        inside = 0
        if sign == "(":
            groups.append(0)
        elif sign == ")" and groups:
            inside = groups.pop()
            if inside and after in "*+{":
                return True
        elif sign == "|" and not groups:
            alternatives.append(0)
        alternatives[-1] += repeats / 4 if sign == "?" else repeats  # four optional parts are 16 ways
        if groups:
            groups[-1] += inside + (repeats or sign == "|")
    most, most_together = _MOST_REPETITIONS
    many = max(alternatives) > most or sum(alternatives) > most_together
    return many or len(pattern) > 1000 or bool(_COMMENT.search(pattern))


def _patterns(config: AdapterConfig) -> Iterator[str]:
    """What PEFT takes as regular expressions."""
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(config[field], str):
            yield config[field]
    for field in ("rank_pattern", "alpha_pattern"):
        yield from (key for key in config[field] or () if isinstance(key, str))
