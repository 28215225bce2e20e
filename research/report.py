"""The tables of a study, as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from research import stats
from research.commonsense import OTHER_METRIC, USUAL_METRIC
from research.curves import earlier_curves
from research.plan import Result, diverged, missing_jobs, rates, results, units
from research.runs import Job, Run
from research.stats import Estimate, Value
from research.study import LORA_EACH, RECIPES, Study, parse_method

Format = Callable[[Estimate], str]
"""Formats an estimate as a cell."""

REFERENCE = "lora/svd"
"""The method that every other is compared with, besides `LORA_EACH`."""

INTERVALS_NOTE = (
    "± is half the width of a two-sided 95 % t interval over the seeds. It says how much another "
    "seed may change, and nothing of other tasks, questions or models. A number without ± is of "
    "one seed; two seeds have their range, without a mean. AURAC is the mean height of the "
    "accuracy over the ranks, along log2(rank) or along the rank; gap is the accuracy at the "
    "largest rank minus that at the worst one. Accuracies are in %, losses in nats per token. "
    f"{LORA_EACH} is LoRA trained at each rank by itself."
)
SPREADS_NOTE = (
    "A cell has the mean over the seeds, and in brackets the lowest and the highest seed. AURAC is "
    "the mean height of the accuracy over the ranks, along log2(rank) or along the rank; fall is "
    "how far the accuracy falls at most from a rank to the next larger one. Accuracies are in %, "
    f"losses in nats per token. {LORA_EACH} is LoRA trained at each of some ranks by itself."
)
POOLED_NOTE = (
    "Each pair of a task and a seed counts once. The interval takes the pairs for independent; in "
    "the loss, a task with larger losses weighs more."
)


def percent(estimate: Estimate) -> str:
    """Format a share in %."""
    return estimate.text(100, 1)


def points(estimate: Estimate) -> str:
    """Format a difference of shares in points of %."""
    return estimate.text(100, 1, "+")


def nats(estimate: Estimate) -> str:
    """Format a loss."""
    return estimate.text()


def nats_difference(estimate: Estimate) -> str:
    """Format a difference of losses."""
    return estimate.text(sign="+")


def percent_spread(estimate: Estimate) -> str:
    """Format a share in %, with the lowest and the highest seed."""
    return estimate.spread(100, 1)


def points_spread(estimate: Estimate) -> str:
    """Format a difference of shares in points of %, with the lowest and the highest seed."""
    return estimate.spread(100, 1, "+")


def nats_spread(estimate: Estimate) -> str:
    """Format a loss, with the lowest and the highest seed."""
    return estimate.spread()


def nats_difference_spread(estimate: Estimate) -> str:
    """Format a difference of losses, with the lowest and the highest seed."""
    return estimate.spread(sign="+")


def tables(study: Study, runs: Mapping[Job, Run]) -> str:
    """Return all tables of a study."""
    all_results = [*results(study, runs), *earlier_curves(study.name)]
    tasks = sorted({result.task for result in all_results})
    parts = [f"# {study.title}", *_description(study, runs, all_results)]
    for task in tasks:
        if study.within:
            parts += _curves_with_seeds(all_results, task)
        else:
            parts += _curves(all_results, task)
    parts += _costs(all_results)
    if not study.within:
        for task in tasks:
            parts += _differences_to_reference_ranks(all_results, task)
        parts += _differences_over_tasks(all_results, REFERENCE)
    parts += _learning_rates(study, runs)
    return "\n\n".join(parts) + "\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns of numbers are aligned to the right."""
    number = re.compile(r"([-+]?\d[\d,.]*( ± [\d.]+| to [-+\d.]+| \([-+\d.]+ to [-+\d.]+\))?)?")
    rule: list[str] = []
    for column in range(len(heading)):
        is_numeric = column > 0 and all(number.fullmatch(row[column]) for row in rows)
        rule.append("---:" if is_numeric else "---")
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))


