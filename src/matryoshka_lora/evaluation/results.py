"""The results of an evaluation, and their files.

``evaluation.json`` holds the fields of `Evaluation` without the examples, and ``examples.jsonl``
one `Example` per line. Rank 0 is the base model without the adapter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from matryoshka_lora.atomic import replace_file
from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.lora.results import Scores
from matryoshka_lora.nesting import check_ranks
from matryoshka_lora.text import format_table, format_value, join_lines
from matryoshka_lora.units import format_size, pluralize

EVALUATION_NAME = "evaluation.json"
EXAMPLES_NAME = "examples.jsonl"

# The errors of a file whose values have an unexpected type or structure.
_FILE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)

AuracAxis = Literal["log2", "linear"]
"""The axis of the ranks under the rank-accuracy curve."""


def aurac(accuracies: Sequence[float], ranks: Sequence[int], axis: AuracAxis = "log2") -> float:
    """Return the area under the rank-accuracy curve, divided by its width (arXiv 2605.07850).

    The area is computed by the trapezoidal rule over ``log2(rank)`` or over the rank itself. On the
    linear axis the largest ranks have nearly all the weight, so ``"log2"`` is the better choice for
    comparisons.

    Args:
        accuracies: One accuracy per rank, in any unit.
        ranks: Positive, strictly increasing integers.
        axis: ``"log2"`` or ``"linear"``.

    Returns:
        The area in the unit of the accuracies. For a single rank, its accuracy.

    Raises:
        MatryoshkaError: The ranks or the axis are not valid, or there is not one finite accuracy
            per rank.
    """
    checked = check_ranks(ranks)
    if len(accuracies) != len(checked) or not all(map(math.isfinite, accuracies)):
        raise MatryoshkaError(
            f"`accuracies` must hold one finite number per rank, got {list(accuracies)} for "
            f"{len(checked)} ranks."
        )
    check_choice("axis", axis, get_args(AuracAxis))
    if len(checked) == 1:
        return float(accuracies[0])
    x = np.array(checked, dtype=np.float64)
    if axis == "log2":
        x = np.log2(x)
    y = np.array(accuracies, dtype=np.float64)
    # NumPy 1.26 has no `trapezoid`.
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / (x[-1] - x[0]))


class Difference(NamedTuple):
    """How much better one rank is than another.

    Attributes:
        value: The difference in the metric's unit; positive if the first rank is better.
        standard_error: The standard error of the difference; None if it is unknown.
    """

    value: float
    standard_error: float | None

    def __str__(self) -> str:
        """Return, for example, ``"better by 0.250 ± 0.050"``."""
        text = "equally good"
        if self.value != 0:
            direction = "better" if self.value > 0 else "worse"
            text = f"{direction} by {format_value(abs(self.value), self.standard_error)}"
        elif self.standard_error is not None:
            text += f" ± {self.standard_error:.3f}"
        if self.standard_error is not None and abs(self.value) <= 2 * self.standard_error:
            text += "; they cannot be told apart on these questions"
        return text


class PairedValues(NamedTuple):
    """A metric at the examples, at two ranks.

    Attributes:
        values: Shape (examples,).
        other_values: The same at the other rank.
        unseen_difference: How much the ranks may differ at an example that was not asked: 1 for
            scores from 0 to 1, and otherwise the standard deviation of the values.
    """

    values: Float64Array
    other_values: Float64Array
    unseen_difference: float


@dataclass
class Metric:
    """A metric of a task at every rank.

    Attributes:
        higher_is_better: None if the task does not define it.
        values: The value by rank; None if it is not a finite number.
        standard_errors: The standard error by rank; None if it is unknown.
    """

    higher_is_better: bool | None
    values: dict[int, float | None]
    standard_errors: dict[int, float | None]

    def aurac(self, axis: AuracAxis) -> float | None:
        """Return the AURAC, or None if lower is better or a value is missing."""
        ranks = [rank for rank in self.values if rank > 0]
        values = [self.values[rank] for rank in ranks]
        if self.higher_is_better is False or not ranks or None in values:
            return None
        return aurac([value for value in values if value is not None], ranks, axis)


@dataclass
class TaskResult:
    """The metrics of a task, or of a group of tasks.

    Attributes:
        num_examples: The number of examples, over all tasks of a group.
        num_fewshot: The number of few-shot examples in each prompt; None for a group.
        primary_metric: The metric that plots show and that `select` uses by default.
        metrics: The metrics by name, such as ``"acc,none"``: metric and filter of the harness.
    """

    num_examples: int
    num_fewshot: int | None
    primary_metric: str
    metrics: dict[str, Metric]

    @property
    def metric_name(self) -> str:
        """The name of the primary metric, without the harness's default filter ``none``."""
        return self.primary_metric.removesuffix(",none")


