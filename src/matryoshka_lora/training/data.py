"""Training data for `train_ranks`: from a Trainer, a dataset, a list, or a JSON lines file."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, default_collate

from matryoshka_lora.errors import MatryoshkaError, wrap_errors
from matryoshka_lora.examples import (
    apply_chat_template,
    common_prefix_length,
    prompt_and_completion,
    read_examples,
)
from matryoshka_lora.tensors import restored_modes
from matryoshka_lora.training.factors import without_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

Batch = Any
"""What a loss gets: the inputs of a model with labels, pairs of DPO, or what a user's collator
returns."""
Loss = Callable[[nn.Module, Batch], Tensor]
"""Returns the mean loss of a batch on a model."""
Collate = Callable[[list[Any]], Batch]
"""Makes a batch of a list of examples."""
TokenizedExample = dict[str, list[int]]
"""``input_ids`` and ``labels``."""

_NUM_CHECKED = 8
"""The number of examples whose loss is computed twice."""

IGNORED_LABEL = -100
"""The label of tokens that do not count in the loss, as in transformers."""

# TRL's Trainers that generate the answers that they train on, such as GRPO's, have one of these.
_GENERATION_ATTRIBUTES = ("num_generations", "reward_funcs")


class NoExamplesError(MatryoshkaError):
    """The examples of a Trainer cannot be used to train ranks."""


@dataclass(frozen=True)
class Split:
    """Examples to train on, and batches to validate on.

    Attributes:
        training_indices: The indices of the examples to train on, in order. They may repeat.
        num_validation: The number of examples to validate on.
        validation_batches: Their batches, of the same size if there are several processes.
    """

    training_indices: list[int]
    num_validation: int
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
        num_examples_seen: The number of examples that the Trainer has trained on, repetitions
            included; None if that is unknown.
        validation: The evaluation set, if there is one.
        show_progress: Whether to show a progress bar.
        is_causal: Whether the model shifts the labels, so that the first one never counts.
        has_custom_loss: Whether ``loss`` is a loss of the user, which may have any unit. Others are
            in nats.
        log: Takes metrics, and the number of steps that have trained ranks. None if there is no
            Trainer to log them.
    """

    examples: Sequence[Any]
    collate: Collate
    loss: Callable[[Batch], Tensor]
    device: torch.device
    batch_size: int = 12
    num_examples_seen: int | None = None
    validation: TrainingData | None = None
    show_progress: bool = True
    is_causal: bool = True
    has_custom_loss: bool = False
    log: Callable[[dict[str, float], int], None] | None = None

    def batches(self, indices: Sequence[int], batch_size: int | None = None) -> list[Batch]:
        """Return some examples in batches on the device. Batches without a label are omitted."""
        size = batch_size or self.batch_size
        batches: list[Batch] = []
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            batch = self.collate([self.examples[index] for index in chunk])
            if self.is_causal and "labels" in batch and "shift_labels" not in batch:
                batch = {**batch, "labels": batch["labels"].clone()}
                batch["labels"][:, 0] = IGNORED_LABEL
            if num_terms(batch) > 0:
                batches.append(send_to_device(batch, self.device))
        return batches

    def sample(self, max_examples: int, seed: int) -> list[int]:
        """Return the indices of some examples, in random order."""
        return next(_permutations(len(self.examples), seed))[:max_examples]

    def split(self, num_training: int, max_validation: int, seed: int) -> Split:
        """Choose the examples to train on and to validate on.

        Validation uses the evaluation set. If there is none, it uses training examples, of which
        none is withheld: an example that only the adapter's own training has seen would favor the
        factors from before the training of the ranks. Every example is trained on once, in random
        order, before the next pass begins, in another order.

        Raises:
            NoExamplesError: No example has a label.
            MatryoshkaError: No example of the evaluation set has a label.
        """
        training_order = itertools.chain.from_iterable(_permutations(len(self.examples), seed))
        source = self if self.validation is None else self.validation
        validation_indices = source.sample(max_validation, seed)
        num_validation = len(validation_indices)
        num_batches = math.ceil(num_validation / source.batch_size)
        batch_size = math.ceil(num_validation / num_batches)
        if PartialState().num_processes > 1:
            # The loss of a Trainer may need the same number of examples in each process.
            batch_size = num_validation // num_batches
            num_validation = batch_size * num_batches
        validation_batches = source.batches(validation_indices[:num_validation], batch_size)
        if not validation_batches:
            error_type = NoExamplesError if self.validation is None else MatryoshkaError
            raise error_type("No example to validate on has a label. Check the labels.")
        return Split(
            list(itertools.islice(training_order, num_training)),
            num_validation,
            validation_batches,
        )


