"""lm-evaluation-harness' Hugging Face backend, with the answers of all ranks computed at once.

The rows of one batch have ranks of their own. What many requests begin with is read once for each
rank, and its keys and values are copied for them. The choices of a question branch from the keys
and values of its context.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.batch import (
    Answer,
    Limits,
    Rows,
    Scores,
    Tokens,
    Tree,
    shared_prefix,
    tree_of,
)

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

BATCH_TOKENS = 2**15
_LOGITS = 2**27  # the most logits of one forward: 512 MiB in float32
_LEAVE = 1 / 8  # the share of rows that is over before they leave: leaving copies the others' cache
_REFILL = 3 / 4  # waiting prompts join a batch when this share of its rows or less still generates
_PLAIN_SETTINGS = {  # those that do not change which token greedy decoding takes
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "transformers_version"),
    *("until", "max_gen_toks", "cache_implementation"),
}


class ManyRanks(HFLM):  # type: ignore[misc, unused-ignore]
    """The harness' ``HFLM`` for an adapter at several ranks.

    A request is answered at all ranks when it first comes, and the answers are remembered.

    Args:
        adapter, tokenizer: The adapter to evaluate, and its base model's tokenizer.
        ranks: The ranks; 0 is the base model.
        batch_tokens: The most tokens, over all rows, whose keys and values one batch holds.
        progress: Whether bars are shown.

    Attributes:
        lora_rank: The rank whose answers the harness gets. (Its ``rank`` is a process' number.)
        together: Whether rows of one batch have ranks of their own. A model with which that does
            not work, such as one with routed experts, answers at one rank after the other.
    """

    def __init__(
        self,
        adapter: NestedAdapter,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Sequence[int],
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        model: Any = adapter.model.eval()
        # HFLM would tie weights that PEFT has untied, and give the tokenizer a pad token.
        read = SimpleNamespace(config=model.config, device=model.device)
        alone = "longrope" in str(model.config)  # its frequencies are those of the longest row
        self._at_once = 1 if alone else 8
        super().__init__(read, tokenizer=copy.deepcopy(tokenizer), batch_size=self._at_once)
        self._model = self.pretrained = model
        self.adapter, self.ranks, self.lora_rank = adapter, list(ranks), ranks[0]
        self.batch_tokens, self.progress = batch_tokens or BATCH_TOKENS, progress
        self._answers: dict[tuple[Any, ...], Any] = {}
        self._takes = set(inspect.signature(model.get_base_model().forward).parameters)
        with adapter.rows(ranks):  # raises unless it is active, not merged, and has these ranks
            pass
        self.together = not alone and self.backend == "causal" and self._reads_right()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return log-likelihoods, and whether they are greedy, at `lora_rank`."""
        return self._answered("loglikelihood", requests)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[Any]:
        """Return log-likelihoods of whole texts at `lora_rank`."""
        return self._answered("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Return texts at `lora_rank`."""
        return self._answered("generate_until", requests)

    def _answered(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        # A task that samples several answers asks the same request several times.
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            name = hash_args(kind, request.args)
            keys.append((name, seen[name]))
            seen[name] += 1
        tasks: dict[Any, list[int]] = defaultdict(list)  # questions of one task have the same shots
        for n, key in enumerate(keys):
            if (*key, self.lora_rank) not in self._answers:
                tasks[requests[n].task_name].append(n)
        for new in tasks.values():
            found = self._at_all_ranks(kind, [requests[n] for n in new])
            for rank, answers in found.items():
                for n, answer in zip(new, answers, strict=True):
                    self._answers[*keys[n], rank] = answer
        return [self._answers[*key, self.lora_rank] for key in keys]

    def _at_all_ranks(self, kind: str, requests: Sequence[Any]) -> dict[int, list[Any]]:
        generates, ask = kind == "generate_until", getattr(super(), kind)
        if self.together and generates and all(self._is_greedy(each.args[1]) for each in requests):
            return self._generated(requests)
        if self.together and not generates:
            # The harness' code makes tokens of requests and adds up windows. Our
            # `_loglikelihood_tokens` returns one entry per rank to it.
            self.batch_size_per_gpu = 2**30
            found = ask(requests, disable_tqdm=not self.progress)
            places = enumerate(self.ranks)
            return {rank: [_at(place, answer) for answer in found] for place, rank in places}
        together, before, answers = self.together, self.adapter.rank, {}
        self.together, self.batch_size_per_gpu = False, self._at_once
        try:
            for rank in self.ranks:
                self.adapter.set_rank(rank)
                answers[rank] = ask(requests, disable_tqdm=not self.progress)
        finally:
            self.adapter.set_rank(before)
            self.together = together
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        if not self.together:
            return list(super()._loglikelihood_tokens(requests, *args, **kwargs))
        contexts: dict[Tokens, list[tuple[int, Tokens]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            length, most = len(continuation), self.max_length
            if not 0 < length <= most:
                raise MatryoshkaError(
                    f"a continuation of {length} tokens cannot be scored: it takes 1 to {most}"
                )
            whole = tuple(context + continuation)[-(most + 1) :]
            start = len(whole) - length
            contexts[whole[:start]].append((number, whole[start:]))
        trees = [tree_of(context, branches) for context, branches in contexts.items()]
        scores = Scores(len(requests), self.ranks)
        with self._bar(len(trees), "log-likelihoods") as bar, torch.no_grad():
            begin = self._begin(trees)
            for batch in self._batches([(t, rank) for t in trees for rank in self.ranks], begin):
                self._score(begin, batch, scores)
                bar.update(len(batch))
        return list(zip(scores.logprobs, scores.greedy, strict=True))

    def _score(self, begin: Rows | None, batch: list[tuple[Tree, int]], scores: Scores) -> None:
        """Add up the log-likelihoods of the branches of some trees."""
        ranks, keep = [rank for _, rank in batch], max(tree.keep for tree, _ in batch)
        rows, logits = self._append(begin, batch, keep)
        asked, split = [], []
        for row, (tree, rank) in enumerate(batch):
            for number, rest in tree.branches:
                tokens = (*tree.tokens[tree.start :], rest[0])
                asked += [
                    (number, rank, row, keep - len(tokens) + n, t) for n, t in enumerate(tokens)
                ]
                if len(rest) > 1:
                    split.append((rest, row, number))
        scores.add(logits, asked)
        split.sort(key=lambda each: -len(each[0]))
        sizes = [len(rest) - 1 for rest, _, _ in split]
        for start, end in self._chunks(sizes, sizes, rows.columns):
            part, longest = split[start:end], sizes[start]
            inputs = [(*rest[:-1], *(0,) * (longest + 1 - len(rest))) for rest, _, _ in part]
            logits = self._read(rows.select([row for _, row, _ in part]), inputs, longest)
            scores.add(
                logits,
                [
                    (number, ranks[row], place, n, token)
                    for place, (rest, row, number) in enumerate(part)
                    for n, token in enumerate(rest[1:])
                ],
            )

    def _generated(self, requests: Sequence[Any]) -> dict[int, list[str]]:
        texts = {rank: [""] * len(requests) for rank in self.ranks}
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[hash_args("", [request.args[1]])].append(number)
        with self._bar(len(requests), "answers") as bar, torch.no_grad():
            for numbers in alike.values():
                limits = self._limits(requests[numbers[0]].args[1])
                prompts = [self._prompt(n, requests[n].args[0], limits) for n in numbers]
                for answer in self._written(self._begin(prompts), prompts, limits):
                    texts[answer.rank][answer.number] = limits.text(answer)
                    bar.update()
        return texts

    def _is_greedy(self, given: dict[str, Any]) -> bool:
        """Return whether task and model ask for greedy decoding and nothing else."""
        settings, own = normalize_gen_kwargs(given), self.model.generation_config.to_diff_dict()
        names = {*settings, *(name for name, value in own.items() if value and name[0] != "_")}
        return not settings["do_sample"] and "max_length" not in given and names <= _PLAIN_SETTINGS

    def _limits(self, given: dict[str, Any]) -> Limits:
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings["until"], eos=eos)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Limits(settings["max_gen_toks"], until, ends, self.tokenizer)

    def _prompt(self, number: int, text: str, limits: Limits) -> Tree:
        room = self.max_length - limits.most
        if room <= 0:
            raise MatryoshkaError(
                f"an answer may have {limits.most} tokens, and the model holds {self.max_length}: "
                "leave the long row out, or set a smaller max_gen_toks in the task's YAML"
            )
        ids, _ = self.tok_batch_encode([text], truncation=self.truncation)
        if ids.shape[1] > room:
            warnings.warn("prompts that the model cannot hold lose their beginning", stacklevel=2)
        tokens = tuple(ids[0, -room:].tolist())
        return Tree(tokens, len(tokens), [(number, ())])

    def _written(self, begin: Rows | None, prompts: list[Tree], limits: Limits) -> Iterator[Answer]:
        """Yield finished answers, and replace their rows by waiting prompts."""
        pairs = [(tree, rank) for tree in prompts for rank in self.ranks]
        pairs.sort(key=lambda pair: len(pair[0].tokens))
        most = max(1, self.batch_tokens // (len(pairs[-1][0].tokens) + limits.most))
        rows: Rows | None = None
        answers: list[Answer] = []
        while pairs or not all(answer.over for answer in answers):
            running = [row for row, answer in enumerate(answers) if not answer.over]
            parts = [rows.select(running)] if rows is not None and running else []
            answers = [answers[row] for row in running]
            if len(running) <= _REFILL * most:
                at = max(0, len(pairs) - most + len(running))
                for batch in self._batches(pairs[at:], begin):
                    part, logits = self._append(begin, batch, 1)
                    new = [Answer(tree.branches[0][0], rank) for tree, rank in batch]
                    yield from limits.take(logits, new)
                    parts, answers = [*parts, part], answers + new
                del pairs[at:]
            stay = max(_REFILL * most if pairs else 0, (1 - _LEAVE) * len(answers))
            rows = Rows.join(parts)
            with self.adapter.rows(rows.ranks):  # once, because opening it looks at all layers
                while sum(not answer.over for answer in answers) > stay:
                    logits = self._forward(rows, [answer.made[-1:] for answer in answers], 1)
                    yield from limits.take(logits, answers)

    def _begin(self, trees: list[Tree]) -> Rows | None:
        """Read what all contexts begin with, at each rank."""
        prefix = shared_prefix([tree.tokens[: tree.start] for tree in trees])
        if not prefix or len(trees) == 1:
            return None
        tree = Tree(prefix, len(prefix), [])
        return self._append(None, [(tree, rank) for rank in self.ranks], 1)[0]

    def _batches(
        self, pairs: list[tuple[Tree, int]], begin: Rows | None
    ) -> Iterator[list[tuple[Tree, int]]]:
        """Yield trees with their ranks in batches that the limits allow, the longest first."""
        pairs = sorted(pairs, key=lambda pair: -len(pair[0].tokens))
        before = 0 if begin is None else begin.columns
        new = [len(tree.tokens) - before for tree, _ in pairs]
        for start, end in self._chunks(new, [tree.keep for tree, _ in pairs], before):
            yield pairs[start:end]

    def _chunks(self, new: list[int], keep: list[int], before: int) -> Iterator[tuple[int, int]]:
        """Yield from which to which row one forward goes, by each row's new tokens and logits."""
        # On a CPU, small forwards have less padding and stay in its caches.
        most_new = 512 if self.device.type == "cpu" else max(1, self.batch_tokens // 8)
        limits = self.batch_tokens, most_new, _LOGITS // self.vocab_size
        start = 0
        for end in range(1, len(new) + 1):
            rows = end + 1 - start
            most = [max(sizes[start : end + 1]) for sizes in (new, keep)]
            sizes = rows * (before + most[0]), rows * most[0], rows * most[1]
            if end == len(new) or any(a > b for a, b in zip(sizes, limits, strict=True)):
                yield start, end
                start = end

    def _append(
        self, begin: Rows | None, batch: list[tuple[Tree, int]], keep: int
    ) -> tuple[Rows, Tensor]:
        """Read trees behind a prefix, as rows that end at the same column.

        All rows read as many new tokens as the longest needs. The others read some tokens of the
        prefix again, instead of padding, and stand behind padding.
        """
        sequences, ranks = [tree.tokens for tree, _ in batch], [rank for _, rank in batch]
        longest = max(map(len, sequences))
        pads = [longest - len(tokens) for tokens in sequences]
        rows = Rows(ranks, pads) if begin is None else begin.expand(ranks, pads)
        inputs = [((0,) * n + s)[rows.columns :] for n, s in zip(pads, sequences, strict=True)]
        return rows, self._read(rows, inputs, keep)

    def _read(self, rows: Rows, inputs: Sequence[Sequence[int]], keep: int) -> Tensor:
        with self.adapter.rows(rows.ranks):
            return self._forward(rows, inputs, keep)

    def _forward(self, rows: Rows, inputs: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Let rows read more tokens at the ranks that stand; return the last ``keep`` logits."""
        past, ids = rows.columns, torch.tensor(inputs, device=self.device)
        columns = torch.arange(past + ids.shape[1], device=self.device)
        pads = torch.tensor(rows.pads, device=self.device)[:, None]
        more = {
            "cache": rows.cache,
            "past_key_values": rows.cache,
            "attention_mask": (columns >= pads).long() if any(rows.pads) else None,
            "position_ids": (columns[past:] - pads).clamp(min=0),
            "logits_to_keep": keep,
        }
        if "cache" in self._takes:  # the newer name
            del more["past_key_values"]
        more = {name: value for name, value in more.items() if name in self._takes}
        logits: Tensor = self.model(ids, use_cache=True, **more).logits
        return logits[:, -keep:]

    def _reads_right(self) -> bool:
        """Return whether rows with ranks, padding and copied caches get a plain forward's logits.

        Architectures fail in many ways: routed experts have no rows, recurrent states no columns,
        some models do not see where padding ends. One trial finds all of them.
        """
        text = "The quick brown fox jumps over the lazy dog, and sleeps under a large old tree"
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False) * 13)[:13]
        ranks, before = [self.ranks[-1], self.ranks[0]], self.adapter.rank
        trees = [Tree(ids[:9], 9, []), Tree(ids[:6], 6, [])]
        with torch.no_grad():
            try:
                rows, _ = self._append(None, list(zip(trees, ranks, strict=True)), 1)
                found = self._read(rows.select([1, 0]), [ids[6:10], ids[9:13]], 1)[:, 0]
            except Exception:  # each architecture has an error of its own
                return False
            plain = []
            for rank, length in ((ranks[1], 10), (ranks[0], 13)):
                self.adapter.set_rank(rank)
                whole = torch.tensor([ids[:length]], device=self.device)
                plain.append(self.model(whole).logits[0, -1])
            self.adapter.set_rank(before)
        near = 1e-3 if found.dtype == torch.float32 else 5e-2
        apart = (found - torch.stack(plain)).abs().max()
        return bool(apart <= near * torch.stack(plain).abs().max())

    def _bar(self, requests: int, what: str) -> Any:
        total, told = requests * len(self.ranks), f"{what} at {len(self.ranks)} ranks"
        return tqdm(total=total, desc=told, disable=not self.progress, leave=False)


def _at(place: int, answer: Any) -> Any:
    """Return one rank's entry of a log-likelihood, or of a pair of it and whether it is greedy."""
    if isinstance(answer, tuple):
        return float(answer[0][place]), bool(answer[1][place])
    return float(answer[place])
