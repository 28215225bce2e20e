"""Extract a LoRA from a fine-tuned model: the closest LoRA to the change from fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list
from matryoshka_lora.extraction.factor_cache import ChangedLayers, file_state, resumable_folder
from matryoshka_lora.extraction.factorize import RankLimits
from matryoshka_lora.extraction.model_diff import (
    Architecture,
    ModelDiff,
    ModelFiles,
    compare_models,
    open_model,
    read_architecture,
    saved_tensors,
)
from matryoshka_lora.extraction.pipeline_names import (
    check_kohya_names,
    pipeline_prefixes,
    rename_for_pipeline,
)
from matryoshka_lora.formats import ImageKeyFormat
from matryoshka_lora.linalg.allocation import ranks_for_error, ranks_for_size
from matryoshka_lora.lora_file.atomic import PathLike, check_output
from matryoshka_lora.lora_file.hub import MODEL_FILES, local_path, split_hub_id
from matryoshka_lora.lora_file.keys.formats import convert_keys
from matryoshka_lora.lora_file.keys.names import PEFT_PREFIX
from matryoshka_lora.lora_file.lora import NESTING_KEY, Layer, LoraFile, OutputPlan, WrittenOutput
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.operations.rank_choice import RankRequest, parse_request
from matryoshka_lora.units import pluralize

# The upper bound of a layer's rank if only the size of the file is limited.
_MAX_RANK_FOR_SIZE = 128


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` wrote.

    Attributes:
        path: The folder or file.
        ranks: The rank of each layer of the output by its name.
        errors: The relative error by rank: the norm of what it misses of the change of the layers
            over the norm of the change. Only a nested output has more than one rank.
        rounding_share: The share of the change's squared norm that comes from rounding the weights
            to their dtype.
        unsaved_tensors: The size in bytes of each tensor that changed and is not in the output, by
            its key.
        notes: What else the user should know, one sentence each.
    """

    path: Path
    ranks: dict[str, int]
    errors: dict[int, float]
    rounding_share: float
    unsaved_tensors: dict[str, int]
    notes: tuple[str, ...] = ()


