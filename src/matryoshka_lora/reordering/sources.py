"""Where the rows come from that an order is learned from: a Trainer, a dataset, or rows of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase, Trainer

from matryoshka_lora.data.questions import Question, Row, Tokens, pad_rows, rows_from, tokenize
from matryoshka_lora.data.tasks import Example
from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.loaded import context_length, logits_at, pad_token, places
from matryoshka_lora.reordering.model import Data, Part
from matryoshka_lora.unofficial import prepared, training_collator

_AT_ONCE = 12
"""Rows of one's own that go through the model together, at most."""


def data_from(model: Any, data: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Data:
    """What `matryoshka_lora.NestedAdapter.reorder` takes as ``data``.

    Args:
        model: The PEFT model, not wrapped.
        data: A Trainer that has trained it; or rows: questions, or mappings with ``prompt`` and ``completion``, or
            with ``messages``, such as a dataset has.
        tokenizer: The base model's; a Trainer needs none.

    Raises:
        MatryoshkaError: It is none of these, or there are no rows.
    """
    if isinstance(data, Trainer):
        return TrainerRows(model, data)
    if not callable(tokenizer):
        raise MatryoshkaError("rows need the base model's tokenizer to be learned from: give tokenizer=")
    wanted = "give a Trainer, a dataset, or rows with prompt and completion"
    if isinstance(data, Mapping):
        raise MatryoshkaError(f"data is a {type(data).__name__} of {', '.join(map(str, data))}; {wanted}")
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise MatryoshkaError(f"data is {data!r:.80}; {wanted}")
    rows = list(data)
    if not all(isinstance(row, (Example, Row)) for row in rows):
        rows = list(rows_from(rows, "data"))
    return QuestionRows(model, rows, tokenizer)


class TrainerRows:
    """The rows that a Trainer has trained on, with its collator, loss and precision.

    Under torch.distributed all processes learn the same. Under DDP they share the rows of a step; else every one takes
    all rows.

    Args:
        model: The PEFT model, not wrapped.
        trainer: After ``train()``.
        dataset: One of the Trainer's; None is that of training, with that of evaluation as `held_out`, if it is one.

    Raises:
        MatryoshkaError: Its data are a stream, or have no labels.
    """

    def __init__(self, model: Any, trainer: Any, dataset: Any = None) -> None:
        self.dataset = trainer.train_dataset if dataset is None else dataset
        if not hasattr(self.dataset, "__len__"):
            raise MatryoshkaError(
                "the Trainer's data are a stream, of which no rows can be taken again: reorder by 'svd', or give the "
                "Trainer a dataset that is not streamed"
            )
        loads_its_own_way = type(trainer).get_train_dataloader is not Trainer.get_train_dataloader
        # One that loads its data in a way of its own leaves out itself what its model does not take.
        self.collate = trainer.data_collator if loads_its_own_way else training_collator(trainer)
        try:
            batch = self.collate([self.dataset[0]])
        except Exception as error:  # a collator may be anybody's
            raise MatryoshkaError(
                f"the Trainer's collator makes no batch of a row of its data: {one_line(error)}. Call "
                "adapter.reorder() for the SVD's order, or give rows with prompt and completion"
            ) from error
        if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
            raise MatryoshkaError(
                f"the rows of {type(trainer).__name__} have no labels by which an order could be learned: call "
                "adapter.reorder() for the SVD's order"
            )
        self.model, self.trainer = model, trainer
        self.quiet = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        # Of Adam and its kin: other optimizers have rates of another size.
        self.rate: float | None = trainer.args.learning_rate if "adam" in str(trainer.args.optim).lower() else None
        # Under DDP alone, each process is known to hold the whole model, and its passes wait for no other.
        whole = isinstance(trainer.model_wrapped, DistributedDataParallel)
        self.processes = trainer.accelerator.num_processes if whole else 1
        self.batch_size = trainer.state.train_batch_size or trainer.args.train_batch_size
        self.seen: int | None = self._seen()
        # Its value falls where answers become improbable, so that it cannot judge.
        self.is_dft = getattr(trainer.args, "loss_type", None) == "dft"
        self.held_out: Data | None = None if dataset is not None else self._of_evaluation()

    def _of_evaluation(self) -> TrainerRows | None:
        dataset = self.trainer.eval_dataset
        if isinstance(dataset, Mapping) or not hasattr(dataset, "__len__") or not len(dataset):
            return None
        try:
            return TrainerRows(self.model, self.trainer, dataset)
        except MatryoshkaError:  # it may be of another kind, for a metric of its own
            return None

    def _seen(self) -> int:
        """By the model as it is: of ``load_best_model_at_end``, that of the best step."""
        args, state = self.trainer.args, self.trainer.state
        best = state.best_global_step if args.load_best_model_at_end else None
        of_batches = 1 if self.trainer.accelerator.split_batches else args.world_size
        rows: int = state.global_step * self.batch_size * of_batches * args.gradient_accumulation_steps
        # The last batch of an epoch may be a small one.
        rows = min(rows, round(state.epoch * len(self))) if state.epoch else rows
        return round(rows * best / state.global_step) if best else rows

    def __len__(self) -> int:
        return len(self.dataset)

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[list[Part]]:
        """See `matryoshka_lora.reordering.model.Data`."""
        trainer, data = self.trainer, self.dataset
        generator = torch.Generator().manual_seed(seed)
        size = max(1, self.batch_size // max(1, trainer.args.n_gpu))
        for step in _steps(lambda: torch.randperm(len(data), generator=generator).tolist(), rows, at_once):
            chunks = _alike([data[i] for i in step], _tokens_of, min(size, -(-len(step) // self.processes)))
            batches = [prepared(trainer, self.collate(chunk)) for chunk in chunks]
            yield [
                Part(
                    _rows_of(batch),
                    int((batch["labels"] != -100).sum()),
                    batch["attention_mask"].bool() if "attention_mask" in batch else None,
                    partial(self._loss, batch),
                    self.processes > 1,
                )
                for batch in batches
            ]

    def _loss(self, inputs: dict[str, Any]) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            if self.is_dft and not torch.is_grad_enabled():
                loss: Tensor = self.model(**inputs).loss
            else:
                loss = self.trainer.compute_loss(self.model, dict(inputs))
        return loss


class QuestionRows:
    """Questions with their answers; the loss is that of the answers' tokens.

    Args:
        model: The PEFT model.
        rows: At least one.
        tokenizer: The base model's.

    Raises:
        MatryoshkaError: There are no rows, or one of them has no answer within the model's context.
    """

    def __init__(self, model: Any, rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> None:
        if not rows:
            raise MatryoshkaError("there are no rows to learn from; give at least one")
        self.model, self.pad, self.quiet = model, pad_token(tokenizer, model), False
        self.rate: float | None = None
        self.seen: int | None = None
        self.held_out: Data | None = None
        self.rows = _within_context([tokenize(tokenizer, row) for row in rows], context_length(model.get_base_model()))

    def __len__(self) -> int:
        return len(self.rows)

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[list[Part]]:
        """See `matryoshka_lora.reordering.model.Data`."""
        shuffled, generator = list(self.rows), random.Random(seed)

        def draw() -> list[Tokens]:
            generator.shuffle(shuffled)
            return list(shuffled)

        for step in _steps(draw, rows, at_once):
            yield [self._part(chunk) for chunk in _alike(step, lambda row: len(row.context + row.completion), _AT_ONCE)]

    def _part(self, rows: Sequence[Tokens]) -> Part:
        ids, mask, is_answer = pad_rows(rows, self.pad, self.model.device)
        return Part(len(rows), int(is_answer.sum()), mask, partial(_answer_loss, self.model, ids, mask, is_answer))


def _rows_of(batch: Mapping[str, Any]) -> int:
    """Of images and the like, the first tensor is what the model gets."""
    inputs = batch["input_ids"] if "input_ids" in batch else next(v for v in batch.values() if isinstance(v, Tensor))
    return len(inputs)


def _tokens_of(row: Any) -> int:
    """Of a Trainer's row; the same number for all where none is known."""
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 1


def _steps(draw: Callable[[], Sequence[Any]], rows: int, at_once: int) -> Iterator[list[Any]]:
    """So many rows in steps. All rows come before one comes again, and in a new order each time."""
    endless = chain.from_iterable(draw() for _ in count())
    for start in range(0, rows, at_once):
        yield list(islice(endless, min(at_once, rows - start)))


def _alike(step: Sequence[Any], length: Callable[[Any], int], most: int) -> list[list[Any]]:
    """A step's rows in chunks of at most so many, in which no row is more than twice as long as another."""
    if max(map(length, step)) > 2 * min(map(length, step)):
        step = sorted(step, key=length)
    chunks: list[list[Any]] = []
    for row in step:
        if chunks and len(chunks[-1]) < most and length(row) <= 2 * length(chunks[-1][0]):
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def _within_context(rows: list[Tokens], limit: int | None) -> list[Tokens]:
    """Rows that are longer than the model's context are cut at the end, as training cuts them."""
    if limit is None:
        return rows
    for number, row in enumerate(rows, start=1):
        if len(row.context) >= limit:
            raise MatryoshkaError(
                f"row {number} has no room for an answer: its prompt has {len(row.context)} tokens, and the model's "
                f"context has {limit}. Leave it out, or shorten it"
            )
    return [replace(row, completion=row.completion[: limit - len(row.context)]) for row in rows]


def _answer_loss(model: Any, ids: Tensor, mask: Tensor, is_answer: Tensor) -> Tensor:
    """The mean over the answers' tokens; logits are computed only before them."""
    positions, asked = places(is_answer[:, 1:])
    with logits_at(model, positions):
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return cross_entropy(logits[asked].float(), ids[:, 1:].gather(1, positions)[asked])
