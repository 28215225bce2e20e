"""``matryoshka eval``."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.cli.options import Dtype, Force, Model, Revision
from matryoshka_lora.files import EVALUATION_FOLDER


class Split(StrEnum):
    """The splits that were not trained on."""

    test = "test"
    validation = "validation"


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
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default="ADAPTER/evaluation")
    ] = None,
    force: Force = False,
) -> None:
    """Measure an adapter at every rank, and the base model without it, in one pass.

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
        overwrite=force,
        progress=bar,
    )
    print_tasks(evaluation.to_dict())
    typer.echo(f"Written to {folder}: evaluation.json, examples.jsonl, curve.png and report.html")
    which = f" --task {next(iter(evaluation.tasks))}" if len(evaluation.tasks) > 1 else ""
    export = f"matryoshka export {adapter} --rank RANK -o {adapter.name}-rank-RANK"
    typer.echo(f"Next: matryoshka select {folder} --within 1%{which}, then {export}")


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
