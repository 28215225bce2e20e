"""Whether the engine gives the answers of the model's own forward: asked once of each model, before it is evaluated.

The engine exchanges a model's attention. Most architectures keep to what transformers says of such an exchange. Some do
not, and those would get wrong numbers without a word. So a few short requests are answered in both ways, at the base
model and two ranks: continuations of contexts that share a prefix or a row, or that stand in rows of different lengths,
and tokens that are generated.

Both ways round in the model's dtype, so they are not equal to the bit. How far rounding goes, the model's own forward
says: it is asked again with all that its modules give as far away as rounding may bring it. Differences are counted in
the spread of the log-probabilities at a place, so that flat ones do not look alike. A group of requests is judged by
its median: in half precision, a router that sends a token elsewhere may change one answer much.

Windows of attention are short while the model is asked, so that short requests are longer than they are. What only long
requests could show is not covered; `matryoshka_lora.loaded.rotation_limit` knows of one such thing.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.engine.generation import Prompt, read, step
from matryoshka_lora.engine.likelihood import Likelihood, Tree, score_trees
from matryoshka_lora.engine.packing import Tokens
from matryoshka_lora.engine.runner import WAY_OUT, Prefix, Runner, running
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.loaded import evaluation_mode

_WINDOW = 4
"""Tokens of a window of attention while the model is asked."""

_PREFIX, _LONG, _LONGER, _SHORT, _NEW = 8, 2, 4, 3, 3
"""Tokens of the shared prefix, of what follows it, of the short context, and the most of a continuation."""

_ALLOWANCE = 5
"""How many times as far as rounding the engine may be. By trial on the causal models of transformers 5.24 with random
weights in bfloat16: right ones were up to 2.7 times as far, wrong ones 20 times and more."""

_FLOOR = 1e-3
"""The least that is allowed. In float32, right ones were up to 2e-5 away, wrong ones 0.02 and more."""

_NOISE = 0.25
"""Where rounding alone goes further, no difference can be seen."""

_PRODUCTS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
"""What products of float32 may round as, by torch's name for it."""

_agreed: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def check_agreement(adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> int:
    """Ask a model both ways, once in a process.

    Args:
        adapter: Its ranks and mode are the same afterwards.
        tokenizer: The base model's.
        limit: The most tokens of a row, if there is a limit.

    Returns:
        The bytes of the keys and values of one token.

    Raises:
        MatryoshkaError: The answers are not the same, or it cannot be told; the message gives the reason.
    """
    model: Any = adapter.model.get_base_model()
    layers = tuple(name for name, module in model.named_modules() if hasattr(module, "lora_variant"))
    key = (adapter.name, layers, model.dtype, model.device)
    known = _agreed.setdefault(model, {})
    # Lets the layers see which dimension is the rows.
    with torch.no_grad(), adapter.rows([adapter.nesting.max_rank] * 2), _explained(model):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long, device=model.device), use_cache=False)
    if key in known:
        return known[key]
    with _explained(model), _short_windows(model):
        token_bytes, told = _compared(adapter, tokenizer, limit)
    if told:
        known[key] = token_bytes
    return token_bytes


