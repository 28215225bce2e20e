"""Extract a LoRA from a fine-tuned model or a DoRA: the closest LoRA to the change of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from matryoshka_lora.atomic import PathLike, check_output
from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list
from matryoshka_lora.extraction.dora import apply_dora, open_dora
from matryoshka_lora.extraction.factorize import factorize_layers, resumable_folder
from matryoshka_lora.extraction.model_diff import (
    compare_models,
    open_model,
    read_architecture,
    rename_for_pipeline,
)
from matryoshka_lora.formats.hub import MODEL_FILES, TUNED_FILES, local_path, split_hub_id
from matryoshka_lora.linalg.allocation import ranks_for_error
from matryoshka_lora.linalg.factors import compose_errors
from matryoshka_lora.lora.keys import PEFT_PREFIX, find_models
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.truncate import fit_size, layer_spectra, with_ranks
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.registry import ANSWERS_CAVEAT, PICTURES_CAVEAT, ImageKeyFormat
from matryoshka_lora.text import format_errors, format_percent, join_lines
from matryoshka_lora.units import format_size, parse_share, parse_size, pluralize

# The upper bound of a layer's rank if only the size of the file is limited.
_MAX_RANK_FOR_SIZE = 128


@dataclass(frozen=True)
class ExtractResult:
    """The result of `extract`.

    Attributes:
        path: The folder or file.
        ranks: The rank of each layer of the output by its name.
        errors: The relative error by rank: the norm of what the output misses over the norm of the
            change of the layers. Only a nested output has more than one rank.
        rounding_share: The share of the change's squared norm that comes from rounding the weights
            to their dtype.
        unsaved_tensors: The size in bytes of each tensor that changed and is not in the output, by
            its key.
        notes: Remarks for the user, one sentence each.
    """

    path: Path
    ranks: dict[str, int]
    errors: dict[int, float]
    rounding_share: float
    unsaved_tensors: dict[str, int]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the errors and what is missing, as `matryoshka extract` prints them."""
        lines = [f"{self.path}: {pluralize(len(self.ranks), 'layer')}", ""]
        lines += format_errors(self.errors, "change")
        lines.append(PICTURES_CAVEAT if self.path.is_file() else ANSWERS_CAVEAT)
        lines += self.notes
        if self.rounding_share > 0.001:
            share = format_percent(self.rounding_share)
            lines.append(f"{share} of the squared change is due to rounding of the weights.")
        if self.unsaved_tensors:
            modules = [key.rpartition(".")[0] for key in self.unsaved_tensors]
            size = format_size(sum(self.unsaved_tensors.values()))
            lines.append(
                f"Not in the LoRA: {pluralize(len(modules), 'tensor')} ({size}) that changed too, "
                f"such as {', '.join(modules[:3])}."
            )
            if self.path.is_dir():
                lines.append(f"Pass {modules[0]} in `modules_to_save` to save this one in full.")
        return join_lines(lines)


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
        base: The base model: a folder or a safetensors file, or ``owner/name`` on the
            Hugging Face Hub.
        tuned: The fine-tuned model, in one of these forms; or a DoRA adapter of the base model: a
            folder that PEFT has saved, or with a key format a single file.
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
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: A model cannot be read, they are not versions of one model, no layer
            changed, or the output already exists.
        NotFiniteError: A weight is NaN or infinite.
    """
    modules_to_save = check_list("modules_to_save", modules_to_save)
    if rank is not None:
        check_rank(rank)
    has_rank_only = keep is None and error is None and max_bytes is None
    if rank is None and has_rank_only:
        raise MatryoshkaError("Pass at least one of `rank`, `keep`, `error` or `max_bytes`.")
    if keep is not None and error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    share = None if keep is None else parse_share(keep)
    max_error = None if error is None else parse_share(error)
    max_size = None if max_bytes is None else parse_size(max_bytes)
    if key_format is not None:
        check_choice("key_format", key_format, get_args(ImageKeyFormat))
        if modules_to_save:
            raise MatryoshkaError("A file for image models has no `modules_to_save`. Omit it.")
    if (Path(output).suffix.lower() == ".safetensors") != (key_format is not None):
        raise MatryoshkaError(
            f"The output is a folder, or with `key_format` a .safetensors file, got {output}. Pass "
            "another path, or pass or omit `key_format`."
        )
    base_model = open_model(local_path(base, MODEL_FILES, base_revision))
    tuned_path = local_path(tuned, TUNED_FILES, tuned_revision)
    dora = open_dora(tuned_path)
    tuned_model = base_model if dora else open_model(tuned_path)
    files = [*base_model.files, *(dora or tuned_model).files]
    path = check_output(output, force, files, is_file=key_format is not None)
    if dora and dora.lora.container == "single" and key_format is None:
        raise MatryoshkaError(f"{tuned} is a DoRA in one file. Pass `key_format`.")
    if dora and dora.lora.container == "peft" and key_format is not None:
        raise MatryoshkaError(f"{tuned} is a DoRA in a folder. Omit `key_format`.")

    if key_format is not None:
        base_model, tuned_model = rename_for_pipeline(base_model, tuned_model)
    architecture = read_architecture(base_model)
    if dora:
        tuned_model = apply_dora(base_model, dora, architecture)
    diff = compare_models(base_model, tuned_model, architecture, modules_to_save)
    if key_format == "kohya":
        names = [name for name in diff.layers if name.startswith("transformer.")]
        if names and not find_models(names):
            raise MatryoshkaError(
                f"The kohya format has no names for the layers of {base_model.path}. Pass "
                "`key_format='diffusers'`."
            )

    max_rank = rank
    if rank is None and keep is None and error is None:
        max_rank = _MAX_RANK_FOR_SIZE
    # The names of the layers and whether they are transposed depend on configs and arguments.
    layer_names = [(name, pair.is_transposed) for name, pair in diff.layers.items()]
    settings = [max_rank, share, error is not None, layer_names]
    with resumable_folder(path, files, settings) as folder:
        layers, changes = factorize_layers(
            diff.layers, folder, max_rank, share=share, max_error=max_error
        )
        total = sum(change.total for change in changes)
        residual = sum(change.residual for change in changes)
        if total == 0:  # differences of float64 may be too small for float32
            raise MatryoshkaError("No linear layer and no convolution changed.")
        factors_error = math.sqrt(residual / total)
        if key_format is None:
            hub_id = split_hub_id(base)
            saved = diff.saved_tensors
            is_causal_lm = bool(architecture.modules) and "CausalLM" in str(base_model.config)
            config = {  # without ranks and scales, which `save` adds
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM" if is_causal_lm else None,
                "base_model_name_or_path": hub_id.repo_id if hub_id else str(base),
                "revision": base_revision if hub_id else None,
                "target_modules": [layer.name for layer in layers],
                "modules_to_save": sorted({key.rpartition(".")[0] for key in saved}) or None,
                "fan_in_fan_out": any(pair.is_transposed for pair in diff.layers.values()),
            }
            other_tensors = {PEFT_PREFIX + key: tensor for key, tensor in saved.items()}
            lora = Lora(str(path), layers, other_tensors, config=config)
        else:
            lora = Lora(str(base_model.path), layers, container="single").convert(key_format)
        lora = replace(lora, original_error=factors_error)
        if has_rank_only and key_format is None:
            lora = lora.nested()
        else:
            ranks = lora.ranks
            if rank is not None:  # a fused layer has the components of all its parts
                ranks = {name: min(rank, fused_rank) for name, fused_rank in ranks.items()}
            if max_error is not None or max_size is not None:
                spectra = layer_spectra(lora, ranks)
            if max_error is not None:
                ranks = ranks_for_error(spectra, max_error, total, residual)
            if max_size is not None:
                ranks = fit_size(lora, spectra, ranks, max_size)
            lora = with_ranks(lora, ranks)
        result = lora.save(path, lora.container, force=force)

    # The errors of the output against the factors become errors against the change.
    errors = {
        error_rank: compose_errors(factors_error, truncation_error)
        for error_rank, truncation_error in result.errors.items()
    }
    notes: tuple[str, ...] = ()
    if max_error is not None and errors[max(errors)] > max_error * (1 + 1e-6):
        limits = "the rank, the size or the rounding of the factors"
        notes = (f"The error is larger than requested, because of {limits}.",)
    return ExtractResult(
        path=path,
        ranks=result.ranks,
        errors=errors,
        rounding_share=sum(change.rounding for change in changes) / total,
        unsaved_tensors={key: tensor.nbytes for key, tensor in diff.unsaved_tensors.items()},
        notes=notes,
    )
