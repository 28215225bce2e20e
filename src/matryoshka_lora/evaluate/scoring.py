"""Loss and accuracy of a model as it is set now, on questions that it was not trained on."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluate.questions import Judge, Question, Tokens, tokenize

BATCH_SIZE = 32
"""Questions that run together unless told otherwise."""

EXTRA_TOKENS = 8
"""How many tokens more than the longest reference answer a model may write."""


@dataclass(frozen=True)
class Scores:
    """What one model did.

    Attributes:
        loss: Mean negative log likelihood of a completion's token, in nats, over all tokens of all completions.
        accuracy: The share of questions that greedy decoding answers right, 0 to 1.
        tokens: How many tokens the loss is over.
        nll: Each question's summed negative log likelihood.
        answers: Each question's greedy answer, without special tokens.
        correct: Whether it is right.
    """

    loss: float
    accuracy: float
    tokens: int
    nll: tuple[float, ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[int], object] | None = None,
) -> Scores:
    """Held-out loss and greedy accuracy of a causal language model, at whatever rank it is set to.

    The loss is what TRL's completion-only loss is. An answer ends at the token that ends a reference answer, or after
    `EXTRA_TOKENS` more tokens than the longest of them. Loss and answer share one pass over the prompt.

    Args:
        model: A transformers or PEFT model. Its mode is the same afterwards.
        tokenizer: Its tokenizer.
        task: Judges the answers.
        examples: At least one question.
        batch_size: Questions that run together.
        on_batch: Called with the number of questions that were done after each batch.

    Raises:
        MatryoshkaError: There are no questions, one has no answer, or the loss is not finite.
    """
    if not examples:
        raise MatryoshkaError("there are no questions to score; give at least one")
    if batch_size < 1:
        raise MatryoshkaError(f"batch_size is {batch_size}; write 1 or more")
    questions = [tokenize(tokenizer, example) for example in examples]
    generation = _generation_config(model, tokenizer, questions)
    nll = [0.0] * len(questions)
    answers = [""] * len(questions)
    # Alike lengths together: padding is computed, too.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            losses, generated = _score_batch(model, [questions[i] for i in rows], generation)
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
            for i, loss, text in zip(rows, losses, texts, strict=True):
                nll[i], answers[i] = loss, text
            if on_batch is not None:
                on_batch(len(rows))
    finally:
        for module, training in modes:
            module.training = training
    tokens = sum(len(question.completion) for question in questions)
    loss = sum(nll) / tokens
    if not math.isfinite(loss):
        raise MatryoshkaError(
            f"the loss is {loss}: the model computes NaN or infinity. If training diverged, train again with a lower "
            "learning rate; a float16 base may need bf16 or fp32"
        )
    correct = tuple(task.is_correct(text, example) for text, example in zip(answers, examples, strict=True))
    return Scores(loss, sum(correct) / len(correct), tokens, tuple(nll), tuple(answers), correct)


@torch.no_grad()
def _score_batch(model: Any, batch: list[Tokens], generation: GenerationConfig) -> tuple[list[float], Tensor]:
    """Each row's summed loss, and the tokens that it generates, shape (rows, new tokens)."""
    pad, cache_name = generation.pad_token_id, _cache_name(model)
    cache = DynamicCache(config=model.config.get_text_config())
    contexts, mask = _pad_left([question.context for question in batch], pad, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if contexts.shape[1] > 1:
        model(
            input_ids=contexts[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            # An index and not the number 1, for which torch would copy a frozen output layer once for each row.
            logits_to_keep=torch.tensor([-1], device=model.device),
            **{cache_name: cache},
        )
    # The last token of the prompt predicts the first of the completion. It is also where generation starts.
    lengths = [len(question.completion) for question in batch]
    completions = _pad_right([question.completion for question in batch], pad, model.device)
    logits = model(
        input_ids=torch.cat([contexts[:, -1:], completions[:, :-1]], dim=1),
        attention_mask=torch.cat([mask, torch.ones_like(completions[:, 1:])], dim=1),
        position_ids=positions[:, -1:] + torch.arange(max(lengths), device=model.device),
        **{cache_name: copy.deepcopy(cache)},
    ).logits
    losses = [
        cross_entropy(row[:length].float(), completion[:length], reduction="sum").item()
        for row, completion, length in zip(logits, completions, lengths, strict=True)
    ]
    del logits
    shared: dict[str, Any] = {cache_name: cache}
    if any(question.context != question.prompt for question in batch):
        contexts, mask = _pad_left([question.prompt for question in batch], pad, model.device)
        shared = {}
    generated = model.generate(input_ids=contexts, attention_mask=mask, generation_config=generation, **shared)
    return losses, generated[:, contexts.shape[1] :]


def _generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[Tokens]) -> GenerationConfig:
    special = set(tokenizer.all_special_ids)
    # Some templates end a turn with another token than the tokenizer's end of sequence.
    ends = {next((token for token in question.completion if token in special), None) for question in questions}
    stop = {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max(len(question.completion) for question in questions) + EXTRA_TOKENS,
        do_sample=False,
        num_beams=1,
        # What a model's own config may set, and would not be greedy any more.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(stop),
        pad_token_id=pad,
    )


def _cache_name(model: Any) -> str:
    # transformers 5.24 renamed past_key_values.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _pad_right(rows: list[list[int]], pad: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
