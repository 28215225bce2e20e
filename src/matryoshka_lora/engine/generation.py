"""Greedy decoding of rows that come and go: finished ones leave the batch, waiting ones take their place.

Of transformers' generation settings, those that change a greedy answer are heeded or refused: `repetition_penalty`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from matryoshka_lora.engine.attention import Decode, KeyValues, Prefill, places
from matryoshka_lora.engine.packing import Tokens, batches
from matryoshka_lora.engine.runner import WAY_OUT, Prefix, Runner
from matryoshka_lora.errors import MatryoshkaError

_CHANGES: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "diversity_penalty": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "force_words_ids": [],
    "constraints": [],
    "sequence_bias": [],
    "stop_strings": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "max_time": None,
    "token_healing": None,
}
"""Settings that change a greedy answer, with the value that changes nothing; None and False change nothing either. The
others are heeded, or are about sampling, beams or the way of computing."""

_KNOWN = {*GenerationConfig().to_dict()} - {"eos_token_id", "max_length", "max_new_tokens"}
"""What a task may set: its end texts and its length have other names."""

_LEAVE = 1 / 8
"""The share of rows that must be done before they leave: leaving copies the keys of the rows that stay."""

_REFILL = 3 / 4
"""Waiting prompts are let in when so few rows are left of those that may run."""


class Prompt(NamedTuple):
    """A prompt of whole tokens, its place in the list of requests, and its rank."""

    number: int
    rank: int
    tokens: Tokens


@dataclass(frozen=True)
class Limits:
    """Where an answer ends.

    Attributes:
        max_new_tokens: The most tokens.
        until: Texts that end it and do not belong to it.
        end_tokens: Tokens that end it.
        tokenizer: Turns tokens to text.
        repetition_penalty: On tokens of the prompt and of the answer; 1 is none.
        until_has_special: Whether special tokens are parts of ``until``.
    """

    max_new_tokens: int
    until: tuple[str, ...]
    end_tokens: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    repetition_penalty: float = 1.0
    until_has_special: bool = False

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        until: Sequence[str],
        repetition_penalty: float,
    ) -> Limits:
        """Those of a model: the tokens of its generation config and of its tokenizer end an answer too."""
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        # A special token does not appear in the answer's text: it is looked for among the tokens.
        special = {token.content: place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
        ends = {*listed, tokenizer.eos_token_id, *(special.get(text) for text in until)} - {None}
        texts = tuple(text for text in until if text and text not in special)
        mixed = any(token in text for text in texts for token in special)
        return cls(max_new_tokens, texts, frozenset(ends), tokenizer, repetition_penalty, mixed)

    def text(self, made: Sequence[int]) -> str:
        """The answer that these tokens are, cut by one text that ends it after the other, as the harness does it."""
        text: str = self.tokenizer.decode(list(made), skip_special_tokens=True)
        for end in self.until:
            text = text.partition(end)[0]
        return text

    def over(self, made: Sequence[int]) -> bool:
        """Whether the newest token ends the answer."""
        if len(made) >= self.max_new_tokens or made[-1] in self.end_tokens:
            return True
        if not self.until:
            return False
        # A token has at least one byte: what the newest one completes cannot begin further back.
        window = max(len(text.encode()) for text in self.until) + 1
        return self._has_end(made[-window:]) and self._has_end(made)

    def _has_end(self, made: Sequence[int]) -> bool:
        skips = (True, False) if self.until_has_special else (True,)
        texts = [self.tokenizer.decode(list(made), skip_special_tokens=skip) for skip in skips]
        return any(end in text for text in texts for end in self.until)


@dataclass
class Answer:
    """The tokens that were made of an answer until now."""

    prompt: Prompt
    made: list[int] = field(default_factory=list)
    over: bool = False


@dataclass
class Batch:
    """Rows that generate together, in the order of their ranks.

    Attributes:
        answers: One for each row.
        own: Keys and values of what each row has after the shared prefix.
        lengths: How many of them are filled, shape (rows,).
    """

    answers: list[Answer]
    own: KeyValues
    lengths: Tensor

    @property
    def ranks(self) -> list[int]:
        """One for each row."""
        return [answer.prompt.rank for answer in self.answers]

    def running(self) -> list[int]:
        """The rows whose answers are not over."""
        return [row for row, answer in enumerate(self.answers) if not answer.over]

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, in any order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.lengths.device)
        return Batch([self.answers[row] for row in rows], self.own.select(index), self.lengths[index])

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """One batch of all rows that are not over, by rank."""
        enough = places(max(part.own.tokens for part in parts))
        batch = Batch(
            [answer for part in parts for answer in part.answers],
            KeyValues.concat([part.own.grown(enough) for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )
        order = sorted(batch.running(), key=lambda row: batch.answers[row].prompt.rank)
        return batch if order == list(range(len(batch.answers))) else batch.select(order)


def generate_rows(
    runner: Runner, prefix: Prefix, prompts: Sequence[Prompt], limits: Limits, put: Callable[[Answer], object]
) -> None:
    """Answer prompts that begin with one prefix; ``put`` gets an answer after each of its tokens."""
    waiting = sorted(prompts, key=lambda prompt: len(prompt.tokens))  # the longest are let in first, from the end
    longest = places(len(waiting[-1].tokens) - prefix.length + limits.max_new_tokens)
    room = runner.room.cache_tokens - prefix.length * len(prefix.row)
    most = max(1, min(runner.room.rows, room // longest))
    batch: Batch | None = None
    while waiting or batch is not None:
        running = 0 if batch is None else len(batch.running())
        if waiting and running <= _REFILL * most:
            free = min(len(waiting), most - running)
            new, waiting = waiting[len(waiting) - free :], waiting[: len(waiting) - free]
            parts = []
            for part, logits in read(runner, prefix, new):
                _write(part, logits, limits, put)
                parts.append(part)
            batch = Batch.joined(parts if batch is None else [batch, *parts])
        elif batch is not None:
            batch = batch.select(batch.running())
        if batch is not None and batch.answers:
            _advance(runner, prefix, batch, limits, put, _REFILL * most if waiting else 0)
        else:
            batch = None


def read(runner: Runner, prefix: Prefix, prompts: Sequence[Prompt]) -> Iterator[tuple[Batch, Tensor]]:
    """Prompts in batches of alike lengths, each with the logits of its answers' first tokens, (rows, 1, vocabulary)."""
    suffixes = [prompt.tokens[prefix.length :] for prompt in prompts]
    for rows in batches(list(map(len, suffixes)), len(prompts), runner.room.prefill_tokens):
        lengths = torch.tensor([len(suffixes[row]) for row in rows], device=runner.device)
        wide = int(lengths.max())
        ids = torch.tensor([[*suffixes[row], *[runner.pad] * (wide - len(suffixes[row]))] for row in rows])
        positions = (prefix.length + torch.arange(wide, device=runner.device)).expand(len(rows), -1)
        ranks = [prompts[row].rank for row in rows]
        owners = torch.tensor([prefix.row[rank] for rank in ranks], device=runner.device)
        row_pass = Prefill(positions, None, prefix.keys, owners, keep=True)
        with runner.ranks(ranks):
            logits = runner.logits(ids.to(runner.device), positions, row_pass, lengths[:, None] - 1)
        assert row_pass.new is not None
        yield Batch([Answer(prompts[row]) for row in rows], row_pass.new, lengths), logits


