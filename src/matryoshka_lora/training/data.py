"""Training data for `train_ranks`: from a Trainer, a dataset, a list, or a JSON lines file."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.examples import (
    apply_chat_template,
    common_prefix_length,
    prompt_and_completion,
    read_examples,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer

Batch = dict[str, Any]
"""The inputs of a model, with labels."""
TokenizedExample = dict[str, list[int]]
"""``input_ids`` and ``labels``."""

IGNORED_LABEL = -100
"""The label of tokens that do not count in the loss, as in transformers."""
MIN_EXAMPLES = 16
"""The fewest examples from which some can be held out for validation."""
HELD_OUT_SHARE = 1 / 8
"""The share of the examples that is held out if there is no evaluation set."""


class Split(NamedTuple):
    """What to train on, and what to validate on.

    Attributes:
        training_indices: The indices of the examples to train on, in order. They may repeat.
        validation_batches: Batches of examples that are not trained on.
    """

    training_indices: list[int]
    validation_batches: list[Batch]


@dataclass
class TrainingData:
    """Examples, how to make batches of them, and the function that computes their loss.

    Attributes:
        examples: The examples, in any form accepted by ``collate``.
        collate: Makes a batch from a list of examples.
        loss: Returns the mean loss of a batch.
        device: The device of the batches.
        batch_size: The maximum number of examples of a batch.
        from_trainer: Whether the examples are those of a Trainer.
        num_examples_seen: The number of examples that the Trainer has trained on, repetitions
            included; None if that is unknown.
        validation: The Trainer's evaluation set, if there is one.
        show_progress: Whether to show a progress bar.
    """

    examples: Sequence[Any]
    collate: Callable[[list[Any]], Mapping[str, Any]]
    loss: Callable[[Batch], Tensor]
    device: torch.device
    batch_size: int = 12
    from_trainer: bool = False
    num_examples_seen: int | None = None
    validation: TrainingData | None = None
    show_progress: bool = True

    def batches(self, indices: Sequence[int]) -> list[Batch]:
        """Return some examples in batches on the device. Batches without a label are omitted."""
        batches: list[Batch] = []
        for start in range(0, len(indices), self.batch_size):
            chunk = indices[start : start + self.batch_size]
            batch = dict(self.collate([self.examples[index] for index in chunk]))
            if (batch["labels"] != IGNORED_LABEL).any():
                batches.append(send_to_device(batch, self.device))
        return batches

    def split(self, num_training: int, max_validation: int, seed: int) -> Split:
        """Choose the examples to train on and to validate on.

        Validation uses the evaluation set if there is one. Otherwise some examples are held out: no
        example that equals one of them is trained on. Every other example is trained on once, in
        random order, before the next pass over them begins, in another order.

        Args:
            num_training: The number of examples to train on, repetitions included.
            max_validation: The maximum number of examples to validate on.
            seed: The seed of the orders.

        Raises:
            MatryoshkaError: There are too few examples, or none to validate on has a label.
        """
        digest = functools.cache(self._digest)
        held_out: set[bytes] = set()
        if self.validation is None:
            share = int(len(self.examples) * HELD_OUT_SHARE)
            indices = self._first_indices(min(max_validation, max(4, share)), seed)
            held_out = {digest(index) for index in indices}
            is_all_held_out = all(digest(i) in held_out for i in range(len(self.examples)))
            if len(self.examples) < MIN_EXAMPLES or is_all_held_out:
                raise MatryoshkaError(
                    f"The {len(self.examples)} examples are too few, or too similar, to hold some "
                    f"out for validation. Pass at least {MIN_EXAMPLES} different ones, or a "
                    "Trainer with an eval_dataset."
                )
            validation_batches = self.batches(indices)
        else:
            indices = self.validation._first_indices(max_validation, seed)
            validation_batches = self.validation.batches(indices)
        if not validation_batches:
            raise MatryoshkaError("No example to validate on has a label. Check the labels.")
        training_order = (
            index
            for permutation in _permutations(len(self.examples), seed)
            for index in permutation
            if not held_out or digest(index) not in held_out
        )
        return Split(list(islice(training_order, num_training)), validation_batches)

    def _first_indices(self, count: int, seed: int) -> list[int]:
        return next(_permutations(len(self.examples), seed))[:count]

    def _digest(self, index: int) -> bytes:
        """Return a hash of an example as the model gets it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a collator may mask tokens at random
            batch = self.collate([self.examples[index]])
        digest = hashlib.blake2b()
        for key in sorted(batch):
            value = batch[key]
            digest.update(f"{key} {getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                data = value.cpu().contiguous().flatten().view(torch.uint8)
                digest.update(data.numpy().data)
        return digest.digest()


def _permutations(size: int, seed: int) -> Iterator[list[int]]:
    """Yield random permutations indefinitely."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(size, generator=generator).tolist()


def read_training_data(
    model: PeftModel, data: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> TrainingData:
    """Return training data from a Trainer, a dataset, a list or a file. Nothing is changed.

    Args:
        model: The PEFT model, not wrapped.
        data: A Trainer that has trained the model; a dataset or a list of examples; or the path of
            a file with an example in each line, in JSON. An example has ``prompt`` and
            ``completion``, both strings or both lists of messages; or ``messages``, of which the
            last is the completion; or ``input_ids`` and ``labels``.
        tokenizer: The base model's tokenizer. A Trainer and tokenized examples need none.

    Raises:
        MatryoshkaError: There are no such examples, or this process is one of several.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and torch.distributed.get_world_size() > 1:
        raise MatryoshkaError(
            "Ranks are trained in a single process, and this is one of several. Save the adapter, "
            "then train the ranks of its folder in a single process."
        )
    if hasattr(data, "get_train_dataloader"):
        return _data_of_trainer(model, data)
    if isinstance(data, DataLoader):
        data = data.dataset
    return _data_of_examples(model, data, tokenizer)


# Examples


def _data_of_examples(
    model: PeftModel,
    data: Iterable[object] | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TrainingData:
    base = model.get_base_model()
    if base.config.is_encoder_decoder or not base.can_generate():
        raise MatryoshkaError(
            f"Training on examples supports causal LMs only, not {type(base).__name__}. Pass its "
            "Trainer instead."
        )
    max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    examples: list[TokenizedExample] = []
    for index, example in enumerate(read_examples(data)):
        tokens = _tokenize(tokenizer, example, index)
        truncated = {key: values[:max_length] for key, values in tokens.items()}
        if any(label != IGNORED_LABEL for label in truncated["labels"]):
            examples.append(truncated)
    loss = functools.partial(_completion_loss, model)
    return TrainingData(examples, _collate, loss, next(model.parameters()).device)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase | None, example: object, index: int
) -> TokenizedExample:
    """Tokenize an example as TRL's SFTTrainer does, with labels on the completion only."""
    if isinstance(example, Mapping) and "input_ids" in example and "labels" in example:
        return _without_padding(example)
    if tokenizer is None:
        raise MatryoshkaError(
            "Examples without tokens need the base model's tokenizer. Pass `tokenizer`."
        )
    pair = prompt_and_completion(example, index)
    if isinstance(pair.prompt, str):
        eos_token = tokenizer.eos_token or ""
        text = pair.prompt + str(pair.completion).removesuffix(eos_token) + eos_token
        prompt_ids = tokenizer(pair.prompt)["input_ids"]
        input_ids = tokenizer(text)["input_ids"]
    else:
        prompt, full = apply_chat_template(tokenizer, pair, index, return_dict=True)
        prompt_ids = prompt["input_ids"]
        input_ids = full["input_ids"]
    # Not the length of the prompt: tokens at the boundary may merge.
    start = common_prefix_length(prompt_ids, input_ids)
    return {"input_ids": input_ids, "labels": [IGNORED_LABEL] * start + input_ids[start:]}


def _without_padding(example: Mapping[str, Any]) -> TokenizedExample:
    mask = example.get("attention_mask", [1] * len(example["labels"]))
    tokens: TokenizedExample = {}
    for key in ("input_ids", "labels"):
        pairs = zip(example[key], mask, strict=True)
        tokens[key] = [value for value, is_attended in pairs if is_attended]
    return tokens


def _collate(examples: list[TokenizedExample]) -> Batch:
    """Return examples as one batch, padded on the right with token 0, which the mask hides."""
    input_ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    masks = [torch.ones_like(ids) for ids in input_ids]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _completion_loss(model: PeftModel, batch: Batch) -> Tensor:
    """Return the mean loss of the tokens with labels, and compute no logits of other positions."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    labels = labels[:, positions]
    has_label = labels != IGNORED_LABEL
    return cross_entropy(logits[has_label].float(), labels[has_label])


# Trainers


def _data_of_trainer(model: PeftModel, trainer: Trainer) -> TrainingData:
    """Return the examples that a Trainer trains on, with its collator, loss and precision."""
    data = _data_of_loader(model, trainer, trainer.get_train_dataloader())
    if data is None:
        raise MatryoshkaError(
            f"The examples of the {type(trainer).__name__} have no labels, or are streamed and "
            "cannot be indexed. Pass examples with a prompt and a completion."
        )
    data.num_examples_seen = _num_examples_seen(trainer, data)
    evaluation_sets = trainer.eval_dataset
    if evaluation_sets:
        first = next(iter(evaluation_sets)) if isinstance(evaluation_sets, Mapping) else None
        data.validation = _data_of_loader(model, trainer, trainer.get_eval_dataloader(first))
    return data


def _num_examples_seen(trainer: Trainer, data: TrainingData) -> int | None:
    num_batches = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    if num_batches == 0:
        return None  # this Trainer has not trained the adapter
    num_examples: int = num_batches * data.batch_size
    if trainer.state.epoch:  # the last batch of an epoch may be smaller
        num_examples = min(num_examples, round(trainer.state.epoch * len(data.examples)))
    return num_examples


def _data_of_loader(
    model: PeftModel, trainer: Trainer, loader: DataLoader[Any]
) -> TrainingData | None:
    """Return the examples of a Trainer's loader, or None if they have no indices or no labels."""
    examples: Any = loader.dataset
    if isinstance(examples, IterableDataset) or not len(examples):
        return None
    batch = loader.collate_fn([examples[0]])
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return None
    return TrainingData(
        examples,
        loader.collate_fn,
        functools.partial(_trainer_loss, trainer, model),
        next(model.parameters()).device,
        # The state's is smaller if auto_find_batch_size has reduced it to fit into memory.
        batch_size=trainer.state.train_batch_size or trainer.args.train_batch_size,
        from_trainer=True,
        show_progress=not trainer.args.disable_tqdm,
    )


def _trainer_loss(trainer: Trainer, model: PeftModel, batch: Batch) -> Tensor:
    """Return the mean loss of a batch as the Trainer computes it."""
    arguments: dict[str, Tensor] = {}
    if trainer.compute_loss_func:
        arguments["num_items_in_batch"] = (batch["labels"] != IGNORED_LABEL).sum()
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(model, dict(batch), **arguments)
    # TRL would average these losses into the metrics of its next evaluation.
    metrics = getattr(trainer, "_metrics", None)
    if isinstance(metrics, dict) and isinstance(metrics.get("eval"), dict):
        metrics["eval"].clear()
    return loss
