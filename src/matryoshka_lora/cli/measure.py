"""``matryoshka eval`` and ``matryoshka select``."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryoshka_lora.cli.outputs import output
from matryoshka_lora.cli.verbs import Dtype, Force, Model, Revision
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import EVALUATION_FOLDER

if TYPE_CHECKING:
    from matryoshka_lora.evaluation.choice import Choice, Measured


class Engine(StrEnum):
    """Who answers."""

    own = "own"
    vllm = "vllm"


class Split(StrEnum):
    """The splits that were not trained on."""

    test = "test"
    validation = "validation"


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="The folder of a nested adapter.", show_default=False)],
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
        str | None, typer.Option(help="Instead of tasks: a file of rows, or a hub dataset.", show_default=False)
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
    engine: Annotated[
        Engine, typer.Option(help="Who answers: our own engine, or vLLM, for models that outgrow one device.")
    ] = Engine.own,
    vllm_options: Annotated[
        str | None,
        typer.Option(
            "--vllm", help="Options of vLLM, such as tensor_parallel_size=2,max_model_len=4096.", show_default=False
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=output,
            metavar="PATH",
            help="The folder to write.",
            show_default="ADAPTER/evaluation",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Measure an adapter at its nested ranks or all, and the base model without it, in one pass.

    All ranks run in one batch, and lm-evaluation-harness judges: its tasks, its prompts, its metrics. Prints a table,
    and writes evaluation.json, examples.jsonl, curve.png and report.html. An evaluation that was killed goes on where
    it was when the same command is given again. Tasks of an earlier evaluation of the same adapter stay.

    Example: matryoshka eval runs/demo/adapter --tasks family_relationships,arc_challenge-25shot --ranks 1,4,32
    """
    if (tasks is None) == (data is None):
        raise typer.BadParameter(
            "give either --tasks, for example family_relationships, or --data, for example my.jsonl"
        )
    wanted = ranks if ranks in (None, "all") else _parse_ranks(str(ranks))
    rows = _parse_batch_size(batch_size)
    options = _parse_options(vllm_options)
    folder = out or adapter / EVALUATION_FOLDER
    # The harness draws a bar for each of its steps at each rank.
    os.environ.setdefault("TQDM_DISABLE", "1")

    from matryoshka_lora.evaluation.evaluate import bar
    from matryoshka_lora.evaluation.evaluate import evaluate as run
    from matryoshka_lora.evaluation.report import print_tasks

    typer.echo(f"Evaluating {adapter}; answers are kept in {folder}", err=True)
    evaluation = run(
        adapter,
        tasks,
        data,
        wanted,  # type: ignore[arg-type]
        out=out,
        model=model,
        revision=revision,
        dtype=dtype.value,
        num_fewshot=num_fewshot,
        fixed_shots=fixed_shots,
        limit=limit,
        split=split.value,
        batch_size=rows,
        engine=engine.value,
        vllm_options=options,
        overwrite=force,
        progress=bar,
    )
    print_tasks(evaluation.to_dict())
    typer.echo(f"Written to {folder}: evaluation.json, examples.jsonl, curve.png and report.html")
    which = f" --task {next(iter(evaluation.tasks))}" if len(evaluation.tasks) > 1 else ""
    export = f"matryoshka export {adapter} --rank RANK -o {adapter.name}-rank-RANK"
    typer.echo(f"Next: matryoshka select {folder} --within 1%{which}, then {export}")


def _parse_options(text: str | None) -> dict[str, object]:
    options: dict[str, object] = {}
    for part in filter(None, (text or "").split(",")):
        name, sign, value = part.partition("=")
        if not sign:
            raise typer.BadParameter(f"--vllm has {part!r}; write names and values such as tensor_parallel_size=2")
        try:
            options[name.strip()] = json.loads(value)
        except ValueError:  # a word
            options[name.strip()] = value.strip()
    return options


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
    if not re.fullmatch("[1-9][0-9]*", text):
        raise typer.BadParameter(f"--batch-size is {text!r}; write a number such as 64, or auto")
    return int(text)


