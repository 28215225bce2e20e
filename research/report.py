"""What people read of a study: tables and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean

from research import stats
from research.cells import count, more, nats, nats_or_diverged, percent, points, reading_of, written_p
from research.commonsense import OTHER_METRIC, USUAL_METRIC
from research.pages import PICTURE, Block, Table, markdown
from research.plot import draw, legible
from research.recipes import EACH
from research.records import Result, Tried, write_text
from research.stats import Value

_WORDS = [
    "± is half the width of a two-sided 95 % t interval over the seeds. It says how much another seed may change, and "
    "nothing of other tasks, questions or models. About one interval in twenty misses, and there are many here. A "
    "number without ± comes from one seed.",
    "AURAC is the mean height of the accuracy over the ranks, along log2(rank) or along the rank; gap is the accuracy "
    "at the largest rank minus that at the worst one. Accuracies are in %, losses in nats per token. "
    f"{EACH} is LoRA trained at each rank by itself.",
]
_NO_REFERENCE = f"There is no {EACH} with the same seeds to compare with."
_POOLED = (
    "Each pair of a task and a seed counts once. The interval takes the pairs for independent and says nothing of "
    "tasks that are not here; in the loss, a task with larger losses weighs more."
)


Planned = tuple[str, str, int]
"""A method, a task and a seed."""


def write_report(
    results: Sequence[Result],
    folder: Path,
    *,
    title: str,
    about: Mapping[str, str],
    tried: Sequence[Tried],
    planned: Collection[Planned] = (),
    winner: str | None = None,
) -> None:
    """Write ``study.md`` and ``study.png``.

    Args:
        results: Every curve there is, of a whole study or of a part of it.
        folder: Made if need be; its other files stay.
        title: Of the report and of the picture.
        about: What the results do not say of themselves, by a word for it: model, items, hardware, versions.
        tried: Learning rates.
        planned: Every method, task and seed of the whole study. What of them has no result is named.
        winner: The method to test, if it was named before the data were seen; else `stats.nominate`, which sees
            validation data only, or without them `stats.best`.

    Raises:
        MatryoshkaError: A name is not in the results, or the folder cannot be written.
    """
    text = tables(results, title=title, about=about, tried=tried, planned=planned, winner=winner)
    write_text(folder / "study.md", text)
    draw(results, folder / PICTURE, title=title, methods=legible(results, _tested(results, tried, winner)))


def tables(
    results: Sequence[Result],
    *,
    title: str,
    about: Mapping[str, str],
    tried: Sequence[Tried],
    planned: Collection[Planned] = (),
    winner: str | None = None,
) -> str:
    """The text of ``study.md``; arguments are those of `write_report`."""
    tasks = sorted({result.task for result in results})
    blocks: list[Block] = [
        (1, title),
        *_what(results, about, planned, _tested(results, tried, winner)),
        *(block for task in tasks for block in _curves(results, task)),
        *_costs(results),
        *_full_rank(results, tasks),
        *_each_rank(results, tasks),
        *_same_cut(results),
        *_tests(results, tasks, tried, winner),
        *_each_other(results),
        *_rates(tried),
    ]
    return markdown(blocks)


def _tested(results: Sequence[Result], tried: Sequence[Tried], winner: str | None) -> str | None:
    return winner or stats.nominate(results, tried) or stats.best(results)


def _what(
    results: Sequence[Result], about: Mapping[str, str], planned: Collection[Planned], winner: str | None
) -> list[Block]:
    methods, drawn = sorted(stats.ranking(results)), legible(results, winner)
    tasks = sorted({result.task for result in results})
    seeds = {task: {result.seed for result in results if result.task == task} for task in tasks}
    counts = ", ".join(f"{len(seeds[task])} of {task}" for task in tasks)
    rows = [*about.items(), ("methods", ", ".join(methods)), ("seeds", counts)]
    blocks: list[Block] = [(2, "What was compared"), Table(("study", ""), rows), *_WORDS]
    done = {(result.method, result.task, result.seed) for result in results}
    of = Counter((method, task) for method, task, _ in planned)
    lacking = Counter((one[0], one[1]) for one in planned if one not in done)
    missing = [f"{method} on {task} ({lacking[method, task]} of {of[method, task]} seeds)" for method, task in lacking]
    if missing:
        blocks.append(f"This study is partial. Not run, or diverged: {', '.join(missing)}.")
    if single := [task for task in tasks if len(seeds[task]) == 1]:
        blocks.append(f"One seed only, and so no interval: {', '.join(single)}.")
    if len(drawn) < len(methods):
        blocks.append(f"The picture has {len(drawn)} of the {len(methods)} methods: {', '.join(drawn)}.")
    return [*blocks, PICTURE]


def _curves(results: Sequence[Result], task: str) -> list[Block]:
    accuracy = _at_ranks(results, task, stats.accuracy_at)
    accuracy |= {"AURAC log2": stats.aurac_log2, "linear": stats.aurac_linear, "gap": stats.worst_rank_gap}
    loss = _at_ranks(results, task, stats.loss_at) | {"mean": stats.mean_loss}
    blocks: list[Block] = [(2, f"Task {task}"), "Accuracy at each rank, best AURAC (log2) first:"]
    rows = dict.fromkeys(stats.ranking(results, task), "")
    grids = _grid(results, rows, accuracy, percent, task), _grid(results, rows, loss, nats, task)
    return [*blocks, grids[0], *_parts(results, task), "Loss at each rank:", grids[1]]


def _parts(results: Sequence[Result], task: str) -> list[Block]:
    """Of choices: each of the tasks that the accuracy is the mean of, with that of the base model."""
    blocks: list[Block] = []
    having = [result for result in results if result.task == task and result.curve.parts]
    for text, metrics in (("usual", USUAL_METRIC), ("other", OTHER_METRIC)):
        columns = {f"{part} ({metric})": {part: metric} for part, metric in metrics.items()} | {"mean": metrics}
        rows: list[Sequence[str]] = []
        for method in stats.ranking(having, task):
            ranks = sorted({rank for result in having if result.method == method for rank in result.ranks})
            for rank in ranks if rows else (0, *ranks):
                values = [stats.chosen_at(of, rank) for of in columns.values()]
                cells = [percent(stats.mean(having, method, value, task)) for value in values]
                rows.append((method, str(rank), *cells) if rank else ("the base model", "", *cells))
        if rows:
            blocks += [f"Right answers by each task's {text} metric:", Table(("method", "rank", *columns), rows)]
    return blocks


def _costs(results: Sequence[Result]) -> list[Block]:
    kinds: dict[str, Value] = {
        "tokens": attrgetter("tokens"),
        "seconds": attrgetter("seconds"),
        "bytes": lambda result: 4 * result.parameters,
    }
    methods = stats.ranking(results)
    found = {m: [stats.values(results, m, value) for value in kinds.values()] for m in methods}
    means = {method: [fmean(cost.values()) for cost in costs] for method, costs in found.items()}
    # The cheapest cut of those with most curves, as training is the same for all.
    plain = min(
        (method for method in methods if method.startswith("lora/")),
        key=lambda method: (-len(found[method][0]), means[method]),
        default=None,
    )
    rows = []
    for method, costs in found.items():
        row = [method, str(len(costs[0]))]
        for mine, theirs, cost in zip(costs, found[plain or method], means[method], strict=True):
            common = mine.keys() & theirs.keys()
            total = sum(theirs[pair] for pair in common)
            row += [f"{cost:,.0f}", f"{sum(mine[pair] for pair in common) / total:.2f}" if plain and total else ""]
        rows.append(row)
    text = "Mean cost of one curve over tasks and seeds: all the training runs that it takes, and the cut; "
    text += f"times is the multiple of {plain}, on what both have done." if plain else "there is no lora/ to divide by."
    text += " Tokens are those of gradient steps; a cut that only looks at training rows pays for it in its seconds."
    text += " Bytes are those of the factors that training leaves, in float32."
    return [(2, "Cost"), text, Table(("method", "curves", *(h for kind in kinds for h in (kind, "times"))), rows)]


def _full_rank(results: Sequence[Result], tasks: Sequence[str]) -> list[Block]:
    rows = []
    for task in tasks:
        for method in _compared(results, task):
            accuracy = stats.mean(results, method, stats.accuracy_at(), task, EACH)
            loss = stats.mean(results, method, stats.loss_at(), task, EACH)
            reading = f"accuracy {reading_of(accuracy)}, loss {reading_of(loss)}"
            rows.append((method, task, count(accuracy), points(accuracy), more(loss), reading))
    text = (
        f"Method minus {EACH} at the largest rank, accuracy in points of % and loss in nats, paired by seed. An "
        "interval wholly on the worse side contradicts, for that task, that the method loses nothing there. One that "
        "holds zero is undecided: its worse end is what may still be lost."
    )
    table = Table(("method", "task", "seeds", "accuracy", "loss", "reading"), rows)
    return [(2, "At the largest rank against LoRA trained at it"), *([text, table] if rows else [_NO_REFERENCE])]


def _each_rank(results: Sequence[Result], tasks: Sequence[str]) -> list[Block]:
    text = f"Method minus {EACH} at the same rank, paired by seed."
    scopes = [task for task in ([*tasks, None] if len(tasks) > 1 else tasks) if _compared(results, task)]
    blocks: list[Block] = [(2, "At every rank against LoRA trained at that rank"), text if scopes else _NO_REFERENCE]
    for task in scopes:
        blocks += [(3, f"Task {task}")] if task else [(3, "All tasks"), _POOLED]
        blocks += _differences(results, dict.fromkeys(_compared(results, task), EACH), task)
    return blocks


def _same_cut(results: Sequence[Result]) -> list[Block]:
    """What a recipe is worth by itself: its cuts minus the same cuts of plain LoRA."""
    methods = stats.ranking(results)
    pairs = {method: f"lora/{method.partition('/')[2]}" for method in methods if not method.startswith("lora/")}
    rows = {m: plain for m, plain in pairs.items() if stats.differences(results, m, plain, stats.mean_loss)}
    if not rows:
        return []
    text = (
        "Method minus LoRA that is trained at the largest rank and cut in the same way, over all tasks: what the "
        f"recipe adds. {_POOLED} Nothing is corrected for the number of cells."
    )
    return [(2, "At every rank against plain LoRA in the same cut"), text, *_differences(results, rows, None)]


def _differences(results: Sequence[Result], rows: Mapping[str, str], task: str | None) -> list[Block]:
    accuracy, loss = (_at_ranks(results, task, value) for value in (stats.accuracy_at, stats.loss_at))
    return [
        "Accuracy in points of %, more is better:",
        _grid(results, rows, accuracy, points, task),
        "Loss in nats per token, less is better:",
        _grid(results, rows, loss, more, task),
    ]


def _tests(results: Sequence[Result], tasks: Sequence[str], tried: Sequence[Tried], winner: str | None) -> list[Block]:
    blocks: list[Block] = [(2, "One method against the others, over all tasks")]
    method = _tested(results, tried, winner)
    others = [name for name in stats.ranking(results) if name != method]
    if method is None or not others:
        return [*blocks, "This takes two methods, and one to test that has results on every task or is named."]
    how = "picked here, for its AURAC (log2) in these very data"
    if winner:
        how = "named by whoever made this report"
    elif stats.nominate(results, tried):
        how = (
            "picked on validation data: lowest geometric mean, over the tasks, of the loss at its learning rate, of "
            "the methods that train as long as the study says"
        )
    single = tasks if len(tasks) > 1 else ()
    columns = (
        " The last columns are each task by itself, over its seeds: their intervals are not corrected."
        if single
        else ""
    )
    blocks += [
        f"{method} minus each rival, paired by task and seed. {_POOLED} p is that of a two-sided sign-flip permutation "
        "test, which takes the sign of each pair, whatever its task, for a fair coin if the methods are equal. Holm "
        f"corrects p for the number of rivals, in each measure by itself.{columns}",
        f"{method} was {how}. A method that is picked by the data it is tested on looks better there, in difference "
        "and in p, than it is; one that was named or picked without them does not.",
    ]
    for text, value, form in _MEASURES:
        found = stats.compare(results, method, others, value)
        rows = [
            (
                *(c.rival, count(c.difference), form(c.difference), written_p(c.p), written_p(c.holm)),
                *(form(stats.mean(results, method, value, task, c.rival)) for task in single),
            )
            for c in found
        ]
        blocks += [text, Table(("rival", "pairs", "difference", "p", "Holm p", *single), rows)]
    if pairs := [c.difference.n for c in found if c.difference]:
        few, most = min(pairs), max(pairs)
        least = 2.0 ** (1 - most) * len(pairs)
        blocks.append(
            f"Of a rival with {few} pairs, the fewest here, no p can be below {written_p(2.0 ** (1 - few))}; of "
            f"{len(pairs)} corrected ones, with {most} pairs at the most, none below {written_p(min(1.0, least))}."
        )
    return blocks


def _each_other(results: Sequence[Result]) -> list[Block]:
    """Two methods may differ in one thing alone, such as P or the cut: here is what that is worth."""
    methods = stats.ranking(results)
    blocks: list[Block] = [
        (2, "Every method against every other, over all tasks"),
        f"Row minus column, paired by task and seed. {_POOLED} No correction for the number of cells.",
    ]
    for text, value, form in _MEASURES:
        rows = [
            (mine, *(form(stats.mean(results, mine, value, None, other)) if mine != other else "" for other in methods))
            for mine in methods
        ]
        blocks += [text, Table(("method", *methods), rows)]
    return blocks


def _rates(tried: Sequence[Tried]) -> list[Block]:
    blocks: list[Block] = [(2, "Learning rates")]
    if not tried:
        return [*blocks, "None were given."]
    rates = sorted({rate for one in tried for rate in one.losses})
    rows = []
    for one in tried:
        cells = [nats_or_diverged(one.losses[rate]) if rate in one.losses else "" for rate in rates]
        rows.append((one.method, one.task, str(one.rank), "" if one.chosen is None else f"{one.chosen:g}", *cells))
    # The grid grows until its best has worse ones on both sides, but not for ever.
    edge = {f"{one.method} on {one.task}": None for one in tried if one.chosen in (min(one.losses), max(one.losses))}
    if edge:
        blocks.append(f"The best rate is the last that was tried, and a better one may lie beyond: {', '.join(edge)}.")
    return [
        *blocks,
        "Validation loss by learning rate, in nats per token: the mean over the ranks, or of a method that trains for "
        "each rank, that at its own. Each number is of one run. How fast a row rises beside its best is how sensitive "
        "the method is.",
        Table(("method", "task", "R", "chosen", *(f"{rate:g}" for rate in rates)), rows),
    ]


def _compared(results: Sequence[Result], task: str | None) -> list[str]:
    """The methods, best first, that have a task and seed in common with `EACH`."""
    order = [method for method in stats.ranking(results, task) if method != EACH]
    return [method for method in order if stats.differences(results, method, EACH, stats.mean_loss, task)]


def _at_ranks(results: Sequence[Result], task: str | None, value: Callable[[int], Value]) -> dict[str, Value]:
    ranks = {rank for result in results if task in (None, result.task) for rank in result.ranks}
    return {str(rank): value(rank) for rank in sorted(ranks)}


def _grid(
    results: Sequence[Result],
    methods: Mapping[str, str],
    columns: Mapping[str, Value],
    form: partial[str],
    task: str | None,
) -> Table:
    """A row for each method: what it has, or where another method is given, what it has more than that one."""
    rows = []
    for method, minus in methods.items():
        found = [stats.mean(results, method, value, task, minus) for value in columns.values()]
        # Tasks may differ in their ranks: the count is that of the rank with most.
        rows.append((method, str(max(cell.n for cell in found if cell)), *map(form, found)))
    return Table(("method", "seeds" if task else "pairs", *columns), rows)


_MEASURES = (
    ("AURAC (log2) in points of %, more is better:", stats.aurac_log2, points),
    ("Mean loss over the ranks in nats per token, less is better:", stats.mean_loss, more),
)
"""What sums a curve up, and how a difference in it is written."""
