"""What the page of ``matryoshka play`` shows: one adapter in memory, at chosen ranks. No page is made here.

An exported rank lies in the folder that the command was started in, in a folder of its own: whoever sees the page can
write nothing else.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Literal

from matryoshka_lora.adapter.loading import load_opened
from matryoshka_lora.data.questions import Row, end_texts, tokenize
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.cost import adapter_bytes, token_latency
from matryoshka_lora.evaluation.drawing import question
from matryoshka_lora.evaluation.results import Evaluation
from matryoshka_lora.evaluation.select import evaluation_file, read_evaluation
from matryoshka_lora.formats.card import changed_tokenizer, template_of
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.models import DTYPES, base_of, load_on_accelerator, load_tokenizer, needed_base
from matryoshka_lora.reordering.files import deployed
from matryoshka_lora.serving.export import Exported, export, following

if TYPE_CHECKING:
    from matryoshka_lora.evaluation.evaluate import Progress

MOST_QUESTIONS = 50
"""Of those that two ranks answer differently, so many are shown."""


@dataclass(frozen=True)
class Cost:
    """What a rank costs.

    Attributes:
        rank: From 1 to R.
        bytes: Of the factors of the exported adapter.
        milliseconds: For one generated token.
        measured: Where the time is from, in words.
    """

    rank: int
    bytes: int
    milliseconds: float
    measured: str


@dataclass(frozen=True)
class Session:
    """An adapter on its base model, and what is known of it. Made by `open_session`.

    Attributes:
        adapter: Its folder.
        base: The base model's name.
        engine: Answers at any rank.
        ranks: Those that may be chosen.
        costs: By rank.
        evaluation: The stored one, or one of the tasks that were named; None where there is neither.
        template: The text around a question that the adapter was trained with, in the place of a chat template.
        home: Exports lie in it.
        revision: Of the base model.
    """

    adapter: Path
    base: str
    engine: Engine
    ranks: Sequence[int]
    costs: Mapping[int, Cost]
    evaluation: Evaluation | None
    template: str | None
    home: Path
    revision: str | None = None

    @property
    def can_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.engine.tokenizer.chat_template)

    @property
    def tasks(self) -> list[str]:
        """The names of the evaluation's tasks."""
        return [] if self.evaluation is None else list(self.evaluation.tasks)

    def answers(self, asked: str, ranks: Sequence[int], chat: bool, max_new_tokens: int = 128) -> Iterator[list[str]]:
        """The greedy answers to one question at several ranks, which run in one batch, as they grow token by token.

        A slow listener gets the newest ones.

        Args:
            asked: The question.
            ranks: 0 is the base model.
            chat: Whether it is put into the chat template; else into the text that the adapter was trained with.
            max_new_tokens: The most tokens of an answer.

        Raises:
            MatryoshkaError: There is no question, it is too long, or a rank may not be chosen.
        """
        if not asked.strip():
            raise MatryoshkaError("there is no question: write one")
        content = asked if chat or not self.template else self.template.replace("{prompt}", asked)
        # An answer belongs to every row of training data; it changes nothing of the prompt.
        row = Row(*([{"role": who, "content": text}] for who, text in (("user", content), ("assistant", "."))))
        tokens = tokenize(self.engine.tokenizer, row if chat else Row(content, "."))
        until = end_texts(self.engine.tokenizer, [tokens])
        yield [""] * len(ranks)

        def answer(tell: Callable[[int, str], None]) -> None:
            self.engine.generate([tokens.prompt] * len(ranks), ranks, max_new_tokens, until, on_text=tell)

        for texts in _told(answer):
            # A letter may have several tokens.
            yield [texts.get(number, "").rstrip("\N{REPLACEMENT CHARACTER}") for number in range(len(ranks))]

    def curve(self, task: str, ranks: Sequence[int]) -> dict[str, Any]:
        """What `drawing.js` draws the curve of a task from, with these ranks marked."""
        assert self.evaluation is not None
        about, found = self.evaluation.about, self.evaluation.tasks[task]
        costs = {key: about[key] for key in ("bytes", "latency_ms")}
        drawn = {"ranks": list(self.evaluation.ranks), "tasks": {task: found}, **costs}
        return {"evaluation": drawn, "task": task, "marked": list(dict.fromkeys(ranks))}

    def changed(self, task: str, ranks: Sequence[int]) -> dict[str, Any]:
        """The questions of a task that two ranks answer differently, as `drawing.js` takes them."""
        assert self.evaluation is not None
        first, second = map(str, ranks)
        metric = self.evaluation.tasks[task]["metric"]
        mine = [row for row in self.evaluation.examples if row["task"] == task]
        both = [row for row in mine if first in row["answers"] and second in row["answers"]]
        differ = [row for row in both if row["answers"][first] != row["answers"][second]]
        shown = [question(row, metric) for row in differ[:MOST_QUESTIONS]]
        return {"rows": shown, "ranks": [first, second], "differ": len(differ), "asked": len(both)}

    def export(self, rank: int, name: str) -> tuple[Exported, int, str]:
        """Write a rank as an ordinary LoRA adapter into a new folder.

        Returns:
            What was written, the bytes of its weights, and the line of Python that loads it.

        Raises:
            MatryoshkaError: The folder exists, or does not lie in the one that the command was started in.
        """
        home, target = self.home.resolve(), (self.home / name.strip()).resolve()
        if not name.strip() or home not in target.parents:
            raise MatryoshkaError(f"{name!r} is no folder in {home}: write a name, for example rank-{rank}")
        if os.path.lexists(self.home / name.strip()):
            raise MatryoshkaError(f"{target} exists already: choose another place")
        made = export(self.adapter, target, rank, model=self.base, revision=self.revision)
        weights = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        return made, weights, following(target, "peft")