def num_terms(batch: Batch) -> int:
    """Return the number of terms of the mean loss: tokens with a label, or else rows."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return int((batch["labels"] != IGNORED_LABEL).sum())
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield all tensors of a batch of any form."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _permutations(size: int, seed: int) -> Iterator[list[int]]:
    """Yield random permutations indefinitely."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(size, generator=generator).tolist()


def read_training_data(
    model: nn.Module,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_data: Any = None,
    loss: Loss | None = None,
    collate: Collate | None = None,
) -> TrainingData:
    """Return training data from a Trainer, a dataset, a list or a file. Nothing is changed.

    Args:
        model: The model, with its LoRA layers.
        data: A Trainer that has trained the model; a dataset or a list of examples; or the path of
            a file with an example in each line, in JSON. An example has ``prompt`` and
            ``completion``, both strings or both lists of messages; or ``messages``, of which the
            last is the completion; or ``input_ids`` and ``labels``.
        tokenizer: The base model's tokenizer. A Trainer and tokenized examples need none.
        eval_data: Examples to validate on, in one of these forms except a Trainer. Defaults to the
            Trainer's ``eval_dataset``, the first if there are several.
        loss: Returns the mean loss of a batch of examples of any form. Defaults to the loss of the
            Trainer, or to the cross-entropy of a causal language model.
        collate: Makes a batch of a list of examples. Defaults to the ``collate_fn`` of a
            ``DataLoader``, or to ``default_collate``. It needs ``loss``.

    Raises:
        NoExamplesError: The Trainer generates its examples or streams them, or they have no labels.
        MatryoshkaError: There are no such examples, or the loss of the same examples differs.
    """
    if loss is not None or collate is not None:
        if loss is None or hasattr(data, "get_train_dataloader"):
            raise MatryoshkaError(
                "`collate` needs `loss`, and a Trainer has its own. Pass examples with `loss`, or "
                "neither."
            )
        training_data = _data_with_loss(model, data, loss, collate, "data")
        if eval_data is not None:
            training_data.validation = _data_with_loss(model, eval_data, loss, collate, "eval_data")
        return training_data
    if not hasattr(data, "get_train_dataloader"):
        training_data = _data_of_examples(model, data, tokenizer)
    else:
        trainer = data
        if any(hasattr(trainer, name) for name in _GENERATION_ATTRIBUTES):
            raise NoExamplesError(
                f"The {type(trainer).__name__} trains on answers that it generates. Pass examples "
                "with a prompt and a completion."
            )
        tokenizer = tokenizer or trainer.processing_class
        training_data = _data_of_loader(model, trainer, trainer.get_train_dataloader(), "data")
        training_data.log = functools.partial(_log, trainer)
        num_batches = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        if num_batches > 0:  # this Trainer has trained the adapter
            num_examples = num_batches * training_data.batch_size * trainer.args.world_size
            if trainer.state.epoch:  # the last batch of an epoch may be smaller
                num_in_epochs = round(trainer.state.epoch * len(training_data.examples))
                num_examples = min(num_examples, num_in_epochs)
            training_data.num_examples_seen = num_examples
        if trainer.eval_dataset and eval_data is None:
            name = None
            if isinstance(trainer.eval_dataset, Mapping):
                name = next(iter(trainer.eval_dataset))
            loader = trainer.get_eval_dataloader(name)
            training_data.validation = _data_of_loader(model, trainer, loader, "eval_data")
    if eval_data is not None:
        training_data.validation = _data_of_examples(model, eval_data, tokenizer)
    return training_data


# A loss of the user