@contextmanager
def _explained(model: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # What an exchanged attention does to an architecture that is not made for it has no common error.
    except Exception as error:
        reason = str(error) if isinstance(error, MatryoshkaError) else f"a forward pass of it fails ({error!r})"
        raise MatryoshkaError(
            f"{type(model).__name__} cannot be evaluated at several ranks at once: {reason}. Way out: {WAY_OUT}"
        ) from error


def _compared(adapter: NestedAdapter, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[int, bool]:
    """`check_agreement`'s result, and whether there was something to compare."""
    model: Any = adapter.model.get_base_model()
    ranks = [*([0] if adapter.has_base else []), *sorted({adapter.ranks[0], adapter.ranks[-1]})]
    texts = _Texts.drawn(_vocabulary(model, tokenizer), limit)
    with running(adapter, tokenizer, token_bytes=1) as runner:
        answers, token_bytes = _answers(runner, texts, ranks)
    own = _Own(adapter, ranks, texts.endings[0])
    rounded: dict[Tokens, list[float]] = defaultdict(list)
    away: dict[tuple[str, Tokens], list[float]] = defaultdict(list)
    for how, request, likelihood in answers:
        if not math.isfinite(own.likelihood(request)):
            return token_bytes, False  # whoever asks for a loss hears of it
        away[how, request.context].append(own.away(request, likelihood))
        if len(request.continuation) == 1:
            rounded[request.context].append(own.away(request, own.likelihood(request, rounded=True)))
    noise = max(map(median, rounded.values()))
    if noise > _NOISE:
        raise MatryoshkaError(
            f"rounding to {str(model.dtype).removeprefix('torch.')} alone changes its log-probabilities by "
            f"{noise:.2g} of their spread, so that nothing can be compared (in float32 it may)"
        )
    allowed = max(_FLOOR, _ALLOWANCE * noise)
    for (how, _), differences in away.items():
        if not median(differences) <= allowed:
            raise MatryoshkaError(
                f"{how}, the engine's log-probabilities are {median(differences):.2g} of their spread away from those "
                f"of the model's own forward, and rounding explains {allowed:.2g}"
            )
    return token_bytes, True


class _Request(NamedTuple):
    context: Tokens
    rank: int
    continuation: Tokens


class _Texts(NamedTuple):
    """What is asked: two contexts that begin alike and a short one, and continuations of one token or some."""

    shared: Tokens
    contexts: tuple[Tokens, Tokens, Tokens]
    words: list[Tokens]
    endings: list[Tokens]

    @staticmethod
    def drawn(vocabulary: Sequence[int], limit: int | None) -> _Texts:
        draw = random.Random(0)

        def some(count: int) -> Tokens:
            return tuple(draw.choice(vocabulary) for _ in range(count))

        shared = some(_PREFIX if limit is None else max(1, min(_PREFIX, limit - _LONGER - _NEW)))
        contexts = (shared + some(_LONG), shared + some(_LONGER), some(_SHORT))
        return _Texts(shared, contexts, [some(1) for _ in range(8)], [some(_NEW) for _ in range(2)])


class _Own:
    """The model's own forward, of one text at all ranks.

    Args:
        adapter: Of the model.
        ranks: Of the rows.
        ending: What is read after a context of which only the next token is asked.
    """

    def __init__(self, adapter: NestedAdapter, ranks: Sequence[int], ending: Tokens) -> None:
        self.adapter, self.ranks, self.ending = adapter, list(ranks), ending
        self._known: dict[Any, Tensor] = {}

    def logprobs(self, request: _Request, rounded: bool = False) -> Tensor:
        """Of all tokens, at each place of the continuation; if asked, after one more rounding."""
        ending = request.continuation if len(request.continuation) > 1 else self.ending
        key = (request.context, ending, rounded)
        if key not in self._known:
            model = self.adapter.model
            ids = torch.tensor([request.context + ending[:-1]] * len(self.ranks), device=model.device)
            with torch.inference_mode(), evaluation_mode(model), self.adapter.rows(self.ranks), ExitStack() as undo:
                if rounded:
                    _round_once_more(model, undo)
                logits = model(input_ids=ids, use_cache=False).logits[:, -len(ending) :]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            self._known[key] = wide.log_softmax(dim=-1)
        return self._known[key][self.ranks.index(request.rank), : len(request.continuation)]

    def likelihood(self, request: _Request, rounded: bool = False) -> float:
        """The summed log-probability of the continuation."""
        logprobs = self.logprobs(request, rounded)
        return sum(logprobs[place, token].item() for place, token in enumerate(request.continuation))

    def away(self, request: _Request, likelihood: float) -> float:
        """How far another likelihood of the continuation is from the own one, in the spread at its places.

        The spread is the standard deviation over the likelier half of the tokens: some models rule tokens out. Where
        all of them are equally likely, there is none, and the difference itself is returned.
        """
        logprobs = self.logprobs(request)
        spread = logprobs.topk(logprobs.shape[-1] // 2).values.std(dim=-1).max().item()
        return abs(likelihood - self.likelihood(request)) / (spread or 1.0)


def _answers(runner: Runner, texts: _Texts, ranks: Sequence[int]) -> tuple[list[tuple[str, _Request, float]], int]:
    """The engine's: how each was found, and the likelihood of the continuation; and the bytes of a token."""
    long, longer, short = texts.contexts
    prefix, nothing = runner.prefix(texts.shared, ranks), runner.prefix((), ranks)
    assert prefix.keys is not None
    several = {long: texts.words + texts.endings, longer: texts.words, short: texts.words}
    answers: list[tuple[str, _Request, float]] = []
    for how, after, asked in (
        ("where requests share a prefix", prefix, {long: several[long], longer: several[longer]}),
        ("where continuations share a row", nothing, several),
        ("where rows have different lengths", nothing, dict.fromkeys((long, short), texts.endings[:1])),
    ):
        requests = [_Request(context, rank, each) for context in asked for rank in ranks for each in asked[context]]
        trees: dict[tuple[Tokens, int], Tree] = {}
        for number, (context, rank, continuation) in enumerate(requests):
            tree = trees.setdefault((context, rank), Tree(context[after.length :], rank, []))
            tree.branches.append((number, continuation))
        found: dict[int, Likelihood] = {}
        score_trees(runner, after, list(trees.values()), found.__setitem__)
        answers += [(how, requests[number], likelihood.logprob) for number, likelihood in found.items()]
    for after, context, endings in ((prefix, long, texts.endings), (nothing, short, texts.endings[:1])):
        requests = [_Request(context, *each) for each in product(ranks, endings)]
        answers += [("where it generates", *each) for each in _written(runner, after, requests)]
    return answers, prefix.keys.token_bytes


def _written(runner: Runner, prefix: Prefix, requests: Sequence[_Request]) -> Iterator[tuple[_Request, float]]:
    """The likelihood of the continuations, as generation would come to write them. All contexts have one length."""
    prompts = [Prompt(number, request.rank, request.context) for number, request in enumerate(requests)]
    for batch, logits in read(runner, prefix, prompts):
        of = [requests[answer.prompt.number] for answer in batch.answers]
        found = torch.zeros(len(of), dtype=torch.float32)
        with runner.ranks(batch.ranks):
            for place in range(_NEW):
                token = torch.tensor([request.continuation[place] for request in of], device=logits.device)
                found += logits[:, -1].float().log_softmax(dim=-1).gather(1, token[:, None])[:, 0].cpu()
                for answer, request in zip(batch.answers, of, strict=True):
                    answer.made.append(request.continuation[place])
                if place + 1 < _NEW:
                    logits = step(runner, prefix, batch)
        yield from zip(of, found.tolist(), strict=True)


def _vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are words, and do not stand for an image or an end."""
    others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [token for token in range(model.config.get_text_config().vocab_size) if token not in others]


def _round_once_more(model: Any, undo: ExitStack) -> None:
    """Move what each of a model's innermost modules gives by as much as rounding may."""
    generator = torch.Generator().manual_seed(0)

    def move(_: Any, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        rounds_as = _PRODUCTS[torch.get_float32_matmul_precision()] if out.dtype == torch.float32 else out.dtype
        sign = torch.randint(2, out.shape, generator=generator).to(out.device) * 2 - 1
        return (out.float() * (1 + sign * torch.finfo(rounds_as).eps / 2)).to(out.dtype)

    for module in model.modules():
        if next(module.children(), None) is None:
            undo.callback(module.register_forward_hook(move).remove)


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """A context in which no layer looks further back than a few tokens where the architecture has windows."""
    config = model.config.get_text_config()
    with ExitStack() as undo:
        for name in ("sliding_window", "attention_chunk_size"):
            size = getattr(config, name, None)
            if isinstance(size, int) and size > _WINDOW:
                for holder in (config, *(module for module in model.modules() if getattr(module, name, 0) == size)):
                    setattr(holder, name, _WINDOW)
                    undo.callback(setattr, holder, name, size)
        yield