def open_session(
    adapter: str | os.PathLike[str],
    tasks: str | None = None,
    *,
    items: int = 20,
    model: str | None = None,
    revision: str | None = None,
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16",
    progress: Progress | None = None,
) -> Session:
    """Load an adapter onto its base model, with its evaluation.

    Args:
        adapter: The folder of a nested adapter.
        tasks: Names, with commas between, as for `evaluate`: they are asked now, and count instead of what is stored.
        items: The most questions of each of them.
        model: The base model; None is what the adapter was trained on.
        revision: Of the base model on the hub; None is the one that the adapter was trained on.
        dtype: Of the base model.
        progress: Shows how far the questions are.

    Raises:
        MatryoshkaError: The adapter or its base model cannot be loaded, its ranks cannot share a batch, or a task
            cannot be had.
    """
    folder = Path(adapter)
    opened, _ = deployed(open_adapter(folder))
    state = opened.nested
    name, revision = base_of(opened.config, model, revision)
    base = needed_base(name, opened.name)
    stored = read_evaluation(folder) if tasks is None and evaluation_file(folder) is not None else None
    tokenizer = load_tokenizer(base, revision=revision)
    if changed := changed_tokenizer(folder):
        warnings.warn(
            f"{folder} was trained with {changed} (train.yaml), and this page has the base model's tokenizer: its "
            "prompts are not those of training",
            stacklevel=2,
        )
    nested = load_opened(load_on_accelerator(base, DTYPES[dtype], revision), opened)
    engine = Engine(nested, tokenizer)
    ranks = [rank for rank in state.nesting.ranks if rank in state.ranks]
    known = {} if stored is None else dict(zip(stored.ranks, stored.about["latency_ms"] or (), strict=False))
    missing = [rank for rank in ranks if rank not in known]
    now = dict(zip(missing, token_latency(nested, missing), strict=True))
    sizes = adapter_bytes(opened, ranks)
    costs = {
        rank: Cost(rank, size, known[rank], "from evaluation.json")
        if rank in known
        else Cost(rank, size, now[rank], "measured when this page was started")
        for rank, size in zip(ranks, sizes, strict=True)
    }
    evaluation = stored
    if tasks is not None:
        from matryoshka_lora.evaluation.evaluate import evaluate

        evaluation = evaluate(
            nested, tasks, ranks=ranks, tokenizer=tokenizer, limit=items, latency=False, progress=progress
        )
        evaluation.about = {**evaluation.about, "latency_ms": [costs[rank].milliseconds for rank in ranks]}
    return Session(folder, base, engine, ranks, costs, evaluation, template_of(folder), Path.cwd(), revision)


class _GoneError(Exception):
    """Nobody listens any more."""


_ONE_AT_A_TIME = Lock()


def _told(work: Callable[[Callable[[int, str], None]], None]) -> Iterator[dict[int, str]]:
    """The newest texts, by number, that a function tells while it works.

    It has a thread of its own, since PyTorch's modes belong to a thread, and ends when nobody listens any more.
    """
    texts: dict[int, str] = {}
    failed: list[BaseException] = []
    changed, over, gone = Event(), Event(), Event()

    def tell(number: int, text: str) -> None:
        if gone.is_set():
            raise _GoneError
        texts[number] = text
        changed.set()

    def run() -> None:
        try:
            with _ONE_AT_A_TIME:
                work(tell)
        except BaseException as error:  # told to who listens, in its own thread
            failed.append(error)
        over.set()
        changed.set()

    Thread(target=run, daemon=True).start()
    try:
        while not over.is_set():
            changed.wait()
            changed.clear()
            yield dict(texts)
        if failed:
            raise failed[0]
        yield dict(texts)
    finally:
        gone.set()