def select(
    evaluation: Annotated[
        Path,
        typer.Argument(
            help="What matryoshka eval wrote: evaluation.json, its folder, or the adapter's folder.",
            show_default=False,
        ),
    ],
    within: Annotated[
        str | None,
        typer.Option(help="How far below the best rank's value it may be, such as 1%: of that value, not points."),
    ] = None,
    max_bytes: Annotated[str | None, typer.Option(help="The most that the exported adapter may have, as 50MB.")] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(min=0, help="The most milliseconds for one token, on the machine that evaluated."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task to choose by.", show_default="the only one of the evaluation")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write the choice into evaluation.json: it is NAME@auto in vLLM.")
    ] = False,
) -> None:
    """Choose the smallest rank that is good enough, and say what speaks for it.

    With only a limit on bytes or latency, the best rank that keeps it. Wishes may be combined. Says when the questions
    were too few to tell ranks apart: a difference below two standard errors, taken question by question where
    examples.jsonl stands beside evaluation.json.

    Example: matryoshka select runs/demo/adapter --within 1%
    """
    if within is None and max_bytes is None and max_latency is None:
        raise typer.BadParameter("say what the rank must meet: --within 1%, --max-bytes or --max-latency")

    from matryoshka_lora.evaluation.select import find_adapter, parse_share, read_evaluation, save_choice
    from matryoshka_lora.evaluation.select import select as choose
    from matryoshka_lora.files import read_bytes
    from matryoshka_lora.formats.card import metric_name

    try:
        share = None if within is None else parse_share(within)
        size = None if max_bytes is None else read_bytes(max_bytes)
    except MatryoshkaError as error:
        raise typer.BadParameter(str(error)) from error
    found = read_evaluation(evaluation)
    choice = choose(found, share, max_bytes=size, max_latency=max_latency, task=task)
    name, measured = found.task_name(task), found.measured(task)
    typer.echo(f"{name}: {metric_name(measured.metric)}, {measured.items} questions\n")
    for line in (*_table(measured, choice), "", *_sentences(measured, choice)):
        typer.echo(line)
    if save:
        typer.echo(f"\nWritten to {save_choice(evaluation, choice, name)}: NAME@auto is rank {choice.rank} in vLLM.")
    adapter = find_adapter(evaluation)
    if not adapter.is_dir():
        typer.echo(f"\n{adapter} is the name of the adapter that was evaluated: write the path of its folder.")
    new = shlex.quote(f"{adapter.name}-rank-{choice.rank}")
    typer.echo(f"\nNext: matryoshka export {shlex.quote(str(adapter))} --rank {choice.rank} -o {new}")


def _table(measured: Measured, choice: Choice) -> list[str]:
    rows = [("", "rank", "value", f"against rank {choice.rank}", "bytes", "ms/token")]
    for number, rank in enumerate(measured.ranks):
        against = choice.differences.get(rank)
        rows.append(
            (
                "->" if rank == choice.rank else "",
                str(rank),
                _with_error(measured.values[number], measured.errors[number]),
                # The file's sign: positive is a larger value.
                "" if against is None else _with_error(_larger(-against.value, measured), against.error, "+"),
                f"{measured.bytes[number]:,}",
                "?" if measured.latency_ms is None else f"{measured.latency_ms[number]:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _sentences(measured: Measured, choice: Choice) -> list[str]:
    wish = choice.wish
    best, value = measured.value(choice.best), measured.value(choice.rank)
    lines = []
    if choice.bound is None:
        lines.append(f"Rank {choice.rank} is the best that keeps the limit: {value:.3f}.")
    else:
        limits = " and keeps the limit" if (wish.max_bytes, wish.max_latency) != (None, None) else ""
        side = "at least" if measured.higher_is_better else "at most"
        lines.append(
            f"Rank {choice.rank} is the smallest that is within {100 * (wish.within or 0):g} % of the best"
            f" ({best:.3f} at rank {choice.best}, so {side} {choice.bound:.3f}){limits}: {value:.3f}."
        )
        if not choice.is_sure:
            lines.append(
                f"That is not sure: {measured.items} questions leave room for it to be farther from rank "
                f"{choice.best}. More questions would tell."
            )
    if measured.base is not None and value is not None and _larger(value - measured.base, measured) <= 0:
        lines.append(
            f"It is not better than the base model without the adapter ({measured.base:.3f}): train longer, or ask "
            "another task."
        )
    lines.append(_apart(measured, choice))
    return lines


def _apart(measured: Measured, choice: Choice) -> str:
    differences = choice.differences.values()
    if not differences:
        return "No other rank was measured."
    paired = sum(difference.paired for difference in differences)
    how = (
        "question by question"
        if paired == len(differences)
        else "from the standard errors of both, as if they were independent"
        if not paired
        else "question by question where that is possible"
    )
    if not choice.ties:
        return f"Every other rank differs from it by more than two standard errors ({how})."
    return (
        f"Cannot be told apart from it by these {measured.items} questions: "
        f"rank {_listed(choice.ties, measured.ranks)} (within two standard errors, {how})."
    )


def _listed(ranks: Sequence[int], among: Sequence[int]) -> str:
    """Three or more ranks that follow each other are named by the first and the last."""
    places = [among.index(rank) for rank in ranks]
    groups: list[list[int]] = []
    for number, place in enumerate(places):
        if number and place == places[number - 1] + 1:
            groups[-1].append(among[place])
        else:
            groups.append([among[place]])
    return ", ".join(f"{group[0]} to {group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups)


def _larger(better: float, measured: Measured) -> float:
    return better if measured.higher_is_better else -better


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "?"
    rounded = round(value, 3) + 0.0  # no negative zero
    return f"{rounded:{sign}.3f}" + (" ± ?" if error is None else f" ± {error:.3f}")