def _description(
    study: Study, runs: Mapping[Job, Run], all_results: Sequence[Result]
) -> Iterator[str]:
    training = ", ".join(f"{k} {v}" for k, v in study.training.items() if k != "disable_tqdm")
    versions = sorted({tuple(sorted(run.versions.items())) for run in runs.values()})
    seeds = {
        task: len({result.seed for result in all_results if result.task == task})
        for task in study.tasks
    }
    layers = f" (first {study.layers} layers)" if study.layers else ""
    adapted = ", ".join(study.modules) or "all linear layers"
    rows = {
        "model": f"{study.model}{layers}, {study.dtype}, {adapted}, R = {study.rank}",
        "training": training,
        "questions": ", ".join(
            f"{count} of {split}" for split, count in study.items.items() if count
        ),
        "learning rates": f"those of `{study.rates_of}`"
        if study.rates_of
        else f"grid from {', '.join(f'{rate:g}' for rate in study.learning_rates)}; "
        f"validation seeds {', '.join(map(str, study.rate_seeds))}",
        "seeds": ", ".join(f"{count} of {task}" for task, count in seeds.items()),
        "versions": "; or ".join(
            ", ".join(f"{name} {number}" for name, number in packages) for packages in versions
        ),
    }
    if study.max_examples is not None:
        rows["examples of `train_ranks`"] = str(study.max_examples)
    for name in dict.fromkeys(parse_method(method)[0] for method in study.methods):
        rows[f"recipe {name}"] = RECIPES[name].summary
    if diverged_runs := diverged(study, runs):
        rows["diverged on test, not in the means"] = "; ".join(diverged_runs)
    if num_missing := len(missing_jobs(study, runs)):
        rows["not run"] = f"{num_missing} runs or more"
    yield "## What was compared"
    yield table(("study", ""), list(rows.items()))
    yield SPREADS_NOTE if study.within else INTERVALS_NOTE


def _curves(all_results: Sequence[Result], task: str) -> Iterator[str]:
    """Yield the curves of a task: means with intervals."""
    accuracies = _at_ranks(all_results, task, stats.accuracy_at)
    accuracies["AURAC log2"] = stats.aurac_log2
    accuracies["linear"] = stats.aurac_linear
    accuracies["gap"] = stats.worst_rank_gap
    losses = _at_ranks(all_results, task, stats.loss_at)
    losses["mean"] = stats.mean_loss
    methods = dict.fromkeys(stats.ranking(all_results, task))
    yield f"## Task {task}"
    yield "Accuracy at each rank, best AURAC (log2) first:"
    yield _grid(all_results, methods, accuracies, percent, task)
    yield from _choices(all_results, task)
    yield "Loss at each rank:"
    yield _grid(all_results, methods, losses, nats, task)


def _curves_with_seeds(all_results: Sequence[Result], task: str) -> Iterator[str]:
    """Yield the curves of a task: spreads, differences to `LORA_EACH`, and every seed."""
    num_ranks = max(len(result.ranks) for result in all_results)
    accuracies_at = _at_ranks(all_results, task, stats.accuracy_at)
    losses_at = _at_ranks(all_results, task, stats.loss_at)
    accuracies = {
        **accuracies_at,
        "AURAC log2": _if_complete(stats.aurac_log2, num_ranks),
        "linear": _if_complete(stats.aurac_linear, num_ranks),
        "fall": _if_complete(stats.largest_fall, num_ranks),
    }
    losses = {**losses_at, "mean": _if_complete(stats.mean_loss, num_ranks)}
    methods = stats.ranking(all_results, task)
    yield f"## Task {task}"
    yield "Accuracy at each rank, best AURAC (log2) first:"
    yield _grid(all_results, dict.fromkeys(methods), accuracies, percent_spread, task)
    yield "Loss at each rank:"
    yield _grid(all_results, dict.fromkeys(methods), losses, nats_spread, task)

    references = [r for r in all_results if r.method == LORA_EACH and r.task == task]
    ranks = [str(rank) for rank in sorted({rank for r in references for rank in r.ranks})]
    minus = {method: LORA_EACH for method in methods if method != LORA_EACH}
    if ranks:
        accuracies = {rank: accuracies_at[rank] for rank in ranks}
        losses = {rank: losses_at[rank] for rank in ranks}
        yield "Accuracy minus that of LoRA trained at the rank, in points, on the same seeds:"
        yield _grid(all_results, minus, accuracies, points_spread, task)
        yield "Loss minus that of LoRA trained at the rank:"
        yield _grid(all_results, minus, losses, nats_difference_spread, task)
    yield "Seed by seed:"
    seeds = [r for method in methods for r in all_results if (r.method, r.task) == (method, task)]
    yield _seeds("accuracy", seeds, accuracies_at, unit=100, digits=1)
    yield _seeds("loss", seeds, losses_at, unit=1, digits=3)


