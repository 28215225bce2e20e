"""Rows to train on: out of a Trainer, a dataset, a list, or a file of JSON lines."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.rows import common_length, in_template, question_and_answer, read_rows

Batch = dict[str, Any]  # model inputs with labels

FEWEST, HELD_OUT = 16, 8  # fewest rows without an evaluation set; one in 8 is held out


@dataclass
class Data:
    """Rows of data, and the function that computes their loss."""

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]  # makes a batch with labels
    loss: Callable[[Batch], Tensor]  # the mean loss of a batch
    device: torch.device
    at_once: int = 12  # maximum batch size
    seen: int | None = None  # number of rows seen in training, with repetitions
    held_out: Data | None = None  # rows that are kept for evaluation
    quiet: bool = False  # show no progress

    def __post_init__(self) -> None:
        self.digest = cache(self._digest)

    def batches(self, numbers: Sequence[int]) -> list[Batch]:
        """Return some rows in batches on the model's device, without those that have no label."""
        chunks = [numbers[i : i + self.at_once] for i in range(0, len(numbers), self.at_once)]
        made = [dict(self.collate([self.rows[number] for number in chunk])) for chunk in chunks]
        return [send_to_device(b, self.device) for b in made if (b["labels"] != -100).any()]

    def split(self, count: int, judged: int, seed: int) -> tuple[list[int], list[Batch]]:
        """Return the numbers of the rows to train on, in order, and batches of those that judge.

        The evaluation rows judge. Without any, some of the data are held out: no row that equals
        one of these is trained on, in any round. All rows come before one comes again, each time
        in a new order. ``count`` rows are trained on, and at most ``judged`` are held out.

        Raises:
            MatryoshkaError: There are too few rows, or no held-out row has a label.
        """
        out: set[bytes] = set()
        judging, size = self.held_out or self, len(self.rows)
        if judging is self:
            judged = min(judged, max(4, size // HELD_OUT))
        chosen = next(_orders(len(judging.rows), seed))[:judged]
        if judging is self:
            out = {self.digest(number) for number in chosen}
            if size < FEWEST or all(self.digest(number) in out for number in range(size)):
                raise MatryoshkaError(
                    f"the {size} rows are too few, or too much alike, to hold some out that judge "
                    f"the result: give {FEWEST} different ones, or a Trainer with an eval_dataset"
                )
        judges = judging.batches(chosen)
        if not judges:
            raise MatryoshkaError("none of the rows that judge has a label: check the labels")
        endless = (number for order in _orders(size, seed) for number in order)
        kept = (number for number in endless if not out or self.digest(number) not in out)
        return list(islice(kept, count)), judges

    def _digest(self, number: int) -> bytes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a collator may mask tokens at random
            batch = self.collate([self.rows[number]])
        found = hashlib.sha256()
        for key in sorted(batch):
            value = batch[key]
            found.update(f"{key} {getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.digest()


def _orders(size: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(size, generator=generator).tolist()


def read_data(model: Any, data: Any, tokenizer: Any = None) -> Data:
    """Read rows from a Trainer, a dataset, a list or a file. Change nothing.

    Args:
        model: The PEFT model, not wrapped.
        data: A Trainer that has trained the model; a dataset or a list of rows; or the path of a
            file with a row in each line, in JSON. A row has ``prompt`` and ``completion``, both
            text or both lists of messages; or ``messages``, of which the last is the answer; or
            ``input_ids`` and ``labels``.
        tokenizer: The base model's. A Trainer and rows of tokens need none.

    Raises:
        MatryoshkaError: There are no such rows, or this process is one of several.
    """
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if parallel and torch.distributed.get_world_size() > 1:
        raise MatryoshkaError(
            "reordering from data runs in one process, and this is one of several: save the "
            "adapter, then run `matryoshka reorder FOLDER -o NEW --by trained --data FILE`"
        )
    if hasattr(data, "get_train_dataloader"):
        return _of_trainer(model, data)
    base = model.get_base_model()
    if base.config.is_encoder_decoder or not base.can_generate():
        raise MatryoshkaError(f"rows cannot train a {type(base).__name__}: give its Trainer")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    given = enumerate(read_rows(data.dataset if isinstance(data, DataLoader) else data), start=1)
    rows = [_tokens(tokenizer, row, number, limit) for number, row in given]
    rows = [row for row in rows if any(label != -100 for label in row["labels"])]
    return Data(rows, _padded, partial(_answer_loss, model), next(model.parameters()).device)


def _tokens(tokenizer: Any, row: Any, number: int, limit: int | None) -> dict[str, list[int]]:
    """Return a row's tokens as TRL's SFTTrainer makes them, with labels on the answer alone."""
    if isinstance(row, Mapping) and "input_ids" in row and "labels" in row:
        mask = row.get("attention_mask", [1] * len(row["labels"]))
        read = {key: zip(row[key], mask, strict=True) for key in ("input_ids", "labels")}
        return {key: [x for x, is_read in both if is_read][:limit] for key, both in read.items()}
    if tokenizer is None:
        raise MatryoshkaError("rows of text need the base model's tokenizer: give tokenizer=")
    chat = prompt, answer, _ = question_and_answer(row, number)
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer.removesuffix(end) + end)["input_ids"]
    else:
        both = in_template(tokenizer, chat, number, return_dict=True)
        before, whole = (each["input_ids"] for each in both)
    # The answer begins where the two token lists differ: tokens at the boundary may merge.
    start = common_length(before, whole)
    return {"input_ids": whole[:limit], "labels": ([-100] * start + whole[start:])[:limit]}


def _padded(rows: list[dict[str, list[int]]]) -> Batch:
    """Return rows as one batch. The mask hides the padding on the right, which is token 0."""
    ids, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def _answer_loss(model: Any, batch: Batch) -> Tensor:
    """Return the mean loss of the answers' tokens; logits are computed before these alone."""
    inputs, labels = dict(batch), batch["labels"][:, 1:]
    del inputs["labels"]
    places = (labels != -100).any(dim=0).nonzero()[:, 0]
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        logits = model(**inputs, logits_to_keep=places, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, places]
    wanted = labels[:, places] != -100
    return cross_entropy(logits[wanted].float(), labels[:, places][wanted])


def _of_trainer(model: Any, trainer: Any) -> Data:
    """Return the rows that a Trainer trains on, with its collator, loss and precision."""
    args, state, held_out = trainer.args, trainer.state, trainer.eval_dataset
    found = _of_loader(model, trainer, trainer.get_train_dataloader())
    if found is None:
        raise MatryoshkaError(
            f"the rows of the {type(trainer).__name__} have no labels, or are a stream, which "
            "cannot come again: give rows with prompt and completion, or reorder by 'svd'"
        )
    found.seen = state.global_step * found.at_once * args.gradient_accumulation_steps or None
    if found.seen and state.epoch:  # the last batch of an epoch may be a small one
        found.seen = min(found.seen, round(state.epoch * len(found.rows)))
    if held_out:
        first = next(iter(held_out)) if isinstance(held_out, Mapping) else None
        found.held_out = _of_loader(model, trainer, trainer.get_eval_dataloader(first))
    return found


def _of_loader(model: Any, trainer: Any, loader: Any) -> Data | None:
    """Return the rows of a Trainer's loader; None where they have no numbers or no labels."""
    if isinstance(loader.dataset, IterableDataset) or not len(loader.dataset):
        return None
    batch = loader.collate_fn([loader.dataset[0]])
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return None

    def loss(batch: Batch) -> Tensor:
        counts = {"num_items_in_batch": (batch["labels"] != -100).sum()}
        more = counts if trainer.compute_loss_func else {}
        with trainer.compute_loss_context_manager():
            found: Tensor = trainer.compute_loss(model, dict(batch), **more)
        means = getattr(trainer, "_metrics", None)
        if isinstance(means, dict) and isinstance(means.get("eval"), dict):
            means["eval"].clear()  # of TRL, whose next evaluation shall have its own
        return found

    device, args = next(model.parameters()).device, trainer.args
    at_once = trainer.state.train_batch_size or args.train_batch_size  # the first fits into memory
    return Data(loader.dataset, loader.collate_fn, loss, device, at_once, quiet=args.disable_tqdm)
