"""Format the results of commands on models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matryoshka_lora.cli.terminal import format_table, join_lines
from matryoshka_lora.units import format_size, pluralize

if TYPE_CHECKING:
    from matryoshka_lora.evaluation.results import Difference, Evaluation
    from matryoshka_lora.evaluation.select import Selection


def format_evaluation(evaluation: Evaluation) -> str:
    """Return a table of values by rank, and a line about each task.

    One task has a column for each metric; several tasks have one each, for the primary metric.
    """
    metrics = {task: evaluation.metric(task) for task in evaluation.tasks}
    if len(evaluation.tasks) == 1:
        (result,) = evaluation.tasks.values()
        metrics = {key.removesuffix(",none"): metric for key, metric in result.metrics.items()}
    rows = [["rank", "size", *metrics]]
    for rank in (0, *evaluation.ranks):
        cells = [
            _with_error(metric.values.get(rank), metric.standard_errors.get(rank))
            for metric in metrics.values()
        ]
        if rank > 0:
            rows.append([str(rank), format_size(evaluation.sizes[rank]), *cells])
        elif any(cells):
            rows.append(["base", "", *cells])
    lines = format_table(rows, indent="")
    for name, result in evaluation.tasks.items():
        lines.append(
            f"{name}: {pluralize(result.num_examples, 'question')}, "
            f"{pluralize(result.num_fewshot or 0, 'shot')}; `select` uses {result.metric_name}"
        )
    lines.append("± is one standard error over the questions.")
    if any("loss" in name for name in metrics):
        lines.append("loss: nats per token of the answers.")
    return join_lines(lines)


def format_selection(selection: Selection) -> str:
    """Return the selected rank, and its differences from the other ranks and the base model."""
    evaluation, task = selection.evaluation, selection.task
    result = evaluation.tasks[task]
    value = evaluation.values(task)[selection.rank]
    size = format_size(evaluation.sizes[selection.rank])
    summary = f"Rank {selection.rank} ({size}): {result.metric_name} {value:.3f} on {task}"
    if selection.bound is not None:
        summary += f", within the bound {selection.bound:.3f}"
    lines = [f"{summary}; {pluralize(result.num_examples, 'question')}"]
    differences = selection.differences()
    if differences:
        lines.append(f"Compared with rank {selection.rank}, ± one standard error:")
    for rank, difference in differences.items():
        name = f"rank {rank} is" if rank else "the base model is"
        lines.append(f"  {name} {_format_difference(difference)}")
    for name, other_metric in result.metrics.items():
        if other_metric.higher_is_better and set(other_metric.values.values()) == {0}:
            lines.append(f"{name.removesuffix(',none')} is 0 at every rank.")
    if not selection.is_significant:
        advice = "evaluate on more questions."
        if selection.num_questions_needed is not None:
            advice = f"about {selection.num_questions_needed} questions would be enough."
        lines.append(
            f"Rank {selection.rank} may be within the bound by chance (less than two standard "
            f"errors); {advice}"
        )
    return join_lines(lines)


def _format_difference(difference: Difference) -> str:
    if difference.value == 0:
        return "equally good"
    direction = "better" if difference.value > 0 else "worse"
    error = difference.standard_error
    text = f"{direction} by {_with_error(abs(difference.value), error)}"
    if error is not None and abs(difference.value) <= 2 * error:
        text += ", which may be chance"
    return text


def _with_error(value: float | None, standard_error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if standard_error is None else f"{value:.3f} ± {standard_error:.3f}"