def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    rank: int | None = None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
    modules_to_save: Iterable[str] = (),
    key_format: ImageKeyFormat | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    force: bool = False,
) -> ExtractResult:
    """Write the closest LoRA to the change from fine-tuning.

    The change D of each linear layer and convolution is factorized by a randomized SVD (Halko,
    Martinsson and Tropp, arXiv 0909.4061), and the error of the factors is measured. With a rank
    alone the output is nested. One layer is in memory at a time. The factors are kept in the folder
    ``.NAME.extracting`` next to the output until that is written: after an error or an
    interruption, the same call continues.

    Args:
        base: The model before: a folder or a safetensors file, or ``owner/name`` on the
            Hugging Face Hub.
        tuned: The model after.
        output: The folder to write; with a key format, the ``.safetensors`` file.
        rank: R. With ``keep``, ``error`` or ``max_bytes``, an upper bound of each layer's rank.
        keep: Give each layer the smallest rank that keeps this share of the squared norm of D,
            such as ``"90%"``.
        error: The maximum relative error over all layers, such as ``"10%"``: the norm of what the
            output misses over the norm of the change. The layers get the ranks that reach it with
            few parameters.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``.
        modules_to_save: Name suffixes of modules that are saved as they are, in PEFT's
            ``modules_to_save``.
        key_format: The keys of a file for image models. Defaults to a PEFT folder.
        base_revision: Branch, tag or commit of the base model on the Hub.
        tuned_revision: Branch, tag or commit of the tuned model on the Hub.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: A model cannot be read, they are not versions of one model, no layer
            changed, or the output already exists.
        NotFiniteError: A weight is NaN or infinite.
    """
    modules_to_save = check_list("modules_to_save", modules_to_save)
    request = _parse_request(rank, keep, error, max_bytes)
    _check_key_format(output, key_format, modules_to_save)
    base_model = open_model(local_path(base, MODEL_FILES, base_revision))
    tuned_model = open_model(local_path(tuned, MODEL_FILES, tuned_revision))
    files = [*base_model.files, *tuned_model.files]
    path = check_output(output, force, files, is_file=key_format is not None)

    prefixes: tuple[str, ...] = ("",)
    if key_format is not None:
        base_model, tuned_model = rename_for_pipeline(base_model, tuned_model)
        prefixes = pipeline_prefixes()
    architecture = read_architecture(base_model)
    diff = compare_models(base_model, tuned_model, architecture, modules_to_save, prefixes)
    if key_format == "kohya":
        check_kohya_names(diff.layers, base_model)
    saved = saved_tensors(diff, tuned_model, architecture, modules_to_save)
    limits = _rank_limits(request)
    with resumable_folder(path, _settings(files, request, limits, diff)) as cache:
        changed = _factorize(diff, request, limits, cache)
        lora: LoraFile
        if key_format is None:
            config = _peft_config(
                base, base_revision, base_model, architecture, changed.layers, saved
            )
            other_tensors = {PEFT_PREFIX + key: tensor for key, tensor in saved.items()}
            lora = PeftFolder(str(path), changed.layers, other_tensors, config=config)
        else:
            lora = _image_lora(str(path), changed.layers, key_format)
        plan = _plan_output(lora, request, changed)
        written = plan.write(path, force)

    measured_ranks = lora.ranks if NESTING_KEY in plan.metadata else (plan.rank,)
    errors = {r: _relative_error(plan, written, changed, r) for r in measured_ranks}
    unsaved = {key: tensor for key, tensor in diff.other_tensors.items() if key not in saved}
    return ExtractResult(
        path=path,
        ranks=plan.ranks,
        errors=errors,
        rounding_share=changed.rounding / changed.total,
        unsaved_tensors={key: tensor.nbytes for key, tensor in unsaved.items()},
        notes=_notes(request, plan.ranks, errors[plan.rank]),
    )


def _parse_request(
    rank: int | None, keep: float | str | None, error: float | str | None, max_bytes: Any
) -> RankRequest:
    """Return what the caller wants to keep."""
    if rank is not None:
        check_rank(rank)
    request = parse_request(rank, keep, error, max_bytes)
    if request.is_empty:
        raise MatryoshkaError("Pass at least one of `rank`, `keep`, `error` or `max_bytes`.")
    if keep is not None and error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    return request


def _rank_limits(request: RankRequest) -> RankLimits:
    """Return the limits of the rank of each layer."""
    rank = request.rank
    assert rank is None or isinstance(rank, int)  # the type of the argument
    if rank is None and request.share is None and request.error is None:
        rank = _MAX_RANK_FOR_SIZE
    return RankLimits(rank, request.share)


def _settings(
    files: Iterable[Path], request: RankRequest, limits: RankLimits, diff: ModelDiff
) -> list[object]:
    """Return everything that the factors depend on."""
    # The names of the layers and whether they are transposed depend on further files and arguments.
    names = [(name, pair.is_transposed) for name, pair in diff.layers.items()]
    states = [file_state(file) for file in files]
    return [*states, *limits, request.error is not None, names]


def _factorize(
    diff: ModelDiff, request: RankRequest, limits: RankLimits, cache: Path
) -> ChangedLayers:
    """Return the factors of all changed layers."""
    changed = ChangedLayers(diff.layers, cache)
    if request.error is None:
        changed.factorize(limits)
    else:
        changed.factorize_for_error(request.error, limits.max_rank)
    if changed.total == 0:  # differences of float64 may be too small for float32
        raise MatryoshkaError("No linear layer and no convolution changed.")
    return changed


