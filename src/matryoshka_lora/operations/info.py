"""Describe LoRA files without their base models."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.open import find_loras, open_lora
from matryoshka_lora.linalg.allocation import LayerSpectrum, rank_for_share
from matryoshka_lora.linalg.factors import relative_errors
from matryoshka_lora.lora.contents import modules_by_kind
from matryoshka_lora.lora.convert import part_of_pipeline
from matryoshka_lora.lora.keys import PEFT_PREFIX, find_models, split_part
from matryoshka_lora.lora.layer import Layer
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.operations.server_plan import ServerPlan, plan_server
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.registry import FORMATS, PICTURES_CAVEAT, caveat_of
from matryoshka_lora.text import (
    LARGE_ERROR,
    format_errors,
    format_percent,
    format_range,
    format_table,
    join_lines,
    mark_large_errors,
    with_name,
)
from matryoshka_lora.units import format_size, parse_share, pluralize

_BASE_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_MAX_TAGS = 5
# kohya's and OneTrainer's names of parts; a text encoder may have a number.
_KOHYA_PART = re.compile(r"(?:lora|lycoris)_(?P<part>unet|transformer|prior|te)(?P<number>\d?)_")


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
        weighted_errors: The weighted error of each rank, if examples have weighted the order: the
            root of the share of the squared weighted values that the rank leaves out.
        max_error: The error whose rank is shown, if requested.
    """

    lora: Lora
    sizes: dict[int, int]
    errors: dict[int, float]
    layers: dict[str, LayerInfo]
    base_model: str | None
    trigger_words: tuple[str, ...]
    weighted_errors: dict[int, float] = field(default_factory=dict)
    max_error: float | None = None

    def __repr__(self) -> str:
        """Return the contents, and a table of the ranks, as `matryoshka info` prints them."""
        lora = self.lora
        models = " or ".join(self.likely_models)
        likely = f"not named; the layers are of {models}" if models else "not named"
        parts = ", ".join(f"{name} {number}".strip() for name, number in self.parts.items())
        if len(self.parts) > 1:
            parts = f"{len(lora.layers)}: {parts}"
        rows = {
            "base model": self.base_model or likely,
            "triggers": ", ".join(self.trigger_words),
            "layers": f"{parts}, such as {lora.layers[0].name}",
            "rank": _by_layer(lora.ranks.values()),
            "alpha": _by_layer(self.alphas),
            "scale": _by_layer([layer.scale for layer in lora.layers]),
            "file": f"{format_size(lora.size)}, {', '.join(self.dtypes)}",
        }
        if any(layer.kind != "LoRA" for layer in lora.layers):
            counts = self.layers_by_kind.items()
            rows["kinds"] = ", ".join(f"{kind} {number}" for kind, number in counts)
        if lora.original_error > 0:
            error = format_percent(lora.original_error)
            rows["error"] = f"relative error {error} against the original"
        if lora.other_tensors:
            size = format_size(sum(tensor.nbytes for tensor in lora.other_tensors.values()))
            counts = self.other_kinds.items()
            kinds = ", ".join(f"{kind} {number}" for kind, number in counts)
            rows["other"] = f"{kinds}: {size} at every rank, such as {min(lora.other_tensors)}"
        lines = [f"{lora.name} is {_kind_of(lora)}."]
        lines += [f"  {label:10}  {value}" for label, value in rows.items() if value]
        if self.layers:
            lines += ["", *_format_layers(self.layers)]
        errors = {rank: self.errors[rank] for rank in lora.nested_ranks}
        trained_ranks = range(1, lora.small_rank + 1)
        lines += [
            "",
            *format_errors(errors, "update", self.sizes, trained_ranks, self.weighted_errors),
        ]
        if not lora.can_choose_ranks:
            lines.append(
                "  The components are not ordered by singular values, so `export` takes a `rank`, "
                "and no `error`, `keep` or `max_bytes`."
            )
        is_for_images = part_of_pipeline(lora) is not None
        lines.append(PICTURES_CAVEAT if is_for_images else FORMATS[lora.container].caveat)
        if self.max_error is not None:
            rank = self.rank_for_error(self.max_error)
            error = f"{100 * self.max_error:.4g}%"
            kind = "weighted" if self.weighted_errors else "relative"
            lines.append(f"Rank {rank} has a {kind} error of at most {error}.")
        return join_lines(lines)

    @property
    def likely_models(self) -> list[str]:
        """The image and video models that have the layers of a single file."""
        if self.lora.container == "peft":
            return []
        return [
            model.name
            for model in find_models(
                [layer.name for layer in self.lora.layers], self.lora.weight_shapes
            )
        ]

    @property
    def layers_by_kind(self) -> dict[str, int]:
        """The number of layers of each kind: ``"LoRA"``, ``"LoHa"`` or ``"LoKr"``."""
        return dict(Counter(layer.kind for layer in self.lora.layers))

    @property
    def parts(self) -> dict[str, int]:
        """The number of layers of each part of a pipeline; ``""`` is the part of other names.

        The parts have the names of diffusers, or ``diffusion_model``, as in the names of a model's
        authors. kohya's files call a transformer ``unet`` too.
        """
        return dict(sorted(Counter(_part_of(layer.name) for layer in self.lora.layers).items()))

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
        """Return the smallest rank whose error is at most a maximum, or else R.

        It is the weighted error, if examples have weighted the order.
        """
        for rank, error in (self.weighted_errors or self.errors).items():
            if error <= max_error:
                return rank
        return self.lora.max_rank

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can represent."""
        lora = self.lora
        scales = [layer.scale for layer in lora.layers]
        values = {
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
            "small_rank": lora.small_rank,
            "deploy": lora.deploy,
            "original_error": lora.original_error,
            "num_layers": len(lora.layers),
            "layers_by_kind": self.layers_by_kind,
            "parts": self.parts,
            "other_kinds": self.other_kinds,
            "other_tensors": sorted(lora.other_tensors),
            "bytes_by_rank": self.sizes,
            "errors_by_rank": self.errors,
            "weighted_errors_by_rank": self.weighted_errors,
            "layers": {name: vars(layer) for name, layer in self.layers.items()},
        }
        if self.max_error is not None:
            values["max_error"] = self.max_error
            values["rank_for_error"] = self.rank_for_error(self.max_error)
        return values


@dataclass(frozen=True)
class FolderInfo:
    """The result of `info_folder`.

    Attributes:
        loras: The `LoraInfo` of each LoRA by the name of its folder or file.
        failed: Why the others could not be read, by name.
        max_error: The relative error whose ranks are shown.
    """

    loras: dict[str, LoraInfo]
    failed: dict[str, str]
    max_error: float = 0.1

    def __repr__(self) -> str:
        """Return a table of the LoRAs and a plan for a server, as `matryoshka info` prints them."""
        limit = f"{100 * self.max_error:.4g}%"
        loras = [info.lora for info in self.loras.values()]
        errors = mark_large_errors([lora.original_error for lora in loras])
        plan = self.plan
        columns = {
            "rank": [str(lora.max_rank) for lora in loras],
            "layers": [str(len(lora.layers)) for lora in loras],
            "size": [format_size(lora.size) for lora in loras],
            "error": errors,
            f"rank for {limit}": [str(rank) for rank in self.ranks.values()],
            "for vLLM": [str(plan.ranks.get(name, "")) if plan else "" for name in self.loras],
            "base model": [info.base_model or "" for info in self.loras.values()],
            "name": list(self.loras),
        }
        are_truncated = any(lora.original_error > 0 for lora in loras)
        if not are_truncated:
            del columns["error"]
        rows = zip(*([name, *cells] for name, cells in columns.items() if any(cells)), strict=True)
        lines = format_table(list(rows), left_aligned=2 if any(columns["base model"]) else 1)
        if are_truncated:
            lines.append("  error: against the original, which the file was truncated from")
        if any("*" in error for error in errors):
            lines.append(f"  {LARGE_ERROR}")
        lines += [f"Not read: {with_name(name, why)}" for name, why in self.failed.items()]
        weighted = [name for name, info in self.loras.items() if info.weighted_errors]
        if weighted:
            lines.append(f"The error of {', '.join(weighted)} is a weighted error.")
        total_size = format_size(sum(lora.size for lora in loras))
        lines.append(
            f"{pluralize(len(loras), 'LoRA')}, {total_size}. At rank "
            f"{self.common_rank(self.max_error)}, each has a relative error of at most {limit} "
            "against its file."
        )
        lines += plan.to_lines() if plan else []
        return join_lines([*lines, caveat_of(lora.container for lora in loras)])

    @property
    def ranks(self) -> dict[str, int]:
        """The smallest rank at which each LoRA has at most the error `max_error`, by name."""
        return {name: info.rank_for_error(self.max_error) for name, info in self.loras.items()}

    @property
    def plan(self) -> ServerPlan | None:
        """The plan of a server of vLLM, or None if it can serve none of the LoRAs."""
        return plan_server({name: info.lora for name, info in self.loras.items()}, self.ranks)

    def common_rank(self, max_error: float) -> int:
        """Return the smallest rank at which every LoRA has at most a relative error."""
        return max(lora.rank_for_error(max_error) for lora in self.loras.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can represent."""
        return {
            "loras": {name: info.to_dict() for name, info in self.loras.items()},
            "failed": self.failed,
            "max_error": self.max_error,
            "rank_for_error": self.common_rank(self.max_error),
            "server_plan": self.plan and vars(self.plan),
        }