@dataclass
class Example:
    """An example with the answers of all ranks.

    Attributes:
        task: The task's name in the evaluation.
        doc_id: The example's number in the harness.
        prompt: The end of the prompt.
        target: The correct answer.
        answers: The answer by rank: a string, the most likely choice, or a log-likelihood.
        metrics: The value by rank of each metric; see `TaskResult.metrics`.
    """

    task: str
    doc_id: int
    prompt: str
    target: str
    answers: dict[int, str] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(repr=False)
class Evaluation:
    """The results of an adapter at several ranks.

    Attributes:
        settings: The adapter and its revision, the base model with its revision and dtype, and
            the limit.
        ranks: The evaluated ranks, strictly increasing, without 0.
        sizes: The size in bytes of the exported adapter by rank.
        tasks: The results by the name of the task or group.
        examples: The examples of all tasks.
    """

    settings: dict[str, Any]
    ranks: tuple[int, ...]
    sizes: dict[int, int]
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return a table of values by rank, and a line about each task.

        One task has a column for each metric; several tasks have one each, for the primary metric.
        """
        metrics = {task: self.metric(task) for task in self.tasks}
        if len(self.tasks) == 1:
            (result,) = self.tasks.values()
            metrics = {key.removesuffix(",none"): metric for key, metric in result.metrics.items()}
        rows = [["rank", "size", *metrics]]
        for rank in (0, *self.ranks):
            cells = [
                format_value(metric.values.get(rank), metric.standard_errors.get(rank))
                for metric in metrics.values()
            ]
            if rank > 0:
                rows.append([str(rank), format_size(self.sizes[rank]), *cells])
            elif any(cells):
                rows.append(["base", "", *cells])
        lines = format_table(rows, indent="")
        for name, result in self.tasks.items():
            lines.append(
                f"{name}: {pluralize(result.num_examples, 'question')}, "
                f"{pluralize(result.num_fewshot or 0, 'shot')}; `select` uses {result.metric_name}"
            )
        lines.append("± is one standard error over the questions.")
        if any("loss" in name for name in metrics):
            lines.append("loss: nats per token of the answers, their end included.")
        return join_lines(lines)

    def task_name(self, name: str | None = None) -> str:
        """Return the name of a task; defaults to the only one.

        Raises:
            MatryoshkaError: No task has this name, or there are several and name is None.
        """
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if name is None:
            raise MatryoshkaError(f"Pass `task`, one of {', '.join(self.tasks)}.")
        check_choice("task", name, self.tasks)
        return name

    def metric(self, task: str | None = None) -> Metric:
        """Return the primary metric of a task. See `task_name` for arguments and errors."""
        result = self.tasks[self.task_name(task)]
        return result.metrics[result.primary_metric]

    def scores(self) -> tuple[Scores, ...]:
        """Return each metric of each task by rank, for a model card."""
        return tuple(
            Scores(
                task,
                name.removesuffix(",none"),
                result.num_examples,
                self.settings.get("dtype", "unknown"),
                {rank: value for rank, value in metric.values.items() if value is not None},
                metric.standard_errors,
            )
            for task, result in self.tasks.items()
            for name, metric in result.metrics.items()
        )

    def values(self, task: str | None = None) -> dict[int, float | None]:
        """Return the primary metric by rank, without the base model.

        See `task_name` for arguments and errors.
        """
        values = self.metric(task).values
        return {rank: values[rank] for rank in self.ranks}

    def difference(self, task: str | None, rank: int, other_rank: int) -> Difference | None:
        """Return how much better a rank is than another by the primary metric.

        If the metric is a mean over the examples, the standard error is computed from the paired
        differences, with one more example each way (Bonett and Price 2012), so that it is not 0 if
        a few examples show no difference. Otherwise, for example for a perplexity or an F1 score,
        the two values are treated as independent, which overestimates the error if they are
        correlated.

        Returns:
            The difference, or None if a value is missing.

        Raises:
            MatryoshkaError: See `task_name`.
        """
        task = self.task_name(task)
        metric = self.metric(task)
        value, other_value = metric.values.get(rank), metric.values.get(other_rank)
        if value is None or other_value is None:
            return None

        pairs = self.paired_values(task, rank, other_rank)
        standard_error: float | None = None
        if pairs is not None:
            # One more example each way: a few examples may show no difference, and others one.
            unseen = [pairs.unseen_difference, -pairs.unseen_difference]
            differences = np.append(pairs.values - pairs.other_values, unseen)
            standard_error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        else:
            error = metric.standard_errors.get(rank)
            other_error = metric.standard_errors.get(other_rank)
            if error is not None and other_error is not None:
                standard_error = math.hypot(error, other_error)
        sign = -1 if metric.higher_is_better is False else 1
        return Difference(sign * (value - other_value), standard_error)

    def paired_values(self, task: str | None, rank: int, other_rank: int) -> PairedValues | None:
        """Return the primary metric at each example, at two ranks.

        Returns:
            The values, or None if there are none, or if the metric is not their mean.

        Raises:
            MatryoshkaError: See `task_name`.
        """
        task = self.task_name(task)
        metric = self.metric(task)
        pairs: list[tuple[float, float]] = []
        for example in self.examples:
            by_rank = example.metrics.get(self.tasks[task].primary_metric, {})
            if example.task == task and rank in by_rank and other_rank in by_rank:
                pairs.append((by_rank[rank], by_rank[other_rank]))
        if len(pairs) < 2:
            return None
        values = np.array(pairs, dtype=np.float64)
        for mean, r in zip(values.mean(axis=0), (rank, other_rank), strict=True):
            expected = metric.values.get(r)
            if expected is None or not math.isclose(mean, expected, rel_tol=1e-6, abs_tol=1e-9):
                return None
        is_binary = bool(np.isin(values, (0, 1)).all())
        is_score = metric.higher_is_better and np.min(values) >= 0 and np.max(values) <= 1
        unseen_difference = 1.0 if is_binary or is_score else float(values.std())
        return PairedValues(values[:, 0], values[:, 1], unseen_difference)

    def write(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``examples.jsonl`` into a folder.

        Each file is replaced in one step. Other files in the folder stay.
        """
        fields = asdict(self)
        lines = [json.dumps(example, ensure_ascii=False) for example in fields.pop("examples")]
        for name, task in fields["tasks"].items():
            for axis in get_args(AuracAxis):
                task[f"aurac_{axis}"] = self.metric(name).aurac(axis)
        text = json.dumps(fields, indent=1, allow_nan=False) + "\n"
        with replace_file(folder / EVALUATION_NAME) as file:
            file.write_text(text, encoding="utf-8")
        with replace_file(folder / EXAMPLES_NAME) as file:
            # A file name that is not UTF-8 has lone surrogates, which become JSON's escapes.
            file.write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace"
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Return an evaluation that `write` has written.

        Args:
            path: The folder, or an adapter with the folder ``ADAPTER-evaluation`` next to it.

        Raises:
            MatryoshkaError: There is no evaluation, or it is damaged.
        """
        file = Path(path, EVALUATION_NAME)
        if not file.is_file():
            file = Path(f"{Path(path)}-evaluation", EVALUATION_NAME)
        if not file.is_file():
            raise MatryoshkaError(
                f"{path} holds no {EVALUATION_NAME}. Pass a folder that evaluate() has written."
            )
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            ranks = check_ranks(fields["ranks"])
            _check_type(fields["settings"]["adapter"], str, NoneType)
            tasks = {name: _read_task(task, ranks) for name, task in fields["tasks"].items()}
            sizes = _by_rank(fields["sizes"], ranks, int)
            examples = _read_examples(file.with_name(EXAMPLES_NAME))
        except (OSError, *_FILE_ERRORS) as error:
            raise MatryoshkaError(
                f"{file} is damaged ({error}), or evaluate() has not written it. Evaluate again."
            ) from error
        return cls(fields["settings"], ranks, sizes, tasks, examples)


def _read_task(fields: Mapping[str, Any], ranks: Sequence[int]) -> TaskResult:
    metrics: dict[str, Metric] = {}
    for name, metric in fields["metrics"].items():
        metrics[name] = Metric(
            higher_is_better=_check_type(metric["higher_is_better"], bool, NoneType),
            values=_by_rank(metric["values"], ranks, float, NoneType),
            standard_errors=_by_rank(metric["standard_errors"], (), float, NoneType),
        )
    if fields["primary_metric"] not in metrics:
        raise KeyError(fields["primary_metric"])
    return TaskResult(
        num_examples=_check_type(fields["num_examples"], int),
        num_fewshot=_check_type(fields["num_fewshot"], int, NoneType),
        primary_metric=fields["primary_metric"],
        metrics=metrics,
    )


def _read_examples(file: Path) -> list[Example]:
    if not file.is_file():
        return []
    examples: list[Example] = []
    # Not splitlines(), which would also split at separators within a string.
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line:
            example = Example(**json.loads(line))
            example.answers = _by_rank(example.answers, (), str)
            for metric, values in example.metrics.items():
                example.metrics[metric] = _by_rank(values, (), float)
            examples.append(example)
    return examples


def _by_rank(values: Mapping[Any, Any], ranks: Sequence[int], *types: type) -> Any:
    """Return values by rank, with integers as keys: JSON writes them as strings.

    Raises:
        LookupError: One of ``ranks`` has no value.
        TypeError: A value has another type.
    """
    by_rank = {int(rank): _check_type(value, *types) for rank, value in values.items()}
    for rank in ranks:
        if rank not in by_rank:
            raise LookupError(f"no value at rank {rank}")
    return by_rank


def _check_type(value: Any, *types: type) -> Any:
    """Return a value from JSON, and check its type. An integer is accepted as a float."""
    if float in types and type(value) is int:
        value = float(value)
    if type(value) not in types or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError(f"unexpected {value!r}")
    return value