def _seeds(
    label: str, curves: Sequence[Result], columns: Mapping[str, Value], unit: int, digits: int
) -> str:
    """Return a row for each curve."""
    rows: list[list[str]] = []
    for curve in curves:
        row = [curve.method, str(curve.seed)]
        for value in columns.values():
            number = value(curve)
            row.append("" if number is None else f"{unit * number:.{digits}f}")
        rows.append(row)
    return table((label, "seed", *columns), rows)


def _if_complete(value: Value, num_ranks: int) -> Value:
    """Return a function that returns the value of curves with all ranks, otherwise None."""

    def of_complete(result: Result) -> float | None:
        return value(result) if len(result.ranks) == num_ranks else None

    return of_complete


def _choices(all_results: Sequence[Result], task: str) -> Iterator[str]:
    """Yield the right answers of each task with choices, and of the base model."""
    with_choices = [r for r in all_results if r.task == task and r.curve.parts]
    for label, metrics in (("usual", USUAL_METRIC), ("other", OTHER_METRIC)):
        columns = {f"{name} ({metric})": {name: metric} for name, metric in metrics.items()}
        columns["mean"] = dict(metrics)
        rows: list[Sequence[str]] = []
        for method in stats.ranking(with_choices, task):
            ranks = sorted({rank for r in with_choices if r.method == method for rank in r.ranks})
            if not rows:  # the base model is the same for all methods
                ranks = [0, *ranks]
            for rank in ranks:
                cells = [
                    _cell(
                        stats.mean(with_choices, method, stats.choices_at(column, rank), task),
                        percent,
                    )
                    for column in columns.values()
                ]
                label_cells = (method, str(rank)) if rank else ("the base model", "")
                rows.append((*label_cells, *cells))
        if rows:
            yield f"Right answers by each task's {label} metric:"
            yield table(("method", "rank", *columns), rows)


def _costs(all_results: Sequence[Result]) -> Iterator[str]:
    kinds: dict[str, Value] = {
        "tokens": lambda result: result.tokens,
        "seconds": lambda result: result.seconds,
        "bytes": lambda result: 4 * result.parameters,
    }
    heading = ["method", "curves"]
    for kind in kinds:
        heading += [kind, "times"]
    rows: list[list[str]] = []
    for method in stats.ranking(all_results):
        row = [method, str(len(stats.values(all_results, method, kinds["tokens"])))]
        for value in kinds.values():
            costs = stats.values(all_results, method, value)
            reference_costs = stats.values(all_results, REFERENCE, value)
            common = costs.keys() & reference_costs.keys()
            total = sum(reference_costs[pair] for pair in common)
            times = f"{sum(costs[pair] for pair in common) / total:.2f}" if total else ""
            row += [f"{fmean(costs.values()):,.0f}", times]
        rows.append(row)
    yield "## Cost"
    yield (
        "Mean cost of one curve over tasks and seeds: all training runs that it takes, and the "
        f"deployment; times is the multiple of {REFERENCE}, on common tasks and seeds. Tokens are "
        "counted in gradient steps; bytes are the size of the trained factors in float32."
    )
    yield table(heading, rows)


def _differences_to_reference_ranks(all_results: Sequence[Result], task: str) -> Iterator[str]:
    """Yield the differences to LoRA trained at each rank."""
    minus = {
        method: LORA_EACH
        for method in stats.ranking(all_results, task)
        if method != LORA_EACH
        and stats.differences(all_results, method, LORA_EACH, stats.mean_loss, task)
    }
    if minus:
        accuracies = _at_ranks(all_results, task, stats.accuracy_at)
        losses = _at_ranks(all_results, task, stats.loss_at)
        yield f"## {task}: minus LoRA trained at the rank"
        yield "Accuracy in points of %, more is better:"
        yield _grid(all_results, minus, accuracies, points, task)
        yield "Loss in nats per token, less is better:"
        yield _grid(all_results, minus, losses, nats_difference, task)


