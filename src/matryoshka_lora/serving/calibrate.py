"""What a calibration set says about each layer of a reordered adapter: moments for the metrics, or the order itself."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter, load, order
from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.adapter.storage import check_apart
from matryoshka_lora.serving.reorder import Moments, reorder_adapter, reweigh_adapter, rewrite_learned
from matryoshka_lora.formats.spectra import Metric, Spectra
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.data.questions import Question, Tokens, pad_rows, rows_from, tokenize
from matryoshka_lora.files import check_free
from matryoshka_lora.models import context_length, pad_token
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.data.sources import load_data, parse_data

ROWS = {"activations": 128, "loss": 128, "learned": order.STEPS * order.ROWS}
"""Rows of a calibration set, by metric, unless told otherwise."""

BATCH_SIZE = 8


def measure_moments(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Question],
    gradients: bool,
    on_batch: Callable[[int], object] | None = None,
) -> dict[str, Moments]:
    """The second moments at each layer's factors, over the tokens of some rows, at the adapter's full rank.

    Args:
        adapter: Loaded with ``trainable=True`` from what `matryoshka_lora.serving.reorder.reorder_adapter` has written,
            in float32.
        tokenizer: The base model's.
        rows: Prompts with completions. The loss is that of the completions' tokens.
        gradients: False gives the moments of ``A x`` over all tokens, for the metric ``activations``. True gives the
            two for ``loss``: those of ``A x`` and of ``B^T dL/dy``, each token weighted by the squared size of the
            other. That is one step of the power iteration to the nearest Kronecker product of the Fisher matrix,
            where K-FAC would take them for independent; a token without gradient then counts for nothing.
        on_batch: Called with the number of rows done, after each batch.

    Returns:
        By layer. Layers that have no factor modules (embeddings, stacks of experts) are left out, as are those that
        no token reached.

    Raises:
        MatryoshkaError: There are no rows, one of them has no answer within the model's context, or a moment is not
            finite.
    """
    questions = sorted(_tokens(adapter, tokenizer, rows), key=lambda q: len(q.context) + len(q.completion))
    pad = pad_token(tokenizer, adapter.model)
    probes = {
        name: _Probe(module, adapter.name, gradients)
        for name, module, _ in adapter._layers()
        if _has(module, adapter.name)
    }
    adapter.model.eval()
    with ExitStack() as hooks, torch.set_grad_enabled(gradients):
        for probe in probes.values():
            hooks.enter_context(probe)
        for start in range(0, len(questions), BATCH_SIZE):
            batch = questions[start : start + BATCH_SIZE]
            _run(adapter.model, batch, pad, list(probes.values()), gradients)
            adapter.model.zero_grad(set_to_none=True)
            if on_batch is not None:
                on_batch(len(batch))
    found = {name: probe.moments() for name, probe in probes.items() if probe.tokens}
    for name, moments in found.items():
        if not all(bool(m.isfinite().all()) for m in (moments.inner, moments.outer) if m is not None):
            raise NotFiniteError(
                f"layer {name} computes NaN or infinity on the calibration set: take a base model in bf16 or fp32"
            )
    return found


def learn_order_from(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Question],
    steps: int = order.STEPS,
    batch_size: int = order.ROWS,
    learning_rate: float = order.LEARNING_RATE,
    seed: int = 0,
    on_batch: Callable[[int], object] | None = None,
    distil: bool = False,
) -> None:
    """Order an adapter's directions by the loss of its prefixes on some rows: `matryoshka_lora.adapter.order`.

    Args:
        adapter: Trainable. Its order changes in place, its full-rank function does not.
        tokenizer: The base model's.
        rows: Prompts with completions; where they are fewer than ``steps`` batches, they come again.
        steps: How many batches are taken.
        batch_size: Rows of a batch.
        learning_rate: Of the order, at R = 32: `matryoshka_lora.adapter.order.rate_at`.
        seed: Of the order of the rows, and of their ranks.
        on_batch: Called with the number of rows done, after each batch.
        distil: The loss of a prefix is not that of the answers, but its KL divergence from the adapter at full rank
            where the answers stand.

    Raises:
        MatryoshkaError: There are no rows, one of them has no answer within the model's context, or a loss is not
            finite.
    """
    questions = _tokens(adapter, tokenizer, rows)
    random.Random(seed).shuffle(questions)
    pad = pad_token(tokenizer, adapter.model)
    endless = cycle(questions)

    def batches() -> Iterator[list[order.Part]]:
        for _ in range(steps):
            batch = pad_rows(list(islice(endless, batch_size)), pad, adapter.model.device)
            loss = partial(_loss, adapter.model, *batch, "mean")
            if distil:
                with torch.no_grad(), adapter.rows([adapter.nesting.max_rank] * batch_size, exact=False):
                    teacher = _answers(adapter.model, *batch)[0].log_softmax(dim=-1)
                loss = partial(_divergence, adapter.model, *batch, teacher)
            yield [order.Part(batch_size, 1.0, loss)]
            if on_batch is not None:
                on_batch(batch_size)

    order.learn_order(adapter, batches(), steps, learning_rate, seed)


def calibration_rows(data: str, count: int) -> Sequence[Question]:
    """The first rows of a built-in task's training split, of a file or of a hub dataset.

    Raises:
        MatryoshkaError: The data cannot be found or read, or its rows have no answers.
    """
    parsed = parse_data(data)
    if "task" in parsed:
        return get_task(parsed["task"]).examples("train", count)
    return rows_from(load_data({**parsed, "size": count}), data)


def reorder_with_data(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    metric: Metric,
    base_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Question],
    on_batch: Callable[[int], object] | None = None,
    *,
    overwrite: bool = False,
) -> Spectra:
    """Reorder an adapter by ``activations``, ``loss`` or ``learned``: see `matryoshka_lora.serving.reorder`.

    Args:
        source: The directory of any LoRA adapter that PEFT has written.
        target: The directory to write.
        metric: ``"activations"``, ``"loss"`` or ``"learned"``.
        base_model: What it was trained on. The adapter is loaded onto it.
        tokenizer: Of the base model.
        rows: A hundred or so of the training data, or of data like it.
        on_batch: Called with the number of rows done, after each batch.
        overwrite: As for `matryoshka_lora.serving.reorder.reorder_adapter`.

    Returns:
        The singular values of each layer in the metric; for ``learned``, those of ``frobenius``.

    Raises:
        MatryoshkaError: The adapter is damaged or does not fit the model, or the target cannot be written.
    """
    check_apart(source, target)
    check_free(target, overwrite)
    dtype = open_adapter(source).dtype
    with tempfile.TemporaryDirectory() as folder:
        # In float32, since what is written here is only read again.
        spectra = reorder_adapter(source, folder, dtype=torch.float32)
        adapter = load(base_model, folder, trainable=True)
        if metric == "learned":
            learn_order_from(adapter, tokenizer, rows, on_batch=on_batch)
            adapter.save(folder)
            return rewrite_learned(folder, target, spectra, dtype, overwrite=overwrite)
        moments = measure_moments(adapter, tokenizer, rows, metric == "loss", on_batch)
        return reweigh_adapter(folder, target, metric, moments, dtype=dtype, overwrite=overwrite)


def _tokens(adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question]) -> list[Tokens]:
    """The rows in tokens, those that are longer than the model's context cut at the end, as training cuts them."""
    if not rows:
        raise MatryoshkaError("there are no rows to calibrate on; give at least one")
    questions = [tokenize(tokenizer, row) for row in rows]
    limit = context_length(adapter.model.get_base_model())
    if limit is None:
        return questions
    for number, question in enumerate(questions, start=1):
        if len(question.context) >= limit:
            raise MatryoshkaError(
                f"row {number} has no room for an answer: its prompt has {len(question.context)} tokens, and the "
                f"model's context has {limit}. Leave it out, or shorten it"
            )
    return [replace(q, completion=q.completion[: limit - len(q.context)]) for q in questions]