def info(
    source: Lora | PathLike,
    *,
    layers: bool = False,
    error: float | str | None = None,
    revision: str | None = None,
) -> LoraInfo:
    """Return the contents of a LoRA, and the size and error of each rank.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA.
        layers: Whether to describe each layer.
        error: A relative error, such as ``"10%"``, whose rank is shown; a weighted error, if
            examples have weighted the order.
        revision: Branch, tag or commit on the Hugging Face Hub.

    Raises:
        MatryoshkaError: The path is not a LoRA, is damaged, or cannot be truncated.
        NotFiniteError: A factor is NaN or infinite.
    """
    max_error = None if error is None else parse_share(error)
    lora = source if isinstance(source, Lora) else open_lora(source, revision=revision)
    layer_infos: dict[str, LayerInfo] = {}
    squared_errors, weighted_errors = lora.squared_errors(), lora.weighted_squared_errors()
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
        weighted_errors=relative_errors(
            weighted_errors, lora.available_ranks if weighted_errors else ()
        ),
        max_error=max_error,
    )


def info_folder(
    folder: PathLike, *, layers: bool = False, error: float | str = "10%"
) -> FolderInfo:
    """Return the contents of each LoRA in a folder; see `info`.

    Args:
        folder: A folder of PEFT folders and single files.
        layers: Whether to describe each layer.
        error: The relative error whose ranks are shown.

    Raises:
        MatryoshkaError: The folder contains no LoRA that can be read.
    """
    max_error = parse_share(error)
    loras: dict[str, LoraInfo] = {}
    failed: dict[str, str] = {}
    for path in tqdm(find_loras(folder), "reading", leave=False, unit=" LoRAs", disable=None):
        try:
            loras[path.name] = info(path, layers=layers, error=max_error)
        except MatryoshkaError as failure:
            failed[path.name] = str(failure)
    if not loras:
        reasons = "".join(f" {with_name(name, why)}" for name, why in list(failed.items())[:1])
        raise MatryoshkaError(f"{folder} contains no LoRA that can be read.{reasons}")
    return FolderInfo(loras, failed, max_error)


