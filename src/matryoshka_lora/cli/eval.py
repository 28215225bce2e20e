"""``matryoshka eval``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matryoshka_lora.files import EVALUATION_FOLDER

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.adapter.state import NestedState
    from matryoshka_lora.evaluation.results import Results
    from matryoshka_lora.evaluation.selection import Selected


class Split(StrEnum):
    """The splits that were not trained on."""

    test = "test"
    validation = "validation"


class Dtype(StrEnum):
    """The names of `matryoshka_lora.models.DTYPES`, which is slow to import."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="A folder that training has written.", show_default=False)],
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "--task",
            help="Names, with commas between: tasks of lm-evaluation-harness or YAML files of them, the presets "
            "gsm8k-3shot, gsm8k-8shot, arc_challenge-25shot and hellaswag-10shot, built-in tasks.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Instead of tasks: a file, or the id of a hub dataset.", show_default=False)
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Such as 1,2,4, or all that may be chosen.", show_default="the nested ranks")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Shots of the harness's tasks.", show_default="the task's own")
    ] = None,
    fixed_shots: Annotated[
        bool,
        typer.Option(
            "--fixed-shots",
            help="The same first examples as shots of every question: faster, but not the harness's own prompts.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "--items",
            min=1,
            help="The most questions of a task.",
            show_default="all; 200 of a built-in task or a file",
        ),
    ] = None,
    split: Annotated[Split, typer.Option(help="Of built-in tasks and hub datasets.")] = Split.test,
    batch_size: Annotated[
        str, typer.Option(help="The most rows that generate together; auto measures how many fit.")
    ] = "auto",
    model: Annotated[
        str | None, typer.Option(help="The base model.", show_default="what the adapter was trained on")
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Of the base model on the hub.", show_default="the one that the adapter was trained on"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default="ADAPTER/evaluation")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Drop an evaluation of other weights, or at other ranks, that is there.")
    ] = False,
) -> None:
    """Measure an adapter at every rank, and the base model without it, in one pass.

    All ranks run in one batch, and lm-evaluation-harness judges: its tasks, its prompts, its metrics. Prints a table,
    and writes evaluation.json, examples.jsonl, curve.png and report.html. Tasks that were evaluated before stay in
    them. An evaluation that was killed goes on where it was when the same command is given again.

    Example: matryoshka eval runs/demo/adapter --tasks family_relationships,arc_challenge-25shot --ranks 1,4,32
    """
    if (tasks is None) == (data is None):
        raise typer.BadParameter(
            "give either --tasks, for example family_relationships, or --data, for example my.jsonl"
        )
    wanted = None if ranks is None or ranks == "all" else _parse_ranks(ranks)
    rows = _parse_batch_size(batch_size)
    folder = out or adapter / EVALUATION_FOLDER
    # The harness draws a bar for each of its steps at each rank.
    os.environ.setdefault("TQDM_DISABLE", "1")

    import torch

    from matryoshka_lora.adapter import load, read_adapter
    from matryoshka_lora.formats.card import write_card
    from matryoshka_lora.evaluation.cost import adapter_bytes, token_latency
    from matryoshka_lora.evaluation.curve import versions
    from matryoshka_lora.engine.engine import Engine
    from matryoshka_lora.evaluation.harness import judge
    from matryoshka_lora.evaluation.reading import weights_hash
    from matryoshka_lora.evaluation.report import print_tasks
    from matryoshka_lora.evaluation.results import ANSWERS_NAME, Results
    from matryoshka_lora.evaluation.store import Store
    from matryoshka_lora.files import EVALUATION, check_free, check_writable
    from matryoshka_lora.models import DTYPES, load_model, load_tokenizer
    from matryoshka_lora.privacy import marked, shown

    # All that can be wrong is found before the slow part begins.
    state, config, tensors = read_adapter(adapter)
    chosen = wanted or (state.ranks if ranks == "all" else state.nesting.ranks)
    for rank in chosen:
        state.check_rank(rank)
    check_writable(folder)
    if folder.resolve() != adapter.resolve():
        check_free(folder, force, beside=[EVALUATION])
    name, revision = base_model(model, revision, config, adapter)
    tokenizer = load_tokenizer(name, revision=revision)
    selected = _selected(tasks, data, tokenizer, num_fewshot, limit, split.value, fixed_shots)
    weights = weights_hash(adapter)
    about: dict[str, Any] = {
        "model": shown(name),
        "revision": revision,
        "dtype": str(DTYPES[dtype.value]).removeprefix("torch."),
        "adapter": {
            "name": _label(state),
            "path": shown(str(adapter)),
            "rule": state.rule.name,
            "inference": state.inference,
            "form": state.form,
            "sha256": weights,
        },
        "mode": "fixed-shots" if fixed_shots else "exact",
        "settings": {"num_fewshot": num_fewshot, "limit": limit, "split": split.value},
        "versions": versions(),
        "bytes": adapter_bytes(tensors, state.nesting.max_rank, chosen),
    }
    results = Results(about, chosen)
    results.keep(folder, selected, overwrite=force)

    base = load_model(name, DTYPES[dtype.value], revision=revision)
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    nested = load(base, adapter)
    about["latency_ms"] = token_latency(nested, chosen)
    subject = {"model": marked(name), "dtype": about["dtype"], "adapter": weights}
    if revision is not None:
        subject["revision"] = revision
    engine = Engine(nested, tokenizer, rows)
    asked = [0, *chosen] if nested.has_base else list(chosen)
    base_too = " and without it" if nested.has_base else ""  # else parts of the base model were trained with it
    typer.echo(f"Evaluating {adapter} at {len(chosen)} ranks{base_too}; answers are kept in {folder}", err=True)
    store = Store(folder / ANSWERS_NAME, subject, anew=force)
    try:
        if len(store):
            typer.echo(f"  {len(store)} answers are there already", err=True)
        for task in selected:
            with _progress(task.name) as report:
                judged = judge(engine, task.tasks, asked, store, task.num_fewshot, limit, report)
            results.add(task, judged)
            write_results(results, folder)
    finally:
        store.close()
    if out is None:
        write_card(adapter, config, state)  # which shows the evaluation beside it
    print_tasks(results.to_dict())
    typer.echo(f"Written to {folder}: evaluation.json, examples.jsonl, curve.png and report.html")
    which = f" --task {next(iter(results.tasks))}" if len(results.tasks) > 1 else ""
    export = f"matryoshka export {adapter} --rank RANK -o {adapter.name}-rank-RANK"
    typer.echo(f"Next: matryoshka select {folder} --within 1%{which}, then {export}")


