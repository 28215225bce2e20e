"""The tables of a study, as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from statistics import fmean

from research import stats
from research.commonsense import OTHER_METRIC, USUAL_METRIC
from research.plan import Result, diverged, missing_jobs, rates, results, units
from research.runs import Job, Run
from research.stats import Estimate, Value
from research.study import EACH, RECIPES, Study, parse_method

Form = Callable[[Estimate], str]
"""Writes an estimate into a cell."""

WORDS = (
    "± is half the width of a two-sided 95 % t interval over the seeds. It says how much another "
    "seed may change, and nothing of other tasks, questions or models. A number without ± is of "
    "one seed. AURAC is the mean height of the accuracy over the ranks, along log2(rank) or along "
    "the rank; gap is the accuracy at the largest rank minus that at the worst one. Accuracies are "
    f"in %, losses in nats per token. {EACH} is LoRA trained at each rank by itself."
)
SPREADS = (
    "A cell has the mean over the seeds, and in brackets the lowest and the highest seed. AURAC is "
    "the mean height of the accuracy over the ranks, along log2(rank) or along the rank; fall is "
    "how far the accuracy falls at most from a rank to the next larger one. Accuracies are in %, "
    f"losses in nats per token. {EACH} is LoRA trained at each of some ranks by itself."
)
POOLED = (
    "Each pair of a task and a seed counts once. The interval takes the pairs for independent; in "
    "the loss, a task with larger losses weighs more."
)
SHORT = "lora/svd"
"""What every method is compared with besides `EACH`."""


def percent(found: Estimate) -> str:
    """Write a share in %."""
    return found.text(100, 1)


def percent_spread(found: Estimate) -> str:
    """Write a share in %, with the lowest and the highest seed."""
    return found.spread(100, 1)


def nats_spread(found: Estimate) -> str:
    """Write a loss, with the lowest and the highest seed."""
    return found.spread()


def points_spread(found: Estimate) -> str:
    """Write a difference of shares in points, with the lowest and the highest seed."""
    return found.spread(100, 1, "+")


def more_spread(found: Estimate) -> str:
    """Write a difference of losses, with the lowest and the highest seed."""
    return found.spread(sign="+")


def points(found: Estimate) -> str:
    """Write a difference of shares in points of %."""
    return found.text(100, 1, "+")


def nats(found: Estimate) -> str:
    """Write a loss."""
    return found.text()


def more(found: Estimate) -> str:
    """Write a difference of losses."""
    return found.text(sign="+")


def tables(study: Study, runs: Mapping[Job, Run]) -> str:
    """Return all tables of a study."""
    found = list(results(study, runs))
    tasks = sorted({result.task for result in found})
    parts = [f"# {study.title}", *_what(study, runs, found)]
    for task in tasks:
        parts += _by_rank(found, task) if study.within else _curves(found, task)
    parts += _costs(found)
    if not study.within:
        for task in tasks:
            parts += _each_rank(found, task)
        parts += _against(found, SHORT)
    parts += _rates(study, runs)
    return "\n\n".join(parts) + "\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns of numbers stand to the right."""
    number = re.compile(r"([-+]?\d[\d,.]*( ± [\d.]+| \([-+\d.]+ to [-+\d.]+\))?)?")
    right = [n > 0 and all(number.fullmatch(row[n]) for row in rows) for n in range(len(heading))]
    rule = ["---:" if one else "---" for one in right]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))


def _what(study: Study, runs: Mapping[Job, Run], found: Sequence[Result]) -> Iterator[str]:
    training = ", ".join(f"{k} {v}" for k, v in study.training.items() if k != "disable_tqdm")
    versions = {tuple(sorted(run.versions.items())) for run in runs.values()}
    seeds = {task: {one.seed for one in found if one.task == task} for task in study.tasks}
    layers = f" (first {study.layers} layers)" if study.layers else ""
    adapted = ", ".join(study.modules) or "all linear layers"
    rows = {
        "model": f"{study.model}{layers}, {study.dtype}, {adapted}, R = {study.rank}",
        "training": training,
        "questions": ", ".join(
            f"{count} of {split}" for split, count in study.items.items() if count
        ),
        "learning rates": f"grid from {', '.join(f'{rate:g}' for rate in study.learning_rates)}; "
        f"validation seeds {', '.join(map(str, study.rate_seeds))}",
        "seeds": ", ".join(f"{len(of)} of {task}" for task, of in seeds.items()),
        "versions": "; or ".join(", ".join(f"{n} {v}" for n, v in one) for one in sorted(versions)),
    }
    if study.settled:
        rows["only reported"] = study.settled
    for name in dict.fromkeys(parse_method(method)[0] for method in study.methods):
        rows[f"recipe {name}"] = RECIPES[name].summary
    if lost := diverged(study, runs):
        rows["diverged on test, not in the means"] = "; ".join(lost)
    if left := len(missing_jobs(study, runs)):
        rows["not run"] = f"{left} runs or more"
    yield "## What was compared"
    yield table(("study", ""), list(rows.items()))
    yield SPREADS if study.within else WORDS


