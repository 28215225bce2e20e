"""LoRA in PEFT's format: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.lora_file.atomic import PathLike, create_folder
from matryoshka_lora.lora_file.hub import CARD_NAME, copy_companion_files
from matryoshka_lora.lora_file.keys.names import PEFT_PREFIX
from matryoshka_lora.lora_file.lora import (
    NESTING_KEY,
    Layer,
    LoraFile,
    OutputPlan,
    Ranks,
    WrittenOutput,
)
from matryoshka_lora.lora_file.model_card import model_card
from matryoshka_lora.lora_file.safetensors_io import (
    StoredTensor,
    are_factors,
    open_safetensors,
    read_json,
)
from matryoshka_lora.lora_file.source_card import (
    copy_license_files,
    read_source_card,
)
from matryoshka_lora.nesting import Nesting, check_rank, is_valid_scale

TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""The fields of PEFT's config that select the layers."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_FACTOR_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
# Valid (order, deploy) pairs.
_ORDERS = (("svd", "reordered"), ("trained", "reordered"), (None, "paper"))
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


@dataclass(frozen=True)
class PeftFolder(LoraFile):
    """A LoRA in PEFT's format, in a folder or in memory.

    Attributes:
        config: The content of ``adapter_config.json``.
    """

    config: dict[str, Any] = field(kw_only=True)

    @property
    def sources(self) -> tuple[PathLike, ...]:
        """The paths that an output must not overwrite: weights, configs and the base model."""
        configs = [file.with_name(CONFIG_NAME) for file in self.files]
        base_model = self.config.get("base_model_name_or_path")
        base_models = [str(base_model)] if base_model else []
        return (*self.files, *configs, *base_models)

    def plan(self, ranks: Ranks) -> OutputPlan:
        """Return what an ordinary adapter at some ranks will hold; see `LoraFile.plan`.

        Raises:
            MatryoshkaError: The rank is not available, or the layers cannot have different ranks.
        """
        return self._plan(self.ranks_by_layer(ranks), {})

    def plan_unchanged(self) -> OutputPlan:
        """Return what an ordinary adapter will hold whose factors are only rescaled."""
        ranks = {layer.name: layer.rank for layer in self.layers}
        return self._plan(ranks, {}, keep_factors=True)

    def plan_nested(self) -> OutputPlan:
        """Return what a nested adapter will hold, which PEFT alone reads as its largest rank.

        Factors without an order are reordered. Every layer is padded to the largest nested rank.
        """
        order = self.order or "svd"
        nesting = {
            "ranks": self.ranks,
            "scaling": self.nesting.scaling if self.nesting else "none",
            "order": None if self.deploy == "paper" else order,
            "deploy": self.deploy,
            # A placeholder of equal length; the plan writes the real one.
            "checksum": Checksum().hexdigest(),
        }
        max_rank = self.ranks[-1]
        ranks_by_layer = {layer.name: max_rank for layer in self.layers}
        return self._plan(ranks_by_layer, {NESTING_KEY: json.dumps(nesting)})

    def _plan(
        self, ranks: Mapping[str, int], metadata: dict[str, str], keep_factors: bool = False
    ) -> OutputPlan:
        is_paper = self.deploy == "paper"
        has_experts = any(layer.num_experts > 1 for layer in self.layers)
        if (is_paper or has_experts) and len(set(ranks.values())) > 1:
            reason = "The paper's deployment" if is_paper else "target_parameters"
            raise MatryoshkaError(
                f"{self.name}: {reason} requires one rank for all layers. Pass `rank` alone."
            )
        # The output has a single scale.
        scale = self.nesting.scale if self.nesting else self.output_scale
        if self.order is not None or is_paper or keep_factors:
            scale = self.scale_at(self.layers[0], max(ranks.values()))
        layers = tuple((layer, layer.with_rank(ranks[layer.name], scale)) for layer in self.layers)
        metadata = {"format": "pt", **metadata}
        return OutputPlan(self, layers, self.other_tensors, metadata, keep_factors)

    def write_output(self, plan: OutputPlan, output: PathLike, force: bool) -> WrittenOutput:
        """Write a plan as a folder, with a model card and the companion files of this folder."""
        with create_folder(output, force, self.sources) as folder:
            config = self._output_config(plan)
            config_text = json.dumps(config, indent=2, sort_keys=True)
            (folder / CONFIG_NAME).write_text(config_text, encoding="utf-8")
            written = plan.write_weights(folder / WEIGHTS_NAME)
            source_folders = self._source_folders()
            cards = [read_source_card(source) for source in source_folders]
            card = model_card(plan, config, written.relative_errors(self.ranks), cards)
            # A path that is not UTF-8 has lone surrogates, which UTF-8 cannot represent.
            (folder / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
            if source_folders:
                copy_companion_files(source_folders[0], folder)
            copy_license_files(source_folders, folder)
        return written

    def _output_config(self, plan: OutputPlan) -> dict[str, Any]:
        max_rank = plan.rank
        scale = plan.layers[0][1].scale
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        for name, rank in plan.ranks.items():
            if rank != max_rank:
                # PEFT matches patterns at the end of names: `fc` would match `sub.fc` too.
                pattern = f"^{re.escape(name)}"
                rank_pattern[pattern] = rank
                alpha_pattern[pattern] = scale * rank
        return {
            **self.config,
            "r": max_rank,
            "lora_alpha": scale * max_rank,
            # Some runtimes ignore use_rslora, so lora_alpha has the scale.
            "use_rslora": False,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _source_folders(self) -> list[Path]:
        """Return the folders of the sources; several for a sum, none for an adapter in memory."""
        folders = [file.parent for file in self.files]
        # The files in a folder that is not PEFT's may belong to anything.
        return [folder for folder in folders if (folder / CONFIG_NAME).is_file()]

    def base_model(
        self, base_model: str | None = None, base_revision: str | None = None
    ) -> tuple[str, str | None]:
        """Return the base model and its revision.

        Args:
            base_model: A folder or Hub id. Defaults to the one that the config names.
            base_revision: Its revision on the Hub. Defaults to the one that the config names, if
                ``base_model`` is None too.

        Raises:
            MatryoshkaError: The config names no base model, or one that is not a causal LM.
        """
        name = base_model or self.config.get("base_model_name_or_path")
        if not name:
            raise MatryoshkaError(f"{self.name} does not name its base model. Pass `base_model`.")
        task_type = self.config.get("task_type") or "CAUSAL_LM"
        if task_type != "CAUSAL_LM":
            raise MatryoshkaError(
                f"{self.name} has task_type={task_type!r:.80}, but base models are loaded as "
                "CAUSAL_LM. Use an operation that needs no base model, such as reorder, or export "
                "as a PEFT folder."
            )
        revision = base_revision
        if revision is None and base_model is None:
            revision = self.config.get("revision")
        return str(name), revision


def open_peft_folder(path: PathLike, name: str | None = None) -> PeftFolder:
    """Open a folder that PEFT has saved.

    Nesting metadata is ignored, with a warning, unless the checksum matches.

    Args:
        path: The folder.
        name: The name in messages. Defaults to the path.

    Raises:
        MatryoshkaError: The folder is not a LoRA, is damaged, or is a variant that cannot be
            truncated.
    """
    folder = Path(path)
    name = name or str(path)
    if not (folder / CONFIG_NAME).is_file():
        raise _missing_config_error(folder, name)
    weights_file = folder / WEIGHTS_NAME
    if not weights_file.exists():
        raise MatryoshkaError(
            f"{name} has no {WEIGHTS_NAME}. An adapter_model.bin is a pickle and may execute code. "
            "Save it again as safetensors."
        )
    config = read_json(folder / CONFIG_NAME)
    tensors, metadata = open_safetensors(weights_file)
    layers, other_tensors = find_layers(tensors, config, name)
    lora = PeftFolder(name, layers, other_tensors, metadata, (weights_file,), config=config)
    return _read_nesting(lora)


def _missing_config_error(folder: Path, name: str) -> MatryoshkaError:
    hint = "Pass the folder that PEFT has saved: its config holds the scale."
    loras = [file.parent for file in folder.glob(f"*/{CONFIG_NAME}")]
    loras += folder.glob("*.safetensors")
    if (folder / "config.json").is_file():
        hint = "It is a full model. Extract a LoRA from it first."
    elif loras and not (folder / WEIGHTS_NAME).exists():
        hint = f"Pass one of the LoRAs in it, such as {min(loras)}."
    return MatryoshkaError(f"{name} has no {CONFIG_NAME}. {hint}")


def _read_nesting(lora: PeftFolder) -> PeftFolder:
    """Return a LoRA with the nesting in its metadata, if that still describes its factors."""
    if NESTING_KEY not in lora.metadata:
        return lora
    scale = lora.layers[0].scale
    try:
        saved = json.loads(lora.metadata[NESTING_KEY])
        nesting = Nesting(tuple(saved["ranks"]), saved["scaling"], scale)
        order, deploy, checksum = saved["order"], saved["deploy"], saved["checksum"]
        is_valid = (order, deploy) in _ORDERS
    except (KeyError, ValueError, TypeError, RecursionError):
        is_valid = False
    if not is_valid:
        _warn_not_nested(lora, "the nesting in the metadata is damaged")
        return lora
    if not _matches_record(lora, nesting, checksum):
        _warn_not_nested(lora, "the factors have changed since their nesting was recorded")
        return lora
    return replace(lora, nesting=nesting, order=order, deploy=deploy)


def _warn_not_nested(lora: LoraFile, reason: str) -> None:
    warnings.warn(
        f"{lora.name}: {reason}, so it is read as plain LoRA. Ranks that were trained are lost.",
        stacklevel=2,
    )


def _matches_record(lora: LoraFile, nesting: Nesting, expected_checksum: str) -> bool:
    """Return whether the factors are those that a nesting was recorded for."""
    for layer in lora.layers:
        if (layer.rank, layer.scale) != (nesting.max_rank, nesting.scale):
            return False
    checksum = Checksum()
    for layer in lora.layers:
        checksum.update(layer.A.read(), layer.B.read())
    return checksum.hexdigest() == expected_checksum


def check_plain_lora(config: Mapping[str, Any], name: str) -> None:
    """Reject adapters that are not LoRA, or whose update is not ``s B A``.

    Args:
        config: PEFT's LoraConfig as a dictionary.
        name: The adapter's name in messages.

    Raises:
        MatryoshkaError: The adapter is not supported.
    """
    if config.get("peft_type") != "LORA":
        raise MatryoshkaError(
            f"{name} has peft_type={config.get('peft_type')!r:.80}, which is not supported. PEFT's "
            "save_as_lora converts many types to LoRA."
        )
    for option, variant in _UNSUPPORTED_VARIANTS.items():
        if config.get(option):
            raise MatryoshkaError(f"{name}: {variant} is not supported ({option} is set).")
    initialization = str(config.get("init_lora_weights")).lower()  # PEFT ignores the case too
    if initialization.startswith(_UNSUPPORTED_INITIALIZATIONS):
        raise MatryoshkaError(
            f"{name} has init_lora_weights={initialization!r:.80}, with which PEFT changes the "
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


def find_layers(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], name: str
) -> tuple[tuple[Layer, ...], dict[str, StoredTensor]]:
    """Return the layers of an adapter, sorted by name, and the tensors that are not factors.

    Args:
        tensors: The tensors of the file by key, or PEFT's state dict of the adapter.
        config: PEFT's LoraConfig as a dictionary.
        name: The adapter's name in messages.

    Raises:
        MatryoshkaError: The adapter cannot be truncated, or its tensors do not fit its config.
    """
    check_plain_lora(config, name)
    layers: list[Layer] = []
    other_tensors = {key: tensors[key] for key in sorted(tensors)}
    for key in tensors:
        for suffix_A, suffix_B in _FACTOR_SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                layer = _make_layer(tensors, module, key, module + suffix_B, config, name)
                layers.append(layer)
                del other_tensors[layer.key_A], other_tensors[layer.key_B]
    for key in other_tensors:
        if ".lora_" in key:
            raise MatryoshkaError(
                f"{name}: the tensor {key[:200]} is unknown, or its matching A or B is missing. "
                "Copy the adapter or save it again."
            )
    if not layers:
        raise MatryoshkaError(f"{name} has no LoRA factors. Copy the adapter or save it again.")
    layers.sort(key=lambda layer: layer.name)
    return tuple(layers), other_tensors


def _make_layer(
    tensors: Mapping[str, StoredTensor],
    module: str,
    key_A: str,
    key_B: str,
    config: Mapping[str, Any],
    name: str,
) -> Layer:
    layer_name = module.removeprefix(PEFT_PREFIX)
    rank, scale = rank_and_scale(config, layer_name, name)
    if key_B not in tensors:
        raise MatryoshkaError(f"{name} lacks the tensor {key_B[:200]}. Save the adapter again.")
    A, B = tensors[key_A], tensors[key_B]
    if are_factors(A, B):
        num_rows = A.shape[0]
        # The parameters of n experts are one factor of n * rank rows.
        num_experts = num_rows // rank if config.get("target_parameters") else 1
        if num_rows == num_experts * rank:
            return Layer(layer_name, key_A, key_B, A, B, rank, scale, num_experts)
    raise MatryoshkaError(
        f"{name}: the factors of {layer_name[:200]} do not fit each other, or do not have rank "
        f"{rank}, as the config says. Save the adapter again."
    )


def rank_and_scale(config: Mapping[str, Any], layer_name: str, name: str) -> tuple[int, float]:
    """Return the rank and the scale of a layer according to PEFT's LoraConfig.

    Args:
        config: The LoraConfig as a dictionary.
        layer_name: The module's name in the base model.
        name: The adapter's name in messages.

    Raises:
        MatryoshkaError: They are not positive, or a pattern is not a regular expression.
    """
    try:
        rank = check_rank(_layer_value(config, "r", "rank_pattern", layer_name))
        alpha = _layer_value(config, "lora_alpha", "alpha_pattern", layer_name)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        is_valid = is_valid_scale(scale)
    except (
        regex.error,
        TimeoutError,
        RecursionError,
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):
        is_valid = False
    if not is_valid:
        raise MatryoshkaError(
            f"{name}: the rank and alpha of {layer_name[:200]} must be positive numbers, and their "
            "patterns regular expressions. Save the adapter again."
        )
    return rank, scale


def _layer_value(
    config: Mapping[str, Any], default_field: str, pattern_field: str, layer_name: str
) -> Any:
    """Return the value of the first pattern that matches a layer, as PEFT does, or the default."""
    for pattern, value in (config.get(pattern_field) or {}).items():
        # PEFT matches a pattern at the end of a name, after a dot. Unlike re, regex has a timeout:
        # matching a hostile pattern would not end.
        if regex.match(rf"(.*\.)?({pattern})$", layer_name, timeout=1):
            return value
    return config[default_field]
