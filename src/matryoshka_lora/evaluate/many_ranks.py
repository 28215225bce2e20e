"""lm-evaluation-harness' Hugging Face backend, with the answers of all ranks computed at once.

The rows of one batch have ranks of their own. What many requests begin with is read once for each rank, and its keys
and values are copied for them. The choices of a question branch from the keys and values of its context.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from matryoshka_lora.errors import MatryoshkaError

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

BATCH_TOKENS = 2**15
"""The tokens whose keys and values one batch holds, unless told otherwise."""

_LOGITS = 2**27
"""The most logits of one forward: 512 MiB in float32."""

_GROUP_COST = 256
"""A shared prefix is worth a pass of its own if it saves more than this many tokens at each rank."""

_ROOM = 64
"""Spare columns of a cache, so that a step of generation writes in place."""

_LEAVE = 1 / 8
"""The share of rows that are over before they leave a batch: leaving copies the cache of those that stay."""

_REFILL = 3 / 4
"""Waiting prompts join a batch when this share of its rows, or less, still generates."""

_HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"}
_HARMLESS |= {"max_length", "max_new_tokens", "transformers_version", "cache_implementation", "use_cache", "typical_p"}
"""Settings of generation that do not change which token greedy decoding takes."""

Tokens = tuple[int, ...]


class Tree(NamedTuple):
    """A context with what all its continuations begin with, and where they differ.

    Attributes:
        tokens: Context and common beginning.
        start: How many of them are the context.
        branches: The number of each request, and its tokens after the common beginning: at least one.
    """

    tokens: Tokens
    start: int
    branches: list[tuple[int, Tokens]]


class Prompt(NamedTuple):
    """A prompt, and the number of its request."""

    tokens: Tokens
    number: int


@dataclass
class Answer:
    """What one row has written until now."""

    number: int
    rank: int
    made: list[int] = field(default_factory=list)
    over: bool = False


@dataclass
class Rows:
    """Rows of one batch that have been read: they end at the same column, and stand behind padding.

    Attributes:
        ranks: One for each row.
        pads: The columns of padding before each row's first token.
        cache: Keys and values of all columns.
    """

    ranks: list[int]
    pads: list[int]
    cache: DynamicCache

    @property
    def columns(self) -> int:
        """The columns of the cache, padding included."""
        return int(self.cache.get_seq_length())

    def select(self, rows: Sequence[int]) -> Rows:
        """Return some of the rows, in a cache of their own without columns that are padding in all of them."""
        pads = [self.pads[row] for row in rows]
        spare, cache = min(pads), new_cache()
        for number, layer in enumerate(self.cache.layers):
            index = torch.tensor(rows, device=layer.keys.device)
            keys, values = (each[:, :, spare:].index_select(0, index) for each in (layer.keys, layer.values))
            cache.update(keys, values, number)
        return Rows([self.ranks[row] for row in rows], [pad - spare for pad in pads], cache)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Return the rows of several batches as one."""
        if len(parts) == 1:
            return parts[0]
        columns, cache = max(part.columns for part in parts), new_cache()
        for number in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[number] for part in parts]
            cache.update(*(_aligned([getattr(each, kind) for each in layers]) for kind in ("keys", "values")), number)
        pads = [pad + columns - part.columns for part in parts for pad in part.pads]
        return Rows([rank for part in parts for rank in part.ranks], pads, cache)


class GrowingLayer(DynamicLayer):
    """A layer of `DynamicCache` that writes new columns into spare room; the original copies all columns each time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns to keys and values of shape (rows, heads, columns, features)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, more = self.get_seq_length(), key_states.shape[-2]
        rooms = self._rooms
        if rooms is None or self.keys is not self._views[0] or rooms[0].shape[-2] < length + more:
            rooms = (_roomy(self.keys, key_states, length), _roomy(self.values, value_states, length))
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[:, :, length : length + more] = states
        self.keys, self.values = (room[:, :, : length + more] for room in rooms)
        self._rooms, self._views = rooms, (self.keys, self.values)
        return self.keys, self.values


def _roomy(old: Tensor, states: Tensor, length: int) -> Tensor:
    shape = (*states.shape[:-2], length + states.shape[-2] + _ROOM, states.shape[-1])
    room = states.new_zeros(shape)
    if length:
        room[:, :, :length] = old
    return room


def new_cache() -> DynamicCache:
    """Return an empty cache. It keeps all columns of layers with a sliding window too: masks hide the old ones."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def _aligned(parts: Sequence[Tensor]) -> Tensor:
    """Return keys or values of several batches as one, with zeros before those of fewer columns."""
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])


