"""Train the low ranks of a LoRA in a PEFT folder on examples."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from matryoshka_lora.atomic import PathLike, check_output, create_folder
from matryoshka_lora.examples import read_examples
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.peft.base_model import load_adapter_tokenizer, load_model
from matryoshka_lora.peft.load import load
from matryoshka_lora.registry import Target


def train_ranks(
    source: PathLike,
    output: PathLike,
    data: Iterable[object] | PathLike,
    *,
    eval_data: Iterable[object] | PathLike | None = None,
    max_examples: int | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    force: bool = False,
) -> TrainRanksResult:
    """Train the low ranks of a LoRA, and write it as a nested adapter.

    See `NestedAdapter.train_ranks`. The output holds the factors of the source, reordered by SVD
    unless they have an order, and the trained ranks in the subfolder ``small``.

    Args:
        source: A PEFT folder, or its Hub id.
        output: The folder to write.
        data: A dataset or a list of examples with ``prompt`` and ``completion``, or with
            ``messages``; or the path of a file with an example in each line, in JSON.
        eval_data: Examples to validate on, in one of these forms. They should not be training
            examples. By default training examples validate.
        max_examples: The number of examples to train on. Defaults to 3200.
        base_model: A folder or Hub id. Defaults to the model that the adapter's config names.
        base_revision: Its revision on the Hub. Defaults to the one that the config names.
        revision: Branch, tag or commit of the source on the Hub.
        dtype: Dtype of the base model, as `load_model` takes it. Chosen by the hardware by default.
        seed: The seed of the order of the examples and ranks.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The source, the data or the base model cannot be read, or the output
            already exists.
        NotFiniteError: A factor, the loss or a gradient is NaN or infinite.
    """
    lora = open_adapter(source, revision)
    data_files = [path for path in (data, eval_data) if isinstance(path, (str, os.PathLike))]
    sources: list[PathLike] = [*lora.sources, *data_files]
    if base_model:
        sources.append(base_model)
    output_path = check_output(output, force, sources)
    examples = read_examples(data)
    eval_examples = None if eval_data is None else read_examples(eval_data)
    model_name, model_revision = peft_folder.base_model_of(lora, base_model, base_revision)
    model = load_model(model_name, dtype, model_revision)
    tokenizer = load_adapter_tokenizer(lora, model_name, model_revision)
    # An output that cannot be written is an error before the training, not after it.
    with create_folder(output_path, force, sources) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # All layers get the same rank and scale.
            peft_folder.write(lora.nested(), Path(temporary), Target())
            adapter = load(model, temporary, is_trainable=True)
        result = adapter.train_ranks(
            examples, tokenizer, eval_data=eval_examples, max_examples=max_examples, seed=seed
        )
        # Keep the source's files, so that its tokenizer is copied.
        trained = replace(adapter.to_lora(), files=lora.files)
        peft_folder.write(trained.nested(), folder, Target())
    return replace(result, path=output_path)
