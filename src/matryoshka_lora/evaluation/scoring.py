"""Loss and accuracy at many ranks at once, on questions that were not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.data.questions import Judge, Question, end_texts, tokenize

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
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    ranks: Sequence[int],
    batch_size: int | None = None,
    on_result: Callable[[], object] | None = None,
) -> list[Scores]:
    """Held-out loss and greedy accuracy of an adapter at each rank.

    The loss is what TRL's completion-only loss is. An answer is `Engine.generate`'s: it ends at the token that ends a
    reference answer, or after `EXTRA_TOKENS` more tokens than the longest of them.

    Args:
        adapter: Its rank and mode are the same afterwards.
        tokenizer: The base model's.
        task: Judges the answers.
        examples: At least one question.
        ranks: 0 is the base model.
        batch_size: The most rows that generate together; None measures how many fit.
        on_result: Called twice for each question and rank: when its loss is known, and its answer.

    Raises:
        MatryoshkaError: There are no questions, one has no answer, a rank was not trained, or a loss is not finite;
            the message names the rank.
    """
    if not examples:
        raise MatryoshkaError("there are no questions to score; give at least one")
    engine = Engine(adapter, tokenizer, batch_size)
    questions = [tokenize(tokenizer, example) for example in examples]
    of = [rank for rank in ranks for _ in questions]

    def told(number: int, result: object) -> None:
        if on_result is not None:
            on_result()

    likelihoods = engine.loglikelihood([(q.context, q.completion) for q in questions] * len(ranks), of, told)
    tokens = sum(len(question.completion) for question in questions)
    found = []
    for number, rank in enumerate(ranks):
        mine = likelihoods[number * len(questions) : (number + 1) * len(questions)]
        nll = tuple(-likelihood.logprob for likelihood in mine)
        loss = sum(nll) / tokens
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"rank {rank}: the loss is {loss}: the model computes NaN or infinity. If training diverged, train "
                "again with a lower learning rate; a float16 base may need bf16 or fp32"
            )
        found.append((loss, nll))
    longest = max(len(question.completion) for question in questions) + EXTRA_TOKENS
    prompts = [question.prompt for question in questions] * len(ranks)
    texts = engine.generate(prompts, of, longest, end_texts(tokenizer, questions), on_result=told)
    scores = []
    for number, (loss, nll) in enumerate(found):
        answers = tuple(texts[number * len(questions) : (number + 1) * len(questions)])
        correct = tuple(task.is_correct(text, example) for text, example in zip(answers, examples, strict=True))
        scores.append(Scores(loss, sum(correct) / len(correct), tokens, nll, answers, correct))
    return scores
