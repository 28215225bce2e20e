"""Reorder a LoRA file by singular value decomposition, so that every rank of it can be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError, optional_imports
from matryoshka_lora.examples import read_examples
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import ReorderResult

if TYPE_CHECKING:
    import torch


def reorder(
    source: Lora | PathLike,
    output: PathLike,
    data: Iterable[object] | PathLike | None = None,
    *,
    max_examples: int = 64,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
) -> ReorderResult:
    """Make a LoRA nested: every prefix of its factors becomes the best one of its rank.

    The update of the largest rank stays the same. Without data, the singular value decomposition of
    each layer's update needs neither data nor the base model. With data, it is weighted by what
    changes the outputs on examples; see `NestedAdapter.reorder`. The output keeps the weighted
    values, so that `export` can choose ranks by them without data.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, the Hub id of either, or an opened
            LoRA. With data, a PEFT folder or its Hub id.
        output: The folder or file to write, of the same kind as the source. In a folder each layer
            is padded to the largest rank; in a file it keeps its own.
        data: Examples of the adapter's own task: a dataset or a list of examples with ``prompt``
            and ``completion``, or with ``messages``; or the path of a file with an example in each
            line, in JSON.
        max_examples: The number of examples to use.
        base_model: A folder or Hub id. Defaults to the model that the adapter's config names. The
            base model is used with data only.
        base_revision: Its revision on the Hub. Defaults to the one that the config names.
        revision: Branch, tag or commit of the source on the Hugging Face Hub.
        dtype: Dtype of the base model, as `load_model` takes it. Chosen by the hardware by default.
        model_args: More arguments of `load_model`, such as ``{"device_map": "auto"}``.
        seed: The seed of the choice of examples, and of random directions of the outputs.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The source, the data or the base model cannot be read or used, or the
            output already exists.
        MissingDependencyError: Data needs PyTorch, which is not installed.
        NotFiniteError: A factor or a gradient is NaN or infinite.
    """
    if data is not None:
        if isinstance(source, Lora):
            raise MatryoshkaError(
                "An opened LoRA is reordered without data. Pass the path of its folder."
            )
        with optional_imports():
            from matryoshka_lora.operations.in_memory import adapter_in_memory

        examples = read_examples(data)
        with adapter_in_memory(
            source,
            output,
            (data,),
            base_model=base_model,
            base_revision=base_revision,
            revision=revision,
            dtype=dtype,
            model_args=model_args,
            force=force,
        ) as (adapter, tokenizer):
            result = adapter.reorder(examples, tokenizer, max_examples=max_examples, seed=seed)
        return replace(result, path=Path(output))
    lora = source if isinstance(source, Lora) else open_lora(source, revision=revision)
    if lora.small is not None:
        warnings.warn(
            f"{lora.name} is reordered by SVD, without the trained ranks up to {lora.small_rank}.",
            stacklevel=2,
        )
    saved = lora.reorder().save(output, lora.container, force=force)
    return ReorderResult(
        saved.path,
        lora.nested_ranks,
        saved.written.relative_errors(lora.nested_ranks),
        saved.written.singular_values,
    )
