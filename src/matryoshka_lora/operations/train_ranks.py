"""Train the low ranks of a LoRA in a PEFT folder on examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.examples import read_examples
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.operations.in_memory import adapter_in_memory


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
    model_args: Mapping[str, Any] | None = None,
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
        model_args: More arguments of `load_model`, such as ``{"device_map": "auto"}``.
        seed: The seed of the order of the examples and ranks.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The source, the data or the base model cannot be read, or the output
            already exists.
        NotFiniteError: A factor, the loss or a gradient is NaN or infinite.
    """
    examples = read_examples(data)
    eval_examples = None if eval_data is None else read_examples(eval_data)
    with adapter_in_memory(
        source,
        output,
        (data, eval_data),
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        dtype=dtype,
        model_args=model_args,
        force=force,
    ) as (adapter, tokenizer):
        result = adapter.train_ranks(
            examples, tokenizer, eval_data=eval_examples, max_examples=max_examples, seed=seed
        )
    return replace(result, path=Path(output))
