"""``matryoshka select``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryoshka_lora.errors import MatryoshkaError

if TYPE_CHECKING:
    from matryoshka_lora.evaluation.choice import Choice, Measured


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
    max_bytes: Annotated[int | None, typer.Option(min=1, help="The most bytes of the exported adapter.")] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(min=0, help="The most milliseconds for one token, on the machine that evaluated."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task to choose by.", show_default="the only one of the evaluation")
    ] = None,
) -> None:
    """Choose the smallest rank that is good enough, and say what speaks for it.

    With only a limit on bytes or latency, the best rank that keeps it. Wishes may be combined. Says when the questions
    were too few to tell ranks apart: a difference below two standard errors, taken question by question where
    examples.jsonl stands beside evaluation.json.

    Example: matryoshka select runs/demo/adapter --within 1%
    """
    if within is None and max_bytes is None and max_latency is None:
        raise typer.BadParameter("say what the rank must meet: --within 1%, --max-bytes or --max-latency")

    from matryoshka_lora.evaluation.select import find_adapter, parse_share, read_evaluation
    from matryoshka_lora.evaluation.select import select as choose

    try:
        share = None if within is None else parse_share(within)
    except MatryoshkaError as error:
        raise typer.BadParameter(str(error)) from error
    found = read_evaluation(evaluation)
    choice = choose(found, share, max_bytes=max_bytes, max_latency=max_latency, task=task)
    name, measured = found.task_name(task), found.measured(task)
    typer.echo(f"{name}: {measured.metric}, {measured.items} questions\n")
    for line in (*_table(measured, choice), "", *_sentences(measured, choice)):
        typer.echo(line)
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
        f"rank {', '.join(map(str, choice.ties))} (within two standard errors, {how})."
    )


def _larger(better: float, measured: Measured) -> float:
    return better if measured.higher_is_better else -better


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "?"
    rounded = round(value, 3) + 0.0  # no negative zero
    return f"{rounded:{sign}.3f}" + (" ± ?" if error is None else f" ± {error:.3f}")