def _check_key_format(
    output: PathLike, key_format: ImageKeyFormat | None, modules_to_save: Sequence[str]
) -> None:
    if key_format is not None and modules_to_save:
        raise MatryoshkaError("A file for image models has no `modules_to_save`. Omit it.")
    is_file = Path(output).suffix.lower() == ".safetensors"
    if key_format is None and is_file:
        raise MatryoshkaError(
            f"Without `key_format` the output is a folder, got {output}. Pass a path without "
            ".safetensors, or `key_format='diffusers'`."
        )
    if key_format is not None and not is_file:
        raise MatryoshkaError(
            f"With `key_format` the output is a .safetensors file, got {output}. Pass a path such "
            "as lora.safetensors."
        )
    if key_format is not None:
        check_choice("key_format", key_format, get_args(ImageKeyFormat))


def _plan_output(lora: LoraFile, request: RankRequest, changed: ChangedLayers) -> OutputPlan:
    """Return what the output will hold. It is nested if only the rank is limited.

    Args:
        lora: The factors. Its layers may have the names of a key format.
        request: What the caller wants to keep.
        changed: The factors as they were computed.
    """
    if not request.needs_singular_values and isinstance(lora, PeftFolder):
        return lora.plan_nested()
    ranks = {layer.name: layer.rank for layer in lora.layers}
    if request.error is None and request.max_size is None:
        return lora.plan(ranks)
    spectra = lora.spectra(ranks)
    if request.error is not None:
        ranks = ranks_for_error(spectra, request.error, changed.total, changed.residual)
    if request.max_size is not None:
        spectra = {name: replace(layer, max_rank=ranks[name]) for name, layer in spectra.items()}
        ranks = ranks_for_size(spectra, lambda ranks: lora.plan(ranks).file_size, request.max_size)
    return lora.plan(ranks)


def _relative_error(
    plan: OutputPlan, written: WrittenOutput, changed: ChangedLayers, rank: int
) -> float:
    """Return the relative error of a rank: the residual, and what truncation adds to it."""
    squared_error = changed.residual
    for old, new in plan.layers:
        layer_rank = min(old.rank, new.rank, rank)
        squared_error += float(written.squared_errors[new.name][layer_rank])
    return math.sqrt(squared_error / changed.total)


def _notes(request: RankRequest, ranks: Mapping[str, int], error: float) -> tuple[str, ...]:
    if request.error is None or error <= request.error * (1 + 1e-6):
        return ()
    num_bounded = sum(rank == request.rank for rank in ranks.values())
    reason = "rounding of the factors"
    if num_bounded:
        reason = f"the requested rank, which limits {pluralize(num_bounded, 'layer')}"
    elif request.max_size is not None:
        reason = "the requested size"
    return (f"The error is larger than requested because of {reason}.",)


def _peft_config(
    base: PathLike,
    base_revision: str | None,
    base_model: ModelFiles,
    architecture: Architecture,
    layers: Sequence[Layer],
    saved: Mapping[str, StoredTensor],
) -> dict[str, Any]:
    """Return PEFT's config without ranks and scales, which the output's plan adds."""
    names = [layer.name for layer in layers]
    saved_modules = sorted({key.rpartition(".")[0] for key in saved})
    is_causal_lm = architecture.is_known and "CausalLM" in str(base_model.config)
    hub_id = split_hub_id(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": hub_id.repo_id if hub_id else str(base),
        "revision": base_revision if hub_id else None,
        "target_modules": names,
        "modules_to_save": saved_modules or None,
        "fan_in_fan_out": any(architecture.is_conv1d(name) for name in names),
    }


def _image_lora(name: str, layers: Iterable[Layer], key_format: ImageKeyFormat) -> LoraFile:
    """Return a single file of layers whose names begin with a part of a pipeline."""
    image_layers: list[Layer] = []
    for layer in layers:
        key_A, key_B = f"{layer.name}.lora_A.weight", f"{layer.name}.lora_B.weight"
        image_layers.append(replace(layer, key_A=key_A, key_B=key_B))
    return convert_keys(SingleFile(name, tuple(image_layers), {}), key_format)
