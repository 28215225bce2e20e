"""Describe LoRA files without their base models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.open import find_loras, open_lora
from matryoshka_lora.linalg.allocation import LayerSpectrum, rank_for_share
from matryoshka_lora.linalg.factors import relative_errors
from matryoshka_lora.lora.contents import (
    PartInfo,
    layers_by_kind,
    layers_by_part,
    modules_by_kind,
)
from matryoshka_lora.lora.keys import find_models
from matryoshka_lora.lora.layer import Layer
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.progress import progress_bar, single_threaded

_BASE_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_MAX_TAGS = 5


@dataclass(frozen=True)
class LayerInfo:
    """The update of a layer.

    Attributes:
        rank: Its rank.
        rank_95: The smallest rank that keeps 95 % of the squared singular values.
        rank_99: The smallest rank that keeps 99 %.
        stable_rank: The squared Frobenius norm over the squared spectral norm: at least 1, and
            much smaller than the rank if few components dominate.
        largest_singular_value: The spectral norm; of a stack of experts, of the largest one.
    """

    rank: int
    rank_95: int
    rank_99: int
    stable_rank: float
    largest_singular_value: float


@dataclass(frozen=True)
class LoraInfo:
    """The result of `info`.

    Attributes:
        lora: The opened file: its layers, ranks, order and other tensors.
        sizes: The size in bytes of the weights file that `export` writes at each nested rank.
        errors: The relative error of each available rank: the norm of what it misses over the norm
            of the update.
        layers: The update of each layer by its name, if requested.
        base_model: The base model that the config or the metadata names.
        trigger_words: The trigger words in the metadata, or else the most frequent tags of the
            training images.
    """

    lora: Lora
    sizes: dict[int, int]
    errors: dict[int, float]
    layers: dict[str, LayerInfo]
    base_model: str | None
    trigger_words: tuple[str, ...]

    @property
    def likely_models(self) -> list[str]:
        """The image and video models that have the layers of a single file."""
        if self.lora.container == "peft":
            return []
        return [model.name for model in find_models([layer.name for layer in self.lora.layers])]

    @property
    def layers_by_kind(self) -> dict[str, int]:
        """The number of layers of each kind, such as ``"LoRA"``; see `layers_by_kind`."""
        return layers_by_kind(self.lora.layers)

    @property
    def parts(self) -> dict[str, PartInfo]:
        """The number of layers of each part of a pipeline; see `layers_by_part`."""
        return layers_by_part(self.lora.layers)

    @property
    def other_kinds(self) -> dict[str, int]:
        """The number of modules with other tensors by kind; see `modules_by_kind`."""
        return modules_by_kind(self.lora.other_tensors)

    @property
    def alphas(self) -> list[float]:
        """The alpha of each layer: its scale times its rank."""
        return [layer.scale * layer.rank for layer in self.lora.layers]

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the factors."""
        return sorted({str(layer.dtype) for layer in self.lora.layers})

    def rank_for_error(self, max_error: float) -> int:
        """Return the smallest rank whose relative error is at most a maximum, or else R."""
        for rank, error in self.errors.items():
            if error <= max_error:
                return rank
        return self.lora.max_rank

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can represent."""
        lora = self.lora
        scales = [layer.scale for layer in lora.layers]
        return {
            "name": lora.name,
            "kind": lora.container,
            "base_model": self.base_model,
            "likely_models": self.likely_models,
            "trigger_words": list(self.trigger_words),
            "bytes": lora.size,
            "dtypes": self.dtypes,
            "rank": lora.max_rank,
            "layers_by_rank": dict(sorted(Counter(layer.rank for layer in lora.layers).items())),
            "alphas": [min(self.alphas), max(self.alphas)],
            "scales": [min(scales), max(scales)],
            "nested_ranks": list(lora.nesting.ranks) if lora.nesting else None,
            "order": lora.order,
            "deploy": lora.deploy,
            "num_layers": len(lora.layers),
            "layers_by_kind": self.layers_by_kind,
            "parts": {name: vars(part) for name, part in self.parts.items()},
            "other_kinds": self.other_kinds,
            "other_tensors": sorted(lora.other_tensors),
            "bytes_by_rank": self.sizes,
            "errors_by_rank": self.errors,
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
        }


@dataclass(frozen=True)
class FolderInfo:
    """The result of `info_folder`.

    Attributes:
        loras: The `LoraInfo` of each LoRA by the name of its folder or file.
        failed: Why the others could not be read, by name.
    """

    loras: dict[str, LoraInfo]
    failed: dict[str, str]

    def common_rank(self, max_error: float) -> int:
        """Return the smallest rank at which every LoRA has at most a relative error."""
        return max(lora.rank_for_error(max_error) for lora in self.loras.values())


def info(source: Lora | PathLike, *, layers: bool = False, revision: str | None = None) -> LoraInfo:
    """Return the contents of a LoRA, and the size and error of each rank.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA.
        layers: Whether to describe each layer.
        revision: Branch, tag or commit on the Hugging Face Hub.

    Raises:
        MatryoshkaError: The path is not a LoRA, is damaged, or cannot be truncated.
        NotFiniteError: A factor is NaN or infinite.
    """
    lora = source if isinstance(source, Lora) else open_lora(source, revision=revision)
    layer_infos: dict[str, LayerInfo] = {}
    squared_errors = lora.squared_errors()
    if layers:
        with single_threaded():
            for layer in progress_bar(lora.layers, "singular values"):
                layer_infos[layer.name] = _layer_info(layer)
    base_model = lora.config.get("base_model_name_or_path")
    if lora.container == "single":
        names = [lora.metadata[key] for key in _BASE_MODEL_KEYS if lora.metadata.get(key)]
        base_model = names[0] if names else None
    return LoraInfo(
        lora,
        sizes={rank: lora.truncate(rank).file_size for rank in lora.nested_ranks},
        errors=relative_errors(squared_errors, lora.available_ranks),
        layers=layer_infos,
        base_model=base_model,
        trigger_words=_trigger_words(lora.metadata),
    )


def info_folder(folder: PathLike, *, layers: bool = False) -> FolderInfo:
    """Return the contents of each LoRA in a folder; see `info`.

    Args:
        folder: A folder of PEFT folders and single files.
        layers: Whether to describe each layer.

    Raises:
        MatryoshkaError: The folder contains no LoRA that can be read.
    """
    loras: dict[str, LoraInfo] = {}
    failed: dict[str, str] = {}
    for path in tqdm(find_loras(folder), "reading", leave=False, unit=" LoRAs", disable=None):
        try:
            loras[path.name] = info(path, layers=layers)
        except MatryoshkaError as error:
            failed[path.name] = str(error)
    if not loras:
        reasons = "".join(f" {name}: {reason}" for name, reason in list(failed.items())[:1])
        raise MatryoshkaError(f"{folder} contains no LoRA that can be read.{reasons}")
    return FolderInfo(loras, failed)


def _layer_info(layer: Layer) -> LayerInfo:
    values = layer.singular_values()
    squares = LayerSpectrum(values, layer.parameters_per_rank, layer.rank).squares
    return LayerInfo(
        rank=layer.rank,
        rank_95=rank_for_share(values, 0.95),
        rank_99=rank_for_share(values, 0.99),
        stable_rank=sum(squares) / squares[0] if squares[0] else 0.0,
        largest_singular_value=float(values.max()),
    )


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words of modelspec's metadata, or the most frequent tags of kohya's."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return (phrase,)
    tags: Counter[str] = Counter()
    # Any tool may have written the metadata.
    with suppress(ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        for tags_of_folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            tags.update({tag.strip(): int(count) for tag, count in tags_of_folder.items()})
    return tuple(tag for tag, _ in tags.most_common(_MAX_TAGS))