def _curves(found: Sequence[Result], task: str) -> Iterator[str]:
    accuracy = _at_ranks(found, task, stats.accuracy_at)
    accuracy |= {"AURAC log2": stats.aurac_log2, "linear": stats.aurac_linear}
    accuracy |= {"gap": stats.worst_rank_gap}
    loss = _at_ranks(found, task, stats.loss_at) | {"mean": stats.mean_loss}
    rows = dict.fromkeys(stats.ranking(found, task))
    yield f"## Task {task}"
    yield "Accuracy at each rank, best AURAC (log2) first:"
    yield _grid(found, rows, accuracy, percent, task)
    yield from _parts(found, task)
    yield "Loss at each rank:"
    yield _grid(found, rows, loss, nats, task)


def _by_rank(found: Sequence[Result], task: str) -> Iterator[str]:
    """Yield means with their spreads, what each method is behind `EACH`, and every seed."""
    whole = max(len(result.ranks) for result in found)
    of_all: dict[str, Value] = {"AURAC log2": stats.aurac_log2, "linear": stats.aurac_linear}
    of_all |= {"fall": stats.largest_fall}
    accuracy, loss = (_at_ranks(found, task, at) for at in (stats.accuracy_at, stats.loss_at))
    accuracy |= {name: _if_whole(value, whole) for name, value in of_all.items()}
    rows = dict.fromkeys(stats.ranking(found, task))
    yield f"## Task {task}"
    yield "Accuracy at each rank, best AURAC (log2) first:"
    yield _grid(found, rows, accuracy, percent_spread, task)
    yield "Loss at each rank:"
    means = loss | {"mean": _if_whole(stats.mean_loss, whole)}
    yield _grid(found, rows, means, nats_spread, task)
    ranks = {r for one in found if (one.method, one.task) == (EACH, task) for r in one.ranks}
    of_each = [str(rank) for rank in sorted(ranks)]
    minus = {method: EACH for method in rows if method != EACH}
    if ranks:
        yield "Accuracy minus that of LoRA trained at the rank, in points, on the same seeds:"
        yield _grid(found, minus, {r: accuracy[r] for r in of_each}, points_spread, task)
        yield "Loss minus that of LoRA trained at the rank:"
        yield _grid(found, minus, {r: loss[r] for r in of_each}, more_spread, task)
    yield "Seed by seed:"
    seeds = [r for method in rows for r in found if (r.method, r.task) == (method, task)]
    for what, values, unit in (("accuracy", accuracy, 100), ("loss", loss, 1)):
        columns = [name for name in values if name.isdigit()]
        cells = [
            [None if (x := values[name](one)) is None else unit * x for name in columns]
            for one in seeds
        ]
        digits = 1 if unit == 100 else 3
        text = [["" if x is None else f"{x:.{digits}f}" for x in row] for row in cells]
        heads = [(one.method, str(one.seed)) for one in seeds]
        both = [(*head, *row) for head, row in zip(heads, text, strict=True)]
        yield table((what, "seed", *columns), both)


def _if_whole(value: Value, ranks: int) -> Value:
    """Return what gives a number of curves that have all ranks alone."""
    return lambda result: value(result) if len(result.ranks) == ranks else None


def _parts(found: Sequence[Result], task: str) -> Iterator[str]:
    """Yield each task with choices that the accuracy is the mean of, and the base model."""
    having = [result for result in found if result.task == task and result.curve.parts]
    for text, metrics in (("usual", USUAL_METRIC), ("other", OTHER_METRIC)):
        columns = {f"{part} ({metric})": {part: metric} for part, metric in metrics.items()}
        columns["mean"] = dict(metrics)
        rows: list[Sequence[str]] = []
        for method in stats.ranking(having, task):
            ranks = sorted({rank for one in having if one.method == method for rank in one.ranks})
            for rank in ranks if rows else (0, *ranks):
                cells = [
                    _cell(stats.mean(having, method, stats.chosen_at(of, rank), task), percent)
                    for of in columns.values()
                ]
                rows.append((method, str(rank), *cells) if rank else ("the base model", "", *cells))
        if rows:
            yield f"Right answers by each task's {text} metric:"
            yield table(("method", "rank", *columns), rows)


