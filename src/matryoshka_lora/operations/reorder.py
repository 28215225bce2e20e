"""Reorder a LoRA file by singular value decomposition, so that every rank of it can be used."""

from __future__ import annotations

import warnings

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import ReorderResult


def reorder(
    source: Lora | PathLike, output: PathLike, *, revision: str | None = None, force: bool = False
) -> ReorderResult:
    """Make a LoRA nested: every prefix of its factors becomes the best one of its rank.

    The singular value decomposition of each layer's update needs neither data nor the base model.
    The update of the largest rank stays the same.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA.
        output: The folder or file to write, of the same kind as the source. In a folder each layer
            is padded to the largest rank; in a file it keeps its own.
        revision: Branch, tag or commit of the source on the Hugging Face Hub.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The source cannot be read or truncated, or the output already exists.
        NotFiniteError: A factor is NaN or infinite.
    """
    lora = source if isinstance(source, Lora) else open_lora(source, revision=revision)
    if lora.small is not None:
        warnings.warn(
            f"{lora.name} is reordered by SVD, without the trained ranks up to {lora.small_rank}.",
            stacklevel=2,
        )
    result = lora.reorder().save(output, lora.container, force=force)
    return ReorderResult(
        result.path,
        lora.nested_ranks,
        result.written.relative_errors(lora.nested_ranks),
        result.written.singular_values,
    )
