"""lm-evaluation-harness as the judge: its tasks, prompts and metrics, with the engine's answers for all ranks.

The harness is run once for each rank. In the first run it asks for its answers, and the engine gives them for all ranks
at once; in the others they are there already. So every number is the harness's own.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.engine.generation import repetition_penalty
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.store import Store, request_key

try:
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    from matryoshka_lora.evaluation.tasks import SEEDS, seed
except ImportError as error:
    raise MatryoshkaError(
        f"this needs lm-evaluation-harness ({error}): install matryoshka-lora with its extra, from its repository with "
        "pip install -e '.[eval]'"
    ) from error

OnProgress = Callable[[int, int], object]
"""Called with how many answers are there and how many are wanted, of one kind of request of one task."""


class Answering(Protocol):
    """Answers requests at ranks: `matryoshka_lora.engine.engine.Engine`, or vLLM.

    Attributes:
        model: Has the config and the device of the base model, and its generation config.
        tokenizer: Of the base model.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def window(self) -> int | None:
        """By how many tokens the harness cuts a text that is longer than the model's context."""

    def encode(self, text: str) -> tuple[int, ...]:
        """As `Engine.encode`."""

    def loglikelihood(
        self, requests: Sequence[Any], ranks: Sequence[int], on_result: Callable[[int, Any], object]
    ) -> object:
        """As `Engine.loglikelihood`."""

    def generate(
        self,
        prompts: Sequence[Any],
        ranks: Sequence[int],
        max_new_tokens: int,
        until: Sequence[str],
        repetition_penalty: float,
        on_result: Callable[[int, str], object],
    ) -> object:
        """As `Engine.generate`."""