def _has(module: Any, adapter: str) -> bool:
    return adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Module) and hasattr(module, "base_layer")


class _Probe:
    """Adds up the moments of one layer while it is entered."""

    def __init__(self, module: Any, adapter: str, gradients: bool) -> None:
        self.factor = module.lora_A[adapter]
        rank = get_parameters(module, adapter)[1].shape[1]
        self.inner = torch.zeros(rank, rank, dtype=torch.float64)
        self.outer = torch.zeros(rank, rank, dtype=torch.float64) if gradients else None
        self.tokens = 0
        self.mask: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> None:
        self._hook = self.factor.register_forward_hook(self._forward)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def moments(self) -> Moments:
        return Moments(self.inner, self.outer)

    def _forward(self, module: nn.Module, inputs: Any, hidden: Tensor) -> None:
        if self.outer is None:
            self._add(self._kept(hidden), None)
        else:
            hidden.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(self._kept(hidden), self._kept(gradient))
            )

    def _kept(self, hidden: Tensor) -> Tensor:
        """One row per token, shape (tokens, R), without padding where the layer still has the batch's rows."""
        hidden = hidden.detach()
        if self.mask is not None and hidden.shape[:-1] == self.mask.shape:
            return hidden[self.mask].float()
        if hidden.ndim > 3:  # convolutions: the rank is the second dimension
            hidden = hidden.movedim(1, -1)
        return hidden.reshape(-1, hidden.shape[-1]).float()

    def _add(self, hidden: Tensor, gradient: Tensor | None) -> None:
        self.tokens += len(hidden)
        if gradient is None:
            self.inner += (hidden.T @ hidden).cpu().double()  # in this order: some devices have no float64
            return
        # Scaled before they are squared: a gradient of one token among many is small.
        weight_in, weight_out = gradient.norm(dim=1, keepdim=True), hidden.norm(dim=1, keepdim=True)
        left, right = hidden * weight_in, gradient * weight_out
        self.inner += (left.T @ left).cpu().double()
        self.outer += (right.T @ right).cpu().double()


def _run(model: Any, batch: list[Tokens], pad: int, probes: list[_Probe], gradients: bool) -> None:
    ids, mask, is_answer = pad_rows(batch, pad, model.device)
    for probe in probes:
        probe.mask = mask
    if gradients:
        _loss(model, ids, mask, is_answer, "sum").backward()  # type: ignore[no-untyped-call]
    else:  # one position is enough: the layers below are computed in full
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=1)


def _loss(model: Any, ids: Tensor, mask: Tensor, is_answer: Tensor, reduction: str) -> Tensor:
    """Of the completions' tokens."""
    return cross_entropy(*_answers(model, ids, mask, is_answer), reduction=reduction)


def _divergence(model: Any, ids: Tensor, mask: Tensor, is_answer: Tensor, teacher: Tensor) -> Tensor:
    """From the teacher's log probabilities, mean over the completions' tokens."""
    found = _answers(model, ids, mask, is_answer)[0].log_softmax(dim=-1)
    return kl_div(found, teacher, reduction="batchmean", log_target=True)


def _answers(model: Any, ids: Tensor, mask: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, float32, that predict the completions' tokens, and these; computed only where a row has one."""
    is_answer = is_answer[:, 1:]
    kept = is_answer.any(dim=0).nonzero().squeeze(1)
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=kept).logits
    here = is_answer[:, kept]
    return logits[here].float(), ids[:, 1:][:, kept][here]