def _costs(found: Sequence[Result]) -> Iterator[str]:
    kinds: dict[str, Value] = {
        "tokens": attrgetter("tokens"),
        "seconds": attrgetter("seconds"),
        "bytes": lambda result: 4 * result.parameters,
    }
    rows = []
    for method in stats.ranking(found):
        row = [method, str(len(stats.values(found, method, kinds["tokens"])))]
        for value in kinds.values():
            mine, plain = (stats.values(found, name, value) for name in (method, SHORT))
            common = mine.keys() & plain.keys()
            total = sum(plain[pair] for pair in common)
            times = f"{sum(mine[pair] for pair in common) / total:.2f}" if total else ""
            row += [f"{fmean(mine.values()):,.0f}", times]
        rows.append(row)
    yield "## Cost"
    yield (
        "Mean cost of one curve over tasks and seeds: all training runs that it takes, and the "
        f"cut; times is the multiple of {SHORT}, on what both have done. Tokens are those of "
        "gradient steps; bytes are those of the factors that training leaves, in float32."
    )
    yield table(("method", "curves", *(h for kind in kinds for h in (kind, "times"))), rows)


def _each_rank(found: Sequence[Result], task: str) -> Iterator[str]:
    """Yield the differences to LoRA trained at each rank."""
    rows = {
        method: EACH
        for method in stats.ranking(found, task)
        if method != EACH and stats.differences(found, method, EACH, stats.mean_loss, task)
    }
    if rows:
        yield f"## {task}: minus LoRA trained at the rank"
        yield "Accuracy in points of %, more is better:"
        yield _grid(found, rows, _at_ranks(found, task, stats.accuracy_at), points, task)
        yield "Loss in nats per token, less is better:"
        yield _grid(found, rows, _at_ranks(found, task, stats.loss_at), more, task)


def _against(found: Sequence[Result], other: str) -> Iterator[str]:
    rows = []
    for method in stats.ranking(found):
        area = stats.mean(found, method, stats.aurac_log2, None, other)
        loss = stats.mean(found, method, stats.mean_loss, None, other)
        if method != other and area and loss:
            rows.append((method, str(area.n), points(area), more(loss)))
    if rows:
        yield f"## Minus {other}, over all tasks"
        yield POOLED
        yield table(("method", "pairs", "AURAC (log2), points", "mean loss, nats"), rows)


def _rates(study: Study, runs: Mapping[Job, Run]) -> Iterator[str]:
    tried = {
        (method, task, unit): state
        for method in study.methods
        for task in study.tasks
        for unit in units(study, method, task)
        if (state := rates(study, runs, unit)).losses
    }
    grid = sorted({rate for state in tried.values() for rate in state.losses})
    rows = [
        (
            *(method, task, str(unit.rank), "" if state.chosen is None else f"{state.chosen:g}"),
            *(_loss(state.losses[rate]) if rate in state.losses else "" for rate in grid),
        )
        for (method, task, unit), state in tried.items()
    ]
    yield "## Learning rates"
    yield (
        "Validation loss by learning rate, in nats per token: the mean over the ranks, or for a "
        "method that trains for each rank, that at its own."
    )
    yield table(("method", "task", "R", "chosen", *(f"{rate:g}" for rate in grid)), rows)


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def _at_ranks(
    found: Sequence[Result], task: str, value: Callable[[int], Value]
) -> dict[str, Value]:
    ranks = {rank for result in found if result.task == task for rank in result.ranks}
    return {str(rank): value(rank) for rank in sorted(ranks)}


def _grid(
    found: Sequence[Result],
    methods: Mapping[str, str | None],
    columns: Mapping[str, Value],
    form: Form,
    task: str,
) -> str:
    """Return a row for each method: what it has, or what it has more than another method."""
    rows = []
    for method, minus in methods.items():
        cells = [stats.mean(found, method, value, task, minus) for value in columns.values()]
        seeds = max((cell.n for cell in cells if cell), default=0)
        if seeds:
            rows.append((method, str(seeds), *(_cell(cell, form) for cell in cells)))
    return table(("method", "seeds", *columns), rows)


def _cell(found: Estimate | None, form: Form) -> str:
    return "" if found is None else form(found)


def comparison(study: Study, recorded: Sequence[Result], again: Sequence[Result]) -> str:
    """Return the recorded curves beside those of new runs, over the same tasks and seeds.

    A rank differs where the two intervals do not meet; one seed has no interval.
    """
    rows = []
    for kind, value, form in (
        ("accuracy", stats.accuracy_at, percent),
        ("loss", stats.loss_at, nats),
    ):
        for method in dict.fromkeys(result.method for result in again):
            for rank in study.nesting(study.rank):
                new = stats.mean(again, method, value(rank))
                old = stats.mean(recorded, method, value(rank))
                if new and old:
                    rows.append((method, kind, str(rank), form(old), form(new), _meets(old, new)))
    return table(("method", "", "rank", "recorded", "again", "intervals"), rows)


def _meets(one: Estimate, other: Estimate) -> str:
    if one.half_width is None or other.half_width is None:
        return "one seed"
    apart = abs(one.mean - other.mean)
    return "meet" if apart <= one.half_width + other.half_width else "differ"
