"""Load a LoRA onto its base model or into its pipeline, to change it there and write it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.atomic import PathLike, check_output, create_folder
from matryoshka_lora.errors import MatryoshkaError, optional_imports
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import reorder_by_moments, truncation_errors
from matryoshka_lora.lora.layer import Factors, Layer
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.base_model import load_adapter_tokenizer, load_model
from matryoshka_lora.peft.load import load
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.registry import Target


@contextmanager
def adapter_in_memory(
    source: PathLike,
    output: PathLike,
    inputs: Iterable[object],
    *,
    base_model: str | None,
    base_revision: str | None,
    revision: str | None,
    dtype: torch.dtype | str | None,
    model_args: Mapping[str, Any] | None,
    force: bool,
) -> Iterator[tuple[NestedAdapter, PreTrainedTokenizerBase]]:
    """Load a LoRA onto its base model, and write it as a nested adapter at the end.

    Paths among the ``inputs`` are not replaced by the output. See `matryoshka_lora.reorder` for the
    other arguments and the errors.

    Yields:
        The adapter, to be changed, and the tokenizer.
    """
    lora = open_adapter(source, revision)
    sources: list[PathLike] = [*lora.sources]
    sources += [path for path in inputs if isinstance(path, (str, os.PathLike))]
    if base_model:
        sources.append(base_model)
    output_path = check_output(output, force, sources)
    model_name, model_revision = peft_folder.base_model_of(lora, base_model, base_revision)
    options = {"dtype": dtype, **(model_args or {})}
    model = load_model(model_name, revision=model_revision, **options)
    tokenizer = load_adapter_tokenizer(lora, model_name, model_revision)
    # An output that cannot be written is an error before the computation, not after it.
    with create_folder(output_path, force, sources) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # All layers get the same rank and scale.
            peft_folder.write(lora.nested(), Path(temporary), Target())
            adapter = load(model, temporary, is_trainable=True)
        yield adapter, tokenizer
        # Keep the source's files, so that its tokenizer is copied.
        changed = replace(adapter.to_lora(), files=lora.files)
        peft_folder.write(changed.nested(), folder, Target())


def weighted_by_pictures(
    lora: Lora,
    pipeline: Any,
    prompts: Sequence[str],
    *,
    pipeline_args: Mapping[str, Any] | None,
    dtype: torch.dtype | str | None,
    offload: bool,
    seed: int,
) -> Lora:
    """Return a LoRA of a single file, reordered by what changes the pictures of a pipeline.

    It keeps its keys, unless diffusers splits or fuses its layers.

    Layers without a gradient keep the order of the SVD. Their weighted values are their singular
    values, times a factor that the other layers have on average. See `matryoshka_lora.reorder`
    for the arguments and the errors.
    """
    with optional_imports("image"):
        from matryoshka_lora.peft.pipeline import (
            denoising_moments,
            open_pipeline,
            with_diffusers_keys,
            with_lora,
        )

    opened, pipeline_name = open_pipeline(pipeline, dtype, offload)
    # Converted before it is reordered, because layers may be split.
    converted = with_diffusers_keys(lora)
    ordered = converted.reorder()
    with with_lora(opened, ordered):
        moments = denoising_moments(opened, prompts, pipeline_args or {}, seed)
    factors: dict[str, Factors] = {}
    svd_values: dict[str, Float64Array] = {}
    weighted_values: dict[str, Float64Array] = {}
    with single_threaded():
        for layer in progress_bar(ordered.layers, "reordering"):
            A, B, _, singular_values = layer.read()
            assert singular_values is not None  # see `Lora.reorder`
            svd_values[layer.name] = singular_values
            if layer.name in moments:
                A, B, values = reorder_by_moments(A, B, *moments[layer.name])
                weighted_values[layer.name] = values
            errors = truncation_errors(A, B, [layer.scale] * layer.rank)
            factors[layer.name] = Factors(
                A.astype(np.float32), B.astype(np.float32), errors, singular_values
            )
    if not weighted_values:
        raise MatryoshkaError(
            f"No layer of {lora.name} gets a gradient from the pictures of {pipeline_name}. "
            "Pass the model that the LoRA is for, or reorder it without `pipeline`."
        )
    notes = list(lora.notes)
    missing = len(ordered.layers) - len(weighted_values)
    if missing:
        notes.append(
            f"{missing} of {len(ordered.layers)} layers get no gradient, as in text encoders. They "
            "keep the order of the SVD."
        )
    weighted_norm, norm = (
        np.linalg.norm(np.concatenate([values[name] for name in weighted_values]))
        for values in (weighted_values, svd_values)
    )
    layers: list[Layer] = []
    for layer in ordered.layers:
        values = weighted_values.get(layer.name, weighted_norm / norm * svd_values[layer.name])
        read = partial(factors.__getitem__, layer.name)
        layers.append(replace(layer, read=read, weighted_values=values))
    originals = {layer.read: layer for layer in lora.layers}
    if all(layer.read in originals for layer in converted.layers):  # they were only renamed
        for index, layer in enumerate(converted.layers):
            original = originals[layer.read]
            layers[index] = replace(layers[index], name=original.name, keys=original.keys)
        layers.sort(key=lambda layer: layer.name)
        ordered = lora.reorder()
    else:
        notes.append("The output has the keys of diffusers, because it has other layers.")
    return replace(ordered, layers=tuple(layers), order="weighted", notes=tuple(notes))