def _selected(
    tasks: str | None,
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None,
    limit: int | None,
    split: str,
    fixed_shots: bool,
) -> list[Selected]:
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.data.questions import ExactMatch, rows_from
    from matryoshka_lora.evaluation.questions_task import QuestionsTask
    from matryoshka_lora.evaluation.selection import BUILT_IN_ITEMS, Selected, select
    from matryoshka_lora.privacy import shown
    from matryoshka_lora.data.sources import load_data, parse_data

    of: Any = "test" if split == "test" else "validation"
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names or len(set(names)) < len(names):
            raise MatryoshkaError(f"--tasks is {tasks!r}; write each name once, with commas between")
        found = [select(name, tokenizer, num_fewshot, limit, of, fixed_shots) for name in names]
        called = [task.name for task in found]
        for name in called:
            if called.count(name) > 1:
                raise MatryoshkaError(f"two tasks are called {name}: evaluate one of them with another --out")
        return found
    parsed = parse_data(data or "", split=split)
    if "task" in parsed:
        raise MatryoshkaError(f"{data} is a built-in task; write --tasks {data}")
    rows, name = rows_from(load_data({**parsed, "size": limit or BUILT_IN_ITEMS}), str(data)), shown(str(data))
    return [Selected(name, "file", [QuestionsTask(ExactMatch(name), rows, tokenizer)], None, "accuracy,none")]


def write_results(results: Results, folder: Path) -> None:
    """Write all that people read of an evaluation into its folder."""
    import json

    from matryoshka_lora.evaluation.page import PAGE_NAME, page
    from matryoshka_lora.evaluation.reading import EXAMPLES_NAME
    from matryoshka_lora.evaluation.report import draw_tasks
    from matryoshka_lora.files import EVALUATION_NAME, PICTURE_NAME, replace_directory

    with replace_directory(folder) as unfinished:
        text = json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n"
        (unfinished / EVALUATION_NAME).write_text(text, encoding="utf-8")
        (unfinished / EXAMPLES_NAME).write_text(results.example_lines(), encoding="utf-8")
        draw_tasks(results.to_dict(), unfinished / PICTURE_NAME)
        (unfinished / PAGE_NAME).write_text(page(results.to_dict(), results.examples), encoding="utf-8")


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} answers"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, *clocks, console=console, disable=not console.is_terminal) as progress:
        bar = None

        def report(done: int, total: int) -> None:
            nonlocal bar
            # Answers that were there before say nothing of the speed: each kind of request has a bar of its own.
            if bar is None or progress.tasks[bar].total != total:
                bar = progress.add_task(name, total=total, completed=done)
            progress.update(bar, completed=done)

        yield report


def _parse_ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--ranks is {text!r}; write numbers such as 1,2,4, or all") from error
    if list(ranks) != sorted(set(ranks)):
        raise typer.BadParameter(f"--ranks must increase; write {','.join(map(str, sorted(set(ranks))))}")
    return ranks


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"--batch-size is {text!r}; write a number such as 64, or auto")
    return int(text)


def base_model(model: str | None, revision: str | None, config: LoraConfig, adapter: Path) -> tuple[str, str | None]:
    """Name and revision of the base model that was asked for, or that the adapter names."""
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.models import base_of

    name, revision = base_of(config, model, revision)
    if not name:
        raise MatryoshkaError(f"{adapter} does not say which base model it belongs to; give it with --model")
    return name, revision


def _label(state: NestedState) -> str:
    return f"{state.rule.name}-{'reordered' if state.form == 'reordered' else state.inference}"