def _data_with_loss(
    model: nn.Module, data: Any, loss: Loss, collate: Collate | None, parameter: str
) -> TrainingData:
    """Return examples with a loss of the user, after computing the loss of a few of them twice."""
    batch_size = TrainingData.batch_size
    if isinstance(data, DataLoader):
        batch_size = data.batch_size or batch_size
        collate = collate or data.collate_fn
        data = data.dataset
    if len(data) == 0:
        raise MatryoshkaError(f"`{parameter}` has no examples. Pass some.")
    training_data = TrainingData(
        data,
        collate or default_collate,
        functools.partial(loss, model),
        next(model.parameters()).device,
        batch_size,
        is_causal=False,
        has_custom_loss=True,
    )
    losses: list[float] = []
    with restored_modes(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()  # as while ranks are trained
        batches = training_data.batches(range(min(_NUM_CHECKED, batch_size, len(data))))
        for _ in range(2 if batches else 0):
            losses.append(training_data.loss(batches[0]).item())
    # Ranks are compared by their losses, which noise would hide.
    if losses and math.isfinite(sum(losses)) and not math.isclose(*losses, rel_tol=1e-3):
        raise MatryoshkaError(
            f"`loss` returned {losses[0]:g} and then {losses[1]:g} for the same examples of "
            f"`{parameter}`. Let each example have the same noise each time: store it, and the "
            "timestep, in the example."
        )
    return training_data


# Examples


def _data_of_examples(
    model: Any,
    data: DataLoader[Any] | Iterable[object] | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TrainingData:
    source: Any = data.dataset if isinstance(data, DataLoader) else data
    base = without_wrapper(model)
    if not _is_causal(base):
        raise MatryoshkaError(
            f"Examples without `loss` are for causal LMs, not {type(base).__name__}. Pass `loss`, "
            "or its Trainer."
        )
    num_embeddings = len(base.get_input_embeddings().weight)  # PEFT's has no num_embeddings
    max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    examples: list[TokenizedExample] = []
    for index, example in enumerate(read_examples(source)):
        tokens = _tokenize(tokenizer, example, index)
        truncated = {key: values[:max_length] for key, values in tokens.items()}
        if max(truncated["input_ids"], default=0) >= num_embeddings:
            raise MatryoshkaError(
                f"Example {index} of the data has token {max(truncated['input_ids'])}, but the "
                f"model has {num_embeddings} tokens. Pass the tokenizer of this model."
            )
        if any(label != IGNORED_LABEL for label in truncated["labels"][1:]):
            examples.append(truncated)
    if not examples:
        raise MatryoshkaError(
            f"No example has a token with a label within the model's {max_length} positions."
        )
    loss = functools.partial(_completion_loss, model, base)
    return TrainingData(examples, _collate, loss, next(model.parameters()).device)


def _is_causal(base_model: Any) -> bool:
    """Return whether a model generates, and is no encoder-decoder."""
    if not hasattr(base_model, "can_generate") or not base_model.can_generate():
        return False
    return not base_model.config.is_encoder_decoder


def _tokenize(
    tokenizer: PreTrainedTokenizerBase | None, example: object, index: int
) -> TokenizedExample:
    """Tokenize an example as TRL's SFTTrainer does, with labels on the completion only."""
    if isinstance(example, Mapping) and "input_ids" in example and "labels" in example:
        tokens: TokenizedExample = {}
        hint = "Pass input_ids, labels and attention_mask as lists of integers of the same length."
        with wrap_errors(f"Cannot read the tokens of example {index} of the data", hint):
            mask = example.get("attention_mask", [1] * len(example["labels"]))
            for key in ("input_ids", "labels"):
                pairs = zip(example[key], mask, strict=True)
                values = [operator.index(value) for value, is_attended in pairs if is_attended]
                tokens[key] = torch.tensor(values, dtype=torch.long).tolist()
        return tokens
    if tokenizer is None:
        raise MatryoshkaError(
            "Examples without tokens need the base model's tokenizer. Pass `tokenizer`."
        )
    pair = prompt_and_completion(example, index)
    if isinstance(pair.prompt, str):
        eos_token = tokenizer.eos_token or ""
        text = pair.prompt + str(pair.completion).removesuffix(eos_token) + eos_token
        with wrap_errors(f"Cannot tokenize example {index} of the data"):
            prompt_ids = tokenizer(pair.prompt)["input_ids"]
            input_ids = tokenizer(text)["input_ids"]
    else:
        prompt, full = apply_chat_template(tokenizer, pair, index, return_dict=True)
        prompt_ids = prompt["input_ids"]
        input_ids = full["input_ids"]
    # Not the length of the prompt: tokens at the boundary may merge.
    start = common_prefix_length(prompt_ids, input_ids)
    return {"input_ids": input_ids, "labels": [IGNORED_LABEL] * start + input_ids[start:]}


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


def _completion_loss(model: nn.Module, base: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the tokens with labels, and compute no logits of other positions."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    labels = labels[:, positions]
    has_label = labels != IGNORED_LABEL
    return cross_entropy(logits[has_label].float(), labels[has_label])


# Trainers


def _data_of_loader(
    model: nn.Module, trainer: Trainer, loader: DataLoader[Any], parameter: str
) -> TrainingData:
    """Return the examples of a Trainer's loader, after computing the loss of two of them.

    An error of the loss passes unchanged.

    Args:
        parameter: The parameter that takes other examples, ``"data"`` or ``"eval_data"``.

    Raises:
        NoExamplesError: The examples have no indices, or the training examples have no labels.
    """
    loader = getattr(loader, "_loader", loader)  # accelerate wraps it on XLA
    examples: Any = loader.dataset
    hint = f"Pass `{parameter}`, examples with a prompt and a completion."
    if isinstance(examples, IterableDataset) or not len(examples):
        raise NoExamplesError(
            f"A dataset of the {type(trainer).__name__} is streamed or empty. {hint}"
        )
    data = TrainingData(
        examples,
        loader.collate_fn,
        functools.partial(_trainer_loss, trainer, model),
        next(model.parameters()).device,
        # The state's is smaller if auto_find_batch_size has reduced it to fit into memory.
        batch_size=trainer.state.train_batch_size or trainer.args.train_batch_size,
        show_progress=not trainer.args.disable_tqdm,
        is_causal=_is_causal(without_wrapper(model)),
    )
    with torch.no_grad():
        for batch in data.batches(range(min(2, len(examples)))):  # a loss may compare rows
            # Without labels the loss of the evaluation set is an error of transformers.
            if parameter == "data" and _lacks_labels(trainer, batch):
                raise NoExamplesError(
                    f"The examples of the {type(trainer).__name__} have no labels. {hint}"
                )
            data.loss(batch)
    return data


def _lacks_labels(trainer: Trainer, batch: Batch) -> bool:
    """Return whether a batch has no label for the loss of transformers' Trainer."""
    from transformers import Trainer  # slow to import

    if type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func:
        return False
    return not (trainer.can_return_loss or any(name in batch for name in trainer.label_names))


def _trainer_loss(trainer: Trainer, model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch as the Trainer computes it."""
    arguments: dict[str, Tensor] = {}
    if trainer.compute_loss_func:
        arguments["num_items_in_batch"] = (batch["labels"] != IGNORED_LABEL).sum()
    # A Trainer would multiply the loss by the number of processes, because num_items_in_batch is
    # usually a count over all of them.
    is_averaged = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    try:
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, dict(batch), **arguments)
    finally:
        trainer.args.average_tokens_across_devices = is_averaged
    # TRL would average these losses into the metrics of its next evaluation.
    metrics = getattr(trainer, "_metrics", None)
    if isinstance(metrics, dict) and isinstance(metrics.get("eval"), dict):
        metrics["eval"].clear()
    return loss


def _log(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    """Log metrics as a Trainer does, at a step after the last one of its own training."""
    state = trainer.state
    last_step = state.global_step
    state.global_step = last_step + step
    try:
        trainer.log(metrics)
    finally:
        state.global_step = last_step


# Processes


@contextmanager
def same_outcome() -> Iterator[None]:
    """Raise an error in every process if one raises an error: the others would wait for it.

    The other processes raise a NoExamplesError, a MatryoshkaError or a RuntimeError.
    """
    failure: tuple[type[Exception], str] | None = None
    try:
        yield
    except BaseException as error:
        kind: type[Exception] = RuntimeError
        if isinstance(error, MatryoshkaError):
            kind = NoExamplesError if isinstance(error, NoExamplesError) else MatryoshkaError
        failure = kind, f"{type(error).__name__}: {error}"
        raise
    finally:
        failures = [failure]
        if PartialState().num_processes > 1:
            failures = gather_object([failure])
    for index, other in enumerate(failures):
        if other is not None:
            kind, reason = other
            raise kind(f"Process {index} failed. {reason}")
