"""Load a LoRA onto its base model, to change it there and write it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.atomic import PathLike, check_output, create_folder
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.base_model import load_adapter_tokenizer, load_model
from matryoshka_lora.peft.load import load
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

    Args:
        source: A PEFT folder, or its Hub id.
        output: The folder to write.
        inputs: Data. Paths among them are not replaced by the output.
        base_model: A folder or Hub id. Defaults to the model that the adapter's config names.
        base_revision: Its revision on the Hub. Defaults to the one that the config names.
        revision: Branch, tag or commit of the source on the Hub.
        dtype: Dtype of the base model, as `load_model` takes it. Chosen by the hardware by default.
        model_args: More arguments of `load_model`.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Yields:
        The adapter, to be changed, and the tokenizer.

    Raises:
        MatryoshkaError: The source or the base model cannot be read, or the output already exists.
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