def _kind_of(lora: Lora) -> str:
    ranks = ", ".join(map(str, lora.nested_ranks))
    if lora.container == "single":
        order = ", reordered by weighted SVD" if lora.order == "weighted" else ""
        return f"a LoRA in a single file{order}"
    if lora.deploy == "paper":
        return f"a nested LoRA adapter in the paper's deployment, usable at ranks {ranks} only"
    if lora.order is None:
        return "a LoRA adapter without an order; `matryoshka reorder` makes it nested"
    order = "reordered by weighted SVD" if lora.order == "weighted" else "reordered by SVD"
    if lora.small is not None:
        order += f", ranks up to {lora.small_rank} trained"
    return f"a nested LoRA adapter ({order}), usable at every rank (nested: {ranks})"


def _by_layer(values: Iterable[float]) -> str:
    text = format_range(values)
    return f"{text}, depending on the layer" if " to " in text else text


def _part_of(name: str) -> str:
    match = _KOHYA_PART.match(name)
    if match is None:
        return split_part(name.removeprefix(PEFT_PREFIX))[0]
    if match["part"] != "te":
        return match["part"]
    is_first = match["number"] in ("", "1")
    return "text_encoder" if is_first else f"text_encoder_{match['number']}"


def _format_layers(layers: Mapping[str, LayerInfo]) -> list[str]:
    rows = [["rank", "95%", "99%", "stable rank", "norm", "layer"]]
    for name, layer in layers.items():
        numbers = [str(layer.rank), str(layer.rank_95), str(layer.rank_99)]
        numbers += [f"{layer.stable_rank:.1f}", f"{layer.largest_singular_value:.3g}"]
        rows.append([*numbers, name])
    return [
        *format_table(rows, left_aligned=1),
        "  95%, 99%: the rank that keeps this share of the squared singular values",
        "  stable rank: the squared norm over the largest squared singular value",
        "  norm: the largest singular value",
    ]


def _layer_info(layer: Layer) -> LayerInfo:
    values = layer.singular_values()
    squares = LayerSpectrum(values, layer.parameters_per_rank, layer.rank).squares
    return LayerInfo(
        rank=layer.rank,
        rank_95=rank_for_share(values, 0.95),
        rank_99=rank_for_share(values, 0.99),
        stable_rank=sum(squares) / squares[0] if squares[0] else 0.0,
        largest_singular_value=math.sqrt(squares[0]),
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