class RanksLM(HFLM):  # type: ignore[misc, unused-ignore]
    """The harness's HF backend with another way to answer: its tokenization and its requests stay.

    Args:
        engine: Answers.
        ranks: At which requests are answered, all of them when the first is asked for; 0 is the base model.
        store: Where answers are kept.
        on_progress: See `OnProgress`.

    Attributes:
        current: The rank whose answers the harness gets.
        keys: Of all requests that were asked for since it was last cleared, in their order.
    """

    def __init__(
        self, engine: Answering, ranks: Sequence[int], store: Store, on_progress: OnProgress | None = None
    ) -> None:
        # What the backend's constructor is given, it changes: it ties weights anew, which PEFT may have untied, and
        # chooses a pad token. So it gets what it reads of the model, and a copy of the tokenizer.
        read = SimpleNamespace(config=engine.model.config, device=engine.model.device)
        with _quiet():
            super().__init__(
                pretrained=read,
                tokenizer=copy.deepcopy(engine.tokenizer),
                backend="causal",
                max_length=engine.window,
            )
        self._model = self.pretrained = engine.model
        self.engine, self.ranks, self.store, self.on_progress = engine, tuple(ranks), store, on_progress
        self.current = self.ranks[0]
        self.keys: list[str] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._likelihoods([(tuple(context), tuple(continuation)) for _, context, continuation in requests])

    def _likelihoods(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
        keys = [request_key("loglikelihood", context, continuation) for context, continuation in pairs]

        def ask(wanted: list[tuple[int, int]], put: Callable[[int, Any], object]) -> None:
            self.engine.loglikelihood(
                [pairs[number] for number, _ in wanted], [rank for _, rank in wanted], on_result=put
            )

        found = self._answers(keys, ask)
        return [(logprob, greedy) for logprob, greedy in found]

    def answer_likelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of `QuestionsTask`: a context and the answer that training sees after it, as tokens."""
        return self._likelihoods([(tuple(request.args[1]), tuple(request.args[2])) for request in requests])

    def answer(self, requests: Sequence[Any]) -> list[str]:
        """Of `QuestionsTask`: an answer to a prompt of tokens."""
        return self._generated(requests, [tuple(request.args[1]) for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self._generated(requests, [self.engine.encode(request.args[0]) for request in requests])

    def _generated(self, requests: Sequence[Any], prompts: Sequence[tuple[int, ...]]) -> list[str]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        by_settings: dict[_Settings, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[_settings(request, self.model, self.max_gen_toks, eos)].append(number)
        answers: list[str] = [""] * len(requests)
        for settings, numbers in by_settings.items():
            tokens = [prompts[number] for number in numbers]
            keys = [request_key("generate", each, *settings) for each in tokens]

            def ask(
                wanted: list[tuple[int, int]],
                put: Callable[[int, Any], object],
                tokens: list[tuple[int, ...]] = tokens,
                settings: _Settings = settings,
            ) -> None:
                of = [rank for _, rank in wanted]
                self.engine.generate([tokens[number] for number, _ in wanted], of, *settings, on_result=put)

            for number, answer in zip(numbers, self._answers(keys, ask), strict=True):
                answers[number] = answer
        return answers

    def _answers(
        self, keys: Sequence[str], ask: Callable[[list[tuple[int, int]], Callable[[int, Any], object]], None]
    ) -> list[Any]:
        """The current rank's answers; what is missing at any rank is asked for first, each request once."""
        self.keys.extend(keys)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        missing = [
            (number, rank) for key, number in first.items() for rank in self.ranks if (key, rank) not in self.store
        ]
        total = len(first) * len(self.ranks)
        if missing:
            done = total - len(missing)
            self._report(done, total)

            def put(place: int, answer: Any) -> None:
                nonlocal done
                number, rank = missing[place]
                self.store.put(keys[number], rank, answer)
                done += 1
                self._report(done, total)

            ask(missing, put)
        return [self.store[key, self.current] for key in keys]

    def _report(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)


@dataclass(frozen=True)
class Judged:
    """What the harness says of one task.

    Attributes:
        results: For each rank, what the harness's ``evaluate`` returned.
        prompts: The hash of all requests, in their order: equal hashes mean equal prompts.
        requests: How many they are.
    """

    results: dict[int, dict[str, Any]]
    prompts: str
    requests: int


def judge(
    engine: Answering,
    tasks: Sequence[Task],
    ranks: Sequence[int],
    store: Store,
    num_fewshot: int | None = None,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> Judged:
    """Run the harness on some of its tasks at every rank.

    Args:
        engine: Answers.
        tasks: As `matryoshka_lora.evaluation.tasks.ask` loads them.
        ranks: 0 is the base model.
        store: Where answers are kept, and where those of an earlier run are found.
        num_fewshot: As in the harness: None leaves it to the task.
        limit: The most documents of each task.
        on_progress: See `OnProgress`.

    Raises:
        MatryoshkaError: A prompt is too long, a rank was not trained, a setting is not greedy, there are no documents,
            or there are fewer examples than shots.
    """
    lm = RanksLM(engine, ranks, store, on_progress)
    results: dict[int, dict[str, Any]] = {}
    prompts, count = "", 0
    for rank in lm.ranks:
        lm.current, lm.keys = rank, []
        with _quiet():
            found = _evaluated(lm, tasks, num_fewshot, limit)
        results[rank] = found
        prompts, count = request_key(lm.keys), len(lm.keys)
    return Judged(results, prompts, count)


def _evaluated(lm: RanksLM, tasks: Sequence[Task], num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    # What simple_evaluate does before it; that one also describes the machine, for several seconds at each rank.
    seed()
    for task in tasks:
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    loaded = {"tasks": {str(task.config.task): task for task in tasks}, "groups": {}}
    try:
        found: dict[str, Any] | None = evaluate(lm, loaded, limit=limit, log_samples=True)
    except MatryoshkaError:
        raise
    except (AssertionError, ValueError) as error:
        shots = "Error: number of fewshot samples" in str(error) or "no documents available for sampling" in str(error)
        if shots or "Sample larger than population" in str(error):
            raise MatryoshkaError(
                f"{_names(tasks)} has too few examples for so many shots: {error}. Give a smaller --num-fewshot"
            ) from error
        raise MatryoshkaError(f"the harness cannot run {_names(tasks)}: {error or type(error).__name__}") from error
    if found is None:
        raise MatryoshkaError("the harness returned nothing: run the evaluation in one process")
    return found


def _names(tasks: Sequence[Task]) -> str:
    return ", ".join(str(task.config.task) for task in tasks)


class _Settings(NamedTuple):
    """Of generation, in the order of `Engine.generate`."""

    most: int
    until: tuple[str, ...]
    repetition_penalty: float


def _settings(request: Any, model: Any, default: int, eos: str) -> _Settings:
    """What a task asks for, on top of the model's own generation config, which the harness's backend obeys too."""
    settings = normalize_gen_kwargs(request.args[-1], default)
    until = handle_stop_sequences(settings.pop("until", None), eos=eos)
    most = settings.pop("max_gen_toks")
    if settings.pop("do_sample"):
        raise MatryoshkaError(
            f"task {request.task_name} samples its answers, and the engine decodes greedily: set do_sample to false "
            "in its generation_kwargs"
        )
    return _Settings(most, tuple(until), repetition_penalty(model, settings, f"task {request.task_name}"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log of what it does at each of its runs; errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
