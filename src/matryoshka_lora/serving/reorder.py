"""`reorder`: any LoRA adapter, file to file, into a nested one whose every prefix is good."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable, checkpoint_file, output_directory
from matryoshka_lora.formats.card import changed_tokenizer, template_of
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.single import is_file, open_file
from matryoshka_lora.formats.write import check_apart, write_adapter
from matryoshka_lora.reordering.files import reorder_opened
from matryoshka_lora.reordering.model import check_by
from matryoshka_lora.serving.single import Wish, write_single
from matryoshka_lora.state import By


def reorder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    by: By = "svd",
    data: str | Sequence[Mapping[str, Any]] | None = None,
    *,
    rows: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16",
    seed: int = 0,
    overwrite: bool = False,
    on_layer: Callable[[], object] | None = None,
) -> dict[str, Tensor]:
    """Make any LoRA adapter nested: every prefix becomes a good adapter of its rank.

    At the largest rank it computes what it did; only ``"trained"`` changes that.

    ``"svd"`` needs neither data nor the base model, and has one layer in memory at a time. The others run the base
    model over some rows of the training data, or of data like it.

    Example::

        reorder("someones-adapter", "nested")
        reorder("someones-adapter", "nested", by="learned", data="my.jsonl")

    Args:
        source: The folder of a LoRA adapter that PEFT has written: nested or not, in any of its scalings, with ranks
            per layer, in one file or in shards. Or a LoRA in one ``.safetensors`` file, as image and video models have
            it; then so is the target, where each layer keeps its own rank.
        target: The folder to write: a nested adapter of the largest rank that a layer has. Plain PEFT reads it as the
            function that the source is; of one with the paper's deployment, as that of training, P and all.
        by: In what sense each prefix is good; see `matryoshka_lora.NestedAdapter.reorder`.
        data: For all but ``"svd"``: a built-in task, a file, the id of a hub dataset, or rows with ``prompt`` and
            ``completion``. Questions and answers of a file or a dataset get the ``data.template`` of ``train.yaml`` in
            the source.
        rows: How many rows are used; None is 128, 480 for ``"learned"``, and 3200 for ``"trained"``. These two look at
            48 and at most 64 more, if there are so many, to compare losses.
        model: The base model; None is what the adapter names.
        revision: Of the base model on the hub; None is the one that the adapter was trained on.
        dtype: Of the base model.
        seed: Of which rows are taken, and of their ranks.
        overwrite: Whether the target may hold an adapter, a model or an evaluation, of which nothing is left then.
        on_layer: Called after each layer of ``"svd"``.

    Returns:
        Each layer's singular values in the sense of ``by``; for ``"learned"`` and ``"trained"``, those of the SVD.

    Raises:
        MatryoshkaError: The source is damaged or no LoRA adapter, data and base model do not go with it, or the target
            cannot be written or holds something that may not be overwritten. Nothing has been written then.
    """
    check_by(by, data is not None, rows)
    if is_file(source):
        if data is not None:
            raise MatryoshkaError(f"{source} is a single file, which is reordered by svd: leave the data out")
        told = None if on_layer is None else lambda _: on_layer()
        return write_single(open_file(source), target, Wish(), None, overwrite, told).spectra
    opened = open_adapter(source)
    check_writable(target)
    check_apart(source, target)
    checkpoint = checkpoint_file(target) if by == "trained" else None
    with output_directory(target, overwrite) as folder:
        if data is None:
            new, spectra = reorder_opened(opened, on_layer)
        else:
            new, spectra = _with_data(opened, by, data, rows, model, revision, dtype, seed, checkpoint)
        write_adapter(folder, new, spectra, Path(target))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return spectra


def _with_data(
    opened: OpenedAdapter,
    by: By,
    data: str | Sequence[Mapping[str, Any]],
    rows: int | None,
    model: str | None,
    revision: str | None,
    dtype: str,
    seed: int,
    checkpoint: Path | None,
) -> tuple[OpenedAdapter, dict[str, Tensor]]:
    # PEFT and transformers are slow to import, and an SVD needs neither.
    from matryoshka_lora.adapter.loading import load_opened
    from matryoshka_lora.adapter.saving import opened_from
    from matryoshka_lora.data.questions import is_chat, rows_of
    from matryoshka_lora.models import DTYPES, base_of, load_on_accelerator, load_tokenizer, needed_base
    from matryoshka_lora.reordering import learned, trained

    name, revision = base_of(opened.config, model, revision)
    name = needed_base(name, opened.name)
    wanted_by = trained if by == "trained" else learned
    # Those that are only looked at are none of those that are learned from, if there are so many.
    looked_at = {"learned": learned.JUDGED * learned.ROWS, "trained": trained.JUDGED_ROWS}.get(by, 0)
    most = (rows or wanted_by.STEPS * wanted_by.ROWS) + looked_at
    questions = rows_of(data, most, template_of(Path(opened.name)))
    if changed := changed_tokenizer(Path(opened.name), any(map(is_chat, questions))):
        raise MatryoshkaError(
            f"{opened.name} was trained with {changed} (train.yaml), and the base model's tokenizer would make other "
            f"rows: reorder it in Python, with load(...).reorder({by!r}, rows, tokenizer)"
        )
    tokenizer = load_tokenizer(name, revision=revision)
    base = load_on_accelerator(name, DTYPES[dtype], revision)
    # In float32 while it is changed.
    adapter = load_opened(base, reorder_opened(opened, dtype=torch.float32)[0], trainable=True)
    spectra = adapter.reorder(by, questions, tokenizer, rows, seed, checkpoint)
    new = opened_from(adapter.model, adapter.name)
    # Tensors that are no factors were rounded to the base model's dtype: those of the source stay.
    own = replace(opened, others=new.others)
    return own.with_factors(new.factors, new.layers, new.config, new.state, opened.dtype), spectra
