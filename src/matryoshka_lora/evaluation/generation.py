"""Greedy generation at several ranks at once, in batches that are refilled as rows finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.evaluation.kv_cache import BatchRows, Tokens, concatenate
from matryoshka_lora.evaluation.multi_rank_model import MultiRankModel, Row

# Fraction of rows that must finish before the batch is compacted, which copies the cache.
_FINISHED_SHARE = 1 / 8
# Waiting prompts join a batch when at most this share of its maximum number of rows is left.
_REFILL_SHARE = 3 / 4


@dataclass
class Answer:
    """The answer to a prompt at a rank.

    Attributes:
        prompt: The index of the prompt.
        rank: The rank.
        tokens: The tokens that were generated so far.
        is_finished: Whether it has ended.
    """

    prompt: int
    rank: int
    tokens: list[int] = field(default_factory=list)
    is_finished: bool = False


@dataclass(frozen=True)
class StoppingCriteria:
    """When an answer ends: as in the harness with one prompt per batch.

    Attributes:
        max_new_tokens: The maximum number of tokens.
        stop_strings: Strings that end an answer, and do not belong to it.
        stop_tokens: Tokens that end an answer.
        tokenizer: The tokenizer.
    """

    max_new_tokens: int
    stop_strings: list[str]
    stop_tokens: list[int]
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _num_recent_tokens(self) -> list[int]:
        """For each stop string, the number of last tokens in which the harness searches for it."""
        return [
            len(self.tokenizer.encode(string, add_special_tokens=False)) + 2
            for string in self.stop_strings
        ]

    def is_met(self, tokens: list[int]) -> bool:
        """Return whether an answer ends with its last token."""
        if len(tokens) >= self.max_new_tokens or tokens[-1] in self.stop_tokens:
            return True
        for string, num_tokens in zip(self.stop_strings, self._num_recent_tokens, strict=True):
            if string in self.tokenizer.decode(tokens[-num_tokens:]):
                return True
        return False

    def decode(self, answer: Answer) -> str:
        """Return an answer as a string."""
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return str(postprocess_generated_text(text, stop=self.stop_strings, think_end_token=None))


@torch.no_grad()
def generate(
    model: MultiRankModel,
    prompts: Sequence[Tokens],
    criteria: StoppingCriteria,
    update_progress: Callable[[int], object],
) -> Iterator[Answer]:
    """Yield the answers to prompts at all ranks of the model, each as soon as it is finished.

    Args:
        model: The model.
        prompts: The prompts.
        criteria: When an answer ends.
        update_progress: Is called with the number of tokens that were generated, or that a finished
            answer does not need. They sum up to ``max_new_tokens`` for each prompt and rank.
    """
    prefix = model.compute_prefix(prompts)
    generation = _Generation(model, prefix, prompts, criteria, update_progress)
    while generation.waiting or generation.num_running:
        yield from generation.start_waiting()
        yield from generation.step()


class _Generation:
    """The rows that are being generated, and the prompts that wait for a free row."""

    def __init__(
        self,
        model: MultiRankModel,
        prefix: BatchRows | None,
        prompts: Sequence[Tokens],
        criteria: StoppingCriteria,
        update_progress: Callable[[int], object],
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.criteria = criteria
        self.update_progress = update_progress
        self.waiting: list[Row] = []  # the longest last
        for index, prompt in enumerate(prompts):
            self.waiting += [Row(prompt, rank, 1, source=index) for rank in model.ranks]
        self.waiting.sort(key=lambda row: len(row.tokens))
        longest = len(self.waiting[-1].tokens) + criteria.max_new_tokens
        self.max_rows = max(1, model.max_batch_tokens // longest)
        self.batch: BatchRows | None = None
        self.answers: list[Answer] = []  # one per row of the batch

    @property
    def num_running(self) -> int:
        """The number of rows that are not finished."""
        return sum(not answer.is_finished for answer in self.answers)

    def start_waiting(self) -> list[Answer]:
        """Remove finished rows, and add waiting prompts. Return those that end at once."""
        self._remove_finished()
        if not self.waiting or len(self.answers) > _REFILL_SHARE * self.max_rows:
            return []
        finished: list[Answer] = []
        batches = [] if self.batch is None else [self.batch]
        num_free = self.max_rows - len(self.answers)
        starting = self.waiting[-num_free:]
        del self.waiting[-num_free:]
        for rows in self.model.split_rows(starting, self.prefix):
            batch, logits = self.model.prefill(self.prefix, rows)
            answers = [Answer(row.source, row.rank) for row in rows]
            finished += self._append_tokens(logits, answers)
            batches.append(batch)
            self.answers += answers
        self.batch = concatenate(batches)
        return finished

    def _remove_finished(self) -> None:
        running = [row for row, answer in enumerate(self.answers) if not answer.is_finished]
        if self.batch is not None and len(running) < len(self.answers):
            self.batch = self.batch.select(running) if running else None
        self.answers = [self.answers[row] for row in running]

    def step(self) -> Iterator[Answer]:
        """Generate tokens until enough rows are finished. Yield the answers that end."""
        if self.batch is None:
            return
        min_running = (1 - _FINISHED_SHARE) * len(self.answers)
        if self.waiting:
            min_running = max(min_running, _REFILL_SHARE * self.max_rows)
        with self.model.at_ranks(self.batch.ranks):
            while self.num_running > min_running:
                last_tokens = [answer.tokens[-1:] for answer in self.answers]
                logits = self.model.forward(self.batch, last_tokens, num_logits=1)
                yield from self._append_tokens(logits, self.answers)

    def _append_tokens(self, logits: Tensor, answers: Sequence[Answer]) -> list[Answer]:
        """Append the most likely token to each unfinished answer. Return those that end."""
        tokens = logits[:, -1].float().argmax(dim=-1).tolist()
        finished: list[Answer] = []
        num_done = 0
        for answer, token in zip(answers, tokens, strict=True):
            if answer.is_finished:
                continue
            answer.tokens.append(token)
            num_done += 1
            if self.criteria.is_met(answer.tokens):
                answer.is_finished = True
                finished.append(answer)
                num_done += self.criteria.max_new_tokens - len(answer.tokens)
        self.update_progress(num_done)
        return finished