def _differences_over_tasks(all_results: Sequence[Result], other: str) -> Iterator[str]:
    rows: list[Sequence[str]] = []
    for method in stats.ranking(all_results):
        area = stats.mean(all_results, method, stats.aurac_log2, None, other)
        loss = stats.mean(all_results, method, stats.mean_loss, None, other)
        if method != other and area and loss:
            rows.append((method, str(area.n), points(area), nats_difference(loss)))
    if rows:
        yield f"## Minus {other}, over all tasks"
        yield POOLED_NOTE
        yield table(("method", "pairs", "AURAC (log2), points", "mean loss, nats"), rows)


def _learning_rates(study: Study, runs: Mapping[Job, Run]) -> Iterator[str]:
    states = {
        (method, task, unit): rates(study, runs, unit)
        for method in study.methods
        for task in study.tasks
        for unit in units(study, method, task)
    }
    grid = sorted({rate for state in states.values() for rate in state.losses})
    rows: list[Sequence[str]] = []
    for (method, task, unit), state in states.items():
        if not state.losses:
            continue
        chosen = "" if state.chosen is None else f"{state.chosen:g}"
        losses: list[str] = []
        for rate in grid:
            loss = state.losses.get(rate)
            cell = "" if loss is None else f"{loss:.3f}"
            losses.append("diverged" if loss == math.inf else cell)
        rows.append((method, task, str(unit.rank), chosen, *losses))
    yield "## Learning rates"
    yield (
        "Validation loss by learning rate, in nats per token: the mean over the ranks, or for a "
        "method that trains for each rank, that at its own."
    )
    yield table(("method", "task", "R", "chosen", *(f"{rate:g}" for rate in grid)), rows)


def _at_ranks(
    all_results: Sequence[Result], task: str, value_at: Callable[[int], Value]
) -> dict[str, Value]:
    """Return a column for each rank of a task."""
    ranks = {rank for result in all_results if result.task == task for rank in result.ranks}
    return {str(rank): value_at(rank) for rank in sorted(ranks)}


def _grid(
    all_results: Sequence[Result],
    methods: Mapping[str, str | None],
    columns: Mapping[str, Value],
    format_cell: Format,
    task: str,
) -> str:
    """Return a table with a row for each method.

    Args:
        all_results: The curves.
        methods: The methods, and for each the method to subtract, or None.
        columns: The headings and values.
        format_cell: Formats a cell.
        task: The task.
    """
    rows: list[Sequence[str]] = []
    for method, minus in methods.items():
        cells = [stats.mean(all_results, method, value, task, minus) for value in columns.values()]
        num_seeds = max((cell.n for cell in cells if cell), default=0)
        if num_seeds:
            rows.append((method, str(num_seeds), *(_cell(cell, format_cell) for cell in cells)))
    return table(("method", "seeds", *columns), rows)


def _cell(estimate: Estimate | None, format_cell: Format) -> str:
    return "" if estimate is None else format_cell(estimate)


def comparison(study: Study, recorded: Sequence[Result], repeated: Sequence[Result]) -> str:
    """Return a table of recorded and new curves, over the same tasks and seeds.

    A rank differs if the two intervals do not overlap; a single seed has no interval.
    """
    kinds: list[tuple[str, Callable[[int], Value], Format]] = [
        ("accuracy", stats.accuracy_at, percent),
        ("loss", stats.loss_at, nats),
    ]
    rows: list[Sequence[str]] = []
    for kind, value_at, format_cell in kinds:
        for method in dict.fromkeys(result.method for result in repeated):
            for rank in study.nested_ranks(study.rank):
                new = stats.mean(repeated, method, value_at(rank))
                old = stats.mean(recorded, method, value_at(rank))
                if new and old:
                    verdict = "single seed"
                    if old.half_width is not None and new.half_width is not None:
                        distance = abs(old.mean - new.mean)
                        is_near = distance <= old.half_width + new.half_width
                        verdict = "overlap" if is_near else "differ"
                    cells = (format_cell(old), format_cell(new), verdict)
                    rows.append((method, kind, str(rank), *cells))
    return table(("method", "", "rank", "recorded", "again", "intervals"), rows)