class ManyRanks(HFLM):  # type: ignore[misc, unused-ignore]
    """The harness' ``HFLM`` for an adapter at several ranks.

    The first request of a kind is answered at all ranks and remembered. `lora_rank` says whose answers are handed out.
    (``rank`` is the harness' name for the number of a process.)

    Args:
        adapter: Its model answers.
        tokenizer: The base model's.
        ranks: At which requests are answered; 0 is the base model.
        batch_tokens: The most tokens, over all rows, whose keys and values one batch holds.
        progress: Whether bars are shown.

    Attributes:
        lora_rank: The rank whose answers the harness gets.
        together: Whether rows of one batch have ranks of their own. False for a model with which that does not work,
            such as one with routed experts or a recurrent state: it answers at one rank after the other.
    """

    def __init__(
        self,
        adapter: NestedAdapter,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Sequence[int],
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        model: Any = adapter.model
        # HFLM ties weights anew, which PEFT may have untied, and gives the tokenizer a pad token.
        shown = SimpleNamespace(config=model.config, device=model.device)
        super().__init__(shown, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
        self._model = self.pretrained = model
        model.eval()
        self.adapter, self.ranks, self.lora_rank = adapter, tuple(ranks), ranks[0]
        self.batch_tokens, self.progress = batch_tokens or BATCH_TOKENS, progress
        self._answers: dict[tuple[str, int, int], Any] = {}
        named = inspect.signature(model.get_base_model().forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._keeps_logits = "logits_to_keep" in named
        self._takes_positions = "position_ids" in named
        self.together = self.backend == "causal" and self._reads_as_it_should()
        if self.together:
            self.batch_size_per_gpu = 2**30  # the harness hands over all requests at once

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answered("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self._answered("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self._answered("generate_until", requests)

    def _answered(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Return the answers at `lora_rank`; what was not asked before is answered at all ranks."""
        # A task that samples several answers asks the same request several times.
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            name = hash_args(kind, request.args)
            keys.append((kind + name, seen[name]))
            seen[name] += 1
        new = [number for number, key in enumerate(keys) if (*key, self.lora_rank) not in self._answers]
        if new:
            found = self._at_all_ranks(kind, [requests[number] for number in new])
            for rank, answers in found.items():
                self._answers.update({(*keys[number], rank): a for number, a in zip(new, answers, strict=True)})
        return [self._answers[*key, self.lora_rank] for key in keys]

    def _at_all_ranks(self, kind: str, requests: Sequence[Any]) -> dict[int, list[Any]]:
        together = self.together
        if kind == "generate_until":
            together = together and all(self._is_greedy(request.args[1]) for request in requests)
        if not together:
            return {rank: self._at_one_rank(kind, requests, rank) for rank in self.ranks}
        if kind == "generate_until":
            return self._generated(requests)
        # The harness' code turns requests to tokens, and adds up windows: each of its answers is an array over ranks.
        found = getattr(super(), kind)(requests, disable_tqdm=not self.progress)
        if kind == "loglikelihood_rolling":
            return {rank: [float(answer[place]) for answer in found] for place, rank in enumerate(self.ranks)}
        return {
            rank: [(float(logprob[place]), bool(greedy[place])) for logprob, greedy in found]
            for place, rank in enumerate(self.ranks)
        }

    def _at_one_rank(self, kind: str, requests: Sequence[Any], rank: int) -> list[Any]:
        together, size, before = self.together, self.batch_size_per_gpu, self.adapter.rank
        self.together, self.batch_size_per_gpu = False, 8
        self.adapter.set_rank(rank)
        try:
            return list(getattr(super(), kind)(requests, disable_tqdm=not self.progress))
        finally:
            self.together, self.batch_size_per_gpu = together, size
            self.adapter.set_rank(before)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        if not self.together:
            return list(super()._loglikelihood_tokens(requests, *args, **kwargs))
        contexts: dict[Tokens, list[tuple[int, Tokens]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise MatryoshkaError("a request has an empty continuation, which has no log-likelihood: mend the task")
            whole = tuple(context + continuation)[-(self.max_length + 1) :]
            start = len(whole) - len(continuation)
            contexts[whole[:start]].append((number, whole[start:]))
        scores = Scores(len(requests), self.ranks)
        trees = [_tree(context, branches) for context, branches in contexts.items()]
        with self._bar(len(trees) * len(self.ranks), "log-likelihoods") as bar, torch.no_grad():
            for prefix, members in shared_prefixes([tree.tokens[: tree.start] for tree in trees]):
                begin = self._begin(trees[members[0]].tokens[:prefix])
                pairs = [(trees[member], rank) for member in members for rank in self.ranks]
                pairs.sort(key=lambda pair: -len(pair[0].tokens))
                for batch in self._batches(pairs, prefix):
                    self._score(begin, batch, scores)
                    bar.update(len(batch))
        return scores.answers()

    def _score(self, begin: Rows | None, batch: Sequence[tuple[Tree, int]], scores: Scores) -> None:
        """Add up the log-likelihoods of all branches of some trees."""
        trees, ranks = [tree for tree, _ in batch], [rank for _, rank in batch]
        keep = max(len(tree.tokens) - tree.start + 1 for tree in trees)
        rows, logits = self._append(begin, [tree.tokens for tree in trees], ranks, keep)
        asked = []
        for row, (tree, rank) in enumerate(batch):
            stem = tree.tokens[tree.start :]
            for number, rest in tree.branches:
                tokens = (*stem, rest[0])
                asked += [Asked(number, rank, row, keep - len(tokens) + n, t) for n, t in enumerate(tokens)]
        scores.add(logits, asked)
        split = [(rest, row, number) for row, tree in enumerate(trees) for number, rest in tree.branches]
        split = sorted((each for each in split if len(each[0]) > 1), key=lambda each: -len(each[0]))
        lengths = [len(rest) - 1 for rest, _, _ in split]
        for start, end in _chunks(lengths, lengths, rows.columns, self._limits):
            part = split[start:end]
            longest = len(part[0][0]) - 1
            inputs = [[*rest[:-1], *[0] * (longest + 1 - len(rest))] for rest, _, _ in part]
            logits = self._read(rows.select([row for _, row, _ in part]), inputs, longest)
            scores.add(
                logits,
                [
                    Asked(number, ranks[row], place, n, token)
                    for place, (rest, row, number) in enumerate(part)
                    for n, token in enumerate(rest[1:])
                ],
            )

    def _generated(self, requests: Sequence[Any]) -> dict[int, list[str]]:
        texts = {rank: [""] * len(requests) for rank in self.ranks}
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[hash_args("settings", [request.args[1]])].append(number)
        with self._bar(len(requests) * len(self.ranks), "answers") as bar, torch.no_grad():
            for numbers in alike.values():
                limits = self._limits_of(requests[numbers[0]].args[1])
                prompts = [Prompt(self._prompt(requests[n].args[0], limits), n) for n in numbers]
                for prefix, members in shared_prefixes([prompt.tokens for prompt in prompts]):
                    begin = self._begin(prompts[members[0]].tokens[:prefix])
                    for answer in self._written(begin, [prompts[member] for member in members], limits):
                        texts[answer.rank][answer.number] = limits.text(answer.made)
                        bar.update()
        return texts

    def _is_greedy(self, given: dict[str, Any]) -> bool:
        """Return whether greedy decoding is all that is asked for, by the task and the model's own settings."""
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        own = GenerationConfig.to_diff_dict(self.model.generation_config)
        names = {*settings, *(name for name, value in own.items() if value is not None)}
        return not settings["do_sample"] and "max_length" not in settings and names - {"until", "max_gen_toks"} <= _HARMLESS

    def _limits_of(self, given: dict[str, Any]) -> Limits:
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings["until"], eos=eos)
        ends = self.model.generation_config.eos_token_id
        return Limits(settings["max_gen_toks"], until, set(ends if isinstance(ends, list) else [ends]), self.tokenizer)

    def _prompt(self, text: str, limits: Limits) -> Tokens:
        room = self.max_length - limits.most
        if room <= 0:
            raise MatryoshkaError(
                f"the task asks for up to {limits.most} tokens, and the model holds {self.max_length}: set max_gen_toks"
            )
        ids, _ = self.tok_batch_encode([text], left_truncate_len=room, truncation=self.truncation)
        return tuple(ids[0].tolist())

    def _written(self, begin: Rows | None, prompts: Sequence[Prompt], limits: Limits) -> Iterator[Answer]:
        """Yield finished answers. Rows that are over leave the batch, and waiting prompts take their place."""
        waiting = sorted(((p, rank) for p in prompts for rank in self.ranks), key=lambda pair: len(pair[0].tokens))
        most = max(1, self.batch_tokens // (len(waiting[-1][0].tokens) + limits.most))
        rows: Rows | None = None
        answers: list[Answer] = []
        while waiting or answers:
            running = [row for row, answer in enumerate(answers) if not answer.over]
            parts = [rows.select(running)] if rows is not None and running else []
            answers = [answers[row] for row in running]
            if waiting and len(running) <= _REFILL * most:
                at = max(0, len(waiting) - (most - len(running)))
                new, waiting = waiting[at:][::-1], waiting[:at]
                for batch in self._batches(new, 0 if begin is None else begin.columns):
                    part, logits = self._append(begin, [p.tokens for p, _ in batch], [rank for _, rank in batch], 1)
                    started = [Answer(prompt.number, rank) for prompt, rank in batch]
                    yield from _take(logits, started, limits)
                    parts.append(part)
                    answers += started
            rows = Rows.joined(parts) if parts else None
            stay = max(_REFILL * most if waiting else 0, (1 - _LEAVE) * len(answers))
            while rows is not None and sum(not answer.over for answer in answers) > stay:
                logits = self._read(rows, [[answer.made[-1]] for answer in answers], 1)
                yield from _take(logits, answers, limits)

    def _begin(self, prefix: Tokens) -> Rows | None:
        """Read what several requests begin with, at each rank."""
        if not prefix:
            return None
        rows, _ = self._append(None, [prefix] * len(self.ranks), self.ranks, 1)
        return rows

    def _batches(self, pairs: Sequence[tuple[Any, int]], prefix: int) -> Iterator[Sequence[tuple[Any, int]]]:
        """Yield trees or prompts with their ranks, the longest first, in batches that the limits allow."""
        new = [len(item.tokens) - prefix for item, _ in pairs]
        keep = [len(item.tokens) - item.start + 1 if isinstance(item, Tree) else 1 for item, _ in pairs]
        for start, end in _chunks(new, keep, prefix, self._limits):
            yield pairs[start:end]

    @property
    def _limits(self) -> tuple[int, int, int]:
        """The most cached tokens of one batch, new tokens of one forward, and logits (in positions) of one forward."""
        return self.batch_tokens, max(1, self.batch_tokens // 8), _LOGITS // self.vocab_size

    def _append(
        self, begin: Rows | None, sequences: Sequence[Tokens], ranks: Sequence[int], keep: int
    ) -> tuple[Rows, Tensor]:
        """Read whole sequences, from where `begin` ends, as a new batch whose rows end at the same column.

        All rows read as many new tokens as the longest needs. The others read some tokens of the prefix again, instead
        of padding, and stand behind padding.
        """
        prefix, longest = (0 if begin is None else begin.columns), max(map(len, sequences))
        pads = [longest - len(tokens) for tokens in sequences]
        cache = new_cache() if begin is None else _expanded(begin, ranks, pads)
        rows = Rows(list(ranks), pads, cache)
        inputs = [[*[0] * pad, *tokens][prefix:] for pad, tokens in zip(pads, sequences, strict=True)]
        return rows, self._read(rows, inputs, keep)

    def _read(self, rows: Rows, inputs: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Let rows read more tokens, as many in each.

        Returns:
            The logits at the last ``keep`` of them, shape (rows, keep, vocabulary).
        """
        device, past = self.device, rows.columns
        ids = torch.tensor(inputs, device=device)
        columns = torch.arange(past + ids.shape[1], device=device)
        pads = torch.tensor(rows.pads, device=device)[:, None]
        more: dict[str, Any] = {self._cache_name: rows.cache}
        if any(rows.pads):
            more["attention_mask"] = (columns >= pads).long()
        if self._takes_positions:
            more["position_ids"] = (columns[past:] - pads).clamp(min=0)
        if self._keeps_logits:
            more["logits_to_keep"] = keep
        with self.adapter.rows(rows.ranks):
            logits: Tensor = self.model(ids, use_cache=True, **more).logits
        return logits[:, -keep:]

    def _reads_as_it_should(self) -> bool:
        """Return whether rows with ranks, behind padding and with a copied cache, get the logits of plain forwards.

        Architectures fail in many ways: routed experts have no rows, recurrent states no columns, some models ignore
        where a row's padding ends. One small trial finds all of them, where a list of names would age.
        """
        ids, ranks, before = list(range(3, 17)), [self.ranks[-1], self.ranks[0]], self.adapter.rank
        with torch.no_grad():
            try:
                rows, _ = self._append(None, [tuple(ids[:9]), tuple(ids[:6])], ranks, 1)
                rows = rows.select([1, 0])
                found = self._read(rows, [ids[6:10], ids[9:13]], 1)[:, 0]
            except Exception:  # each architecture has an error of its own
                return False
            try:
                for row, (rank, length) in enumerate(((ranks[1], 10), (ranks[0], 13))):
                    self.adapter.set_rank(rank)
                    plain = self.model(torch.tensor([ids[:length]], device=self.device)).logits[0, -1]
                    near = 1e-3 if plain.dtype == torch.float32 else 5e-2
                    if not torch.allclose(found[row], plain, rtol=0, atol=near * float(plain.abs().max())):
                        return False
            finally:
                self.adapter.set_rank(before)
        return True

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=f"{what} at {len(self.ranks)} ranks", disable=not self.progress, leave=False)


@dataclass(frozen=True)
class Limits:
    """Where an answer ends, as in the harness with one prompt a batch.

    Attributes:
        most: The most tokens.
        until: Texts that end it, and do not belong to it.
        ends: Tokens that end it.
        tokenizer: The base model's.
    """

    most: int
    until: list[str]
    ends: set[int | None]
    tokenizer: Any

    @cached_property
    def _look_back(self) -> list[tuple[str, int]]:
        """Each text and how many of the newest tokens the harness searches for it."""
        encode = self.tokenizer.encode
        return [(text, len(encode(text, add_special_tokens=False)) + 2) for text in self.until]

    def over(self, made: Sequence[int]) -> bool:
        """Return whether the newest token ends the answer."""
        if len(made) >= self.most or made[-1] in self.ends:
            return True
        return any(text in self.tokenizer.decode(made[-back:]) for text, back in self._look_back)

    def text(self, made: Sequence[int]) -> str:
        """Return the answer that these tokens are."""
        written = self.tokenizer.decode(made, skip_special_tokens=True)
        return str(postprocess_generated_text(written, stop=self.until, think_end_token=None))


def _take(logits: Tensor, answers: Sequence[Answer], limits: Limits) -> Iterator[Answer]:
    """Add the likeliest token to each answer that is not over; yield those that it ends."""
    for answer, token in zip(answers, logits[:, -1].float().argmax(dim=-1).tolist(), strict=True):
        if not answer.over:
            answer.made.append(token)
            answer.over = limits.over(answer.made)
            if answer.over:
                yield answer


class Asked(NamedTuple):
    """A token of a request's continuation, and the place of its logits."""

    number: int
    rank: int
    row: int
    place: int
    token: int


class Scores:
    """Log-likelihoods of requests at ranks, added up token by token.

    Args:
        requests: How many there are.
        ranks: One column for each.
    """

    def __init__(self, requests: int, ranks: Sequence[int]) -> None:
        self._column = {rank: column for column, rank in enumerate(ranks)}
        self._logprobs = np.zeros((requests, len(ranks)))
        self._greedy = np.ones((requests, len(ranks)), dtype=bool)

    def add(self, logits: Tensor, asked: Sequence[Asked]) -> None:
        """Add the log-probabilities of some tokens, by logits of shape (rows, places, vocabulary)."""
        rows, places, tokens = (
            torch.tensor([getattr(each, name) for each in asked], device=logits.device)
            for name in ("row", "place", "token")
        )
        logits = logits.float()
        found = logits[rows, places, tokens] - logits.logsumexp(dim=-1)[rows, places]
        best = logits.argmax(dim=-1)[rows, places] == tokens
        for each, logprob, is_best in zip(asked, found.tolist(), best.tolist(), strict=True):
            at = each.number, self._column[each.rank]
            self._logprobs[at] += logprob
            self._greedy[at] &= is_best

    def answers(self) -> list[tuple[Any, Any]]:
        """Return each request's log-likelihoods, and whether greedy decoding would write it, both by rank."""
        return list(zip(self._logprobs, self._greedy, strict=True))


def _tree(context: Tokens, branches: list[tuple[int, Tokens]]) -> Tree:
    continuations = [tokens for _, tokens in branches]
    stem = min(_alike(min(continuations), max(continuations)), min(map(len, continuations)) - 1)
    rests = [(number, tokens[stem:]) for number, tokens in branches]
    return Tree((*context, *continuations[0][:stem]), len(context), rests)


def _expanded(begin: Rows, ranks: Sequence[int], pads: Sequence[int]) -> DynamicCache:
    """Return the cache of a prefix for rows with ranks, each behind as much padding as it is told; columns stay."""
    cache = new_cache()
    for number, layer in enumerate(begin.cache.layers):
        device = layer.keys.device
        owners = torch.tensor([begin.ranks.index(rank) for rank in ranks], device=device)
        states = [each.index_select(0, owners) for each in (layer.keys, layer.values)]
        if any(pads):
            columns = torch.arange(begin.columns, device=device) - torch.tensor(pads, device=device)[:, None]
            at = columns.clamp(min=0)[:, None, :, None]
            states = [each.gather(2, at.expand(*each.shape)) for each in states]
        cache.update(states[0], states[1], number)
    return cache


def _chunks(
    new: Sequence[int], keep: Sequence[int], before: int, limits: tuple[int, int, int]
) -> Iterator[tuple[int, int]]:
    """Yield where stretches of rows begin and end that one forward takes.

    Args:
        new: How many tokens each row reads.
        keep: At how many of them its logits are wanted.
        before: The columns that are cached already.
        limits: As `ManyRanks._limits`.
    """
    start, longest, widest = 0, 0, 0
    for end in range(len(new)):
        longest, widest, rows = max(longest, new[end]), max(widest, keep[end]), end + 1 - start
        sizes = rows * (before + longest), rows * longest, rows * widest
        if rows > 1 and any(size > limit for size, limit in zip(sizes, limits, strict=True)):
            yield start, end
            start, longest, widest = end, new[end], keep[end]
    if new:
        yield start, len(new)


def shared_prefixes(sequences: Sequence[Tokens]) -> list[tuple[int, list[int]]]:
    """Group sequences by what they begin with, so that reading each group's prefix once saves the most tokens.

    Returns:
        For each group the length of its prefix, shorter than each of its sequences, and the places of its members.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    # Sorted, a stretch of sequences has in common what its neighbours have.
    common = [
        min(_alike(sequences[a], sequences[b]), len(sequences[a]) - 1, len(sequences[b]) - 1) for a, b in pairwise(order)
    ]

    def best(start: int, end: int) -> tuple[int, list[tuple[int, list[int]]]]:
        if end - start == 1:
            return 0, []
        least = min(common[start : end - 1])
        whole = (end - start - 1) * least - _GROUP_COST
        cuts = [start, *(i + 1 for i in range(start, end - 1) if common[i] == least), end]
        parts = [best(a, b) for a, b in pairwise(cuts)]
        saved = sum(gain for gain, _ in parts)
        if whole >= saved:
            return (whole, [(least, order[start:end])]) if whole > 0 else (0, [])
        return saved, [group for _, groups in parts for group in groups]

    groups = best(0, len(order))[1]
    rest = set(order).difference(*(members for _, members in groups))
    return [*groups, *([(0, sorted(rest))] if rest else [])]


def _alike(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