def step(runner: Runner, prefix: Prefix, batch: Batch) -> Tensor:
    """Read the newest token of each answer. The rows' ranks stand already.

    Returns:
        The logits of the next tokens, (rows, 1, vocabulary).
    """
    if batch.own.tokens <= int(batch.lengths.max()):
        batch.own = batch.own.grown(places(batch.own.tokens + 1))
    ranks = batch.ranks
    spans = [(bisect_left(ranks, rank), bisect_right(ranks, rank)) for rank in prefix.row]
    newest = torch.tensor([[answer.made[-1]] for answer in batch.answers], device=runner.device)
    positions = (prefix.length + batch.lengths)[:, None]
    row_pass = Decode(batch.own, batch.lengths, prefix.keys, spans)
    logits = runner.logits(newest, positions, row_pass, torch.zeros_like(newest))
    # A row that is over stays where it is until it leaves.
    over = torch.tensor([answer.over for answer in batch.answers], device=runner.device)
    batch.lengths = batch.lengths + (~over).long()
    return logits


def _advance(
    runner: Runner,
    prefix: Prefix,
    batch: Batch,
    limits: Limits,
    put: Callable[[Answer], object],
    refill: float,
) -> None:
    """Decode until so many rows are done that the batch should change."""
    rows = len(batch.answers)
    stay = max((1 - _LEAVE) * rows, refill)
    with runner.ranks(batch.ranks):
        while True:
            running = batch.running()
            if not running or (len(running) < rows and len(running) <= stay):
                return
            _write(batch, step(runner, prefix, batch), limits, put)


def _write(batch: Batch, logits: Tensor, limits: Limits, put: Callable[[Answer], object]) -> None:
    """Add the most likely token to each answer that is not over."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if limits.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(limits.repetition_penalty)
        for row, answer in enumerate(batch.answers):
            seen = torch.tensor([[*answer.prompt.tokens, *answer.made]], device=logits.device)
            logits[row, -1:] = penalty(seen, logits[row, -1:])
    for answer, token in zip(batch.answers, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
        if answer.over:
            continue
        answer.made.append(token)
        answer.over = limits.over(answer.made)
        put(answer)


def repetition_penalty(model: Any, given: Mapping[str, Any] | None = None, giver: str = "") -> float:
    """The repetition penalty of greedy answers: 1 is none.

    Args:
        model: Its own generation config counts, but for how long an answer may be: who asks for it says that.
        given: What stands in its place, as transformers' ``generate`` takes it.
        giver: Whose that is, for messages.

    Raises:
        MatryoshkaError: Another setting would change the answers.
    """
    config, given = getattr(model, "generation_config", None), given or {}
    own = {} if config is None else {name: value for name, value in config.to_dict().items() if name not in given}
    _check(own, "the model's generation config", "its generation_config.json")
    _check(given, giver, "its generation_kwargs")
    for name in given:
        if name not in _KNOWN:
            raise MatryoshkaError(f"{giver} sets {name}, which is no setting of greedy decoding: take it out")
    return float({**own, **given}.get("repetition_penalty") or 1.0)


def _check(settings: Mapping[str, Any], giver: str, place: str) -> None:
    for name, value in settings.items():
        if name in _CHANGES and value is not None and value is not False and value != _CHANGES[name]:
            raise MatryoshkaError(
                f"{giver} sets {name} to {value}, which the engine does not know: take it out of {place}, or {WAY_OUT}"
            )
