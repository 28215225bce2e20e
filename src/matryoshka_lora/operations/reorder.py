"""Reorder a LoRA file by singular value decomposition, so that every rank of it can be used."""

from __future__ import annotations

import warnings
from dataclasses import replace

from matryoshka_lora.lora_file.atomic import PathLike, check_output
from matryoshka_lora.lora_file.open import open_lora
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.results import ReorderResult
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.operations.output_format import check_same_kind


def reorder(
    source: PathLike, output: PathLike, *, revision: str | None = None, force: bool = False
) -> ReorderResult:
    """Make a LoRA nested: every prefix of its factors becomes the best one of its rank.

    The singular value decomposition of each layer's update needs neither data nor the base model.
    The update of the largest rank stays the same.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, or the Hub id of either.
        output: The folder or file to write, of the same kind as the source. In a folder each layer
            is padded to the largest rank; in a file it keeps its own.
        revision: Branch, tag or commit of the source on the Hugging Face Hub.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: The source cannot be read or truncated, or the output already
            exists.
        NotFiniteError: A factor is NaN or infinite.
    """
    lora = open_lora(source, revision)
    if lora.order == "trained":
        warnings.warn(
            f"{lora.name} is reordered by SVD. Ranks that were trained are lost.", stacklevel=2
        )
    # The order of the source does not count: its factors are reordered in any case.
    lora = replace(lora, order=None, deploy="reordered")
    check_same_kind(lora, output)
    output_path = check_output(output, force, lora.sources, is_file=isinstance(lora, SingleFile))
    plan = lora.plan_nested() if isinstance(lora, PeftFolder) else lora.plan(lora.max_rank)
    written = plan.write(output_path, force)
    errors = written.relative_errors(lora.ranks)
    return ReorderResult(output_path, lora.ranks, errors, written.singular_values)
