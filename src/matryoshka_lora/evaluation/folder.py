"""Evaluate each adapter of a folder, and compare their ranks in one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from matryoshka_lora.atomic import PathLike, check_output
from matryoshka_lora.errors import MatryoshkaError, optional_imports
from matryoshka_lora.evaluation.evaluate import default_output, evaluate, is_removable
from matryoshka_lora.evaluation.results import Evaluation
from matryoshka_lora.evaluation.select import Selection, select
from matryoshka_lora.examples import prompt_and_completion, read_examples
from matryoshka_lora.formats.open import find_loras, open_adapter
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.text import format_table, join_lines, with_name
from matryoshka_lora.units import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WITHIN = "1%"
"""How far below the best rank's value the rank of the table may be."""


@dataclass(frozen=True, repr=False)
class FolderEvaluation:
    """The result of `evaluate_folder`.

    Attributes:
        evaluations: The `Evaluation` of each adapter by the name of its folder.
        failed: Why the other adapters were not evaluated, by name.
    """

    evaluations: dict[str, Evaluation]
    failed: dict[str, str]

    def selections(self) -> dict[tuple[str, str], Selection | MatryoshkaError]:
        """Return the rank within 1% of the best one, or why there is none.

        The keys are the names of the adapter and of the task.
        """
        selections: dict[tuple[str, str], Selection | MatryoshkaError] = {}
        for name, evaluation in self.evaluations.items():
            for task in evaluation.tasks:
                try:
                    selections[name, task] = select(evaluation, WITHIN, task=task)
                except MatryoshkaError as error:
                    selections[name, task] = error
        return selections

    @property
    def selected_ranks(self) -> dict[str, int]:
        """The rank of each adapter that is within 1% of its best one in each task."""
        ranks: dict[str, int] = {}
        for (name, _), selection in self.selections().items():
            if isinstance(selection, Selection):
                ranks[name] = max(ranks.get(name, 0), selection.rank)
        return ranks

    def __repr__(self) -> str:
        """Return a table of the adapters, as `matryoshka eval` prints it."""
        ranks = sorted({rank for value in self.evaluations.values() for rank in value.ranks})
        have_tasks = any(len(evaluation.tasks) > 1 for evaluation in self.evaluations.values())
        rows = [["base", *(f"rank {rank}" for rank in ranks), f"within {WITHIN}", "questions"]]
        rows[0] += ["metric", *["task"] * have_tasks, "name"]
        problems: list[str] = []
        for (name, task), selection in self.selections().items():
            evaluation = self.evaluations[name]
            result, values = evaluation.tasks[task], evaluation.metric(task).values
            best_rank, selected = None, ""
            if isinstance(selection, Selection):
                best_rank, selected = selection.best_rank, str(selection.rank)
                selected += " " if selection.is_significant else "?"
            else:
                problems.append(f"{name}: {selection}")
            cells: list[str] = []
            for rank in (0, *ranks):
                value = values.get(rank)
                cells.append("" if value is None else f"{value:.3f}{' *'[rank == best_rank]}")
            cells += [selected, str(result.num_examples), result.metric_name]
            rows.append([*cells, *[task] * have_tasks, name])
        problems += [f"Not evaluated: {with_name(name, why)}" for name, why in self.failed.items()]
        lines = [
            *format_table(rows, indent="", left_aligned=2 + have_tasks),
            "*: the best rank",
            f"within {WITHIN}: the smallest rank that is at most {WITHIN} worse than the best one",
            f"?: too few questions to exclude that a larger rank is better by more than {WITHIN}",
        ]
        return join_lines([*lines, *problems])


class _BaseModel(NamedTuple):
    name: str
    revision: str | None


class _Job(NamedTuple):
    """An adapter to evaluate, its data if there are no tasks, and the folder to write."""

    lora: Lora
    base_model: _BaseModel
    ranks: tuple[int, ...]
    data: Path | None
    output: Path


def evaluate_folder(
    folder: PathLike,
    tasks: str | Sequence[str] | None = None,
    data: PathLike | None = None,
    ranks: Sequence[int] | Literal["all"] | None = None,
    *,
    output: PathLike | None = None,
    skip_bad: bool = False,
    **options: Any,
) -> FolderEvaluation:
    """Evaluate each adapter in a folder. See `evaluate`, which this calls for one after the other.

    The evaluation of an adapter is written before the next one begins. Adapters of the same base
    model share it, so it is loaded once.

    Args:
        folder: A folder of PEFT folders.
        tasks: As in `evaluate`.
        data: Instead of tasks, a file of examples for all adapters; or a folder with the file
            ``NAME.jsonl`` for the adapter in the folder NAME.
        ranks: As in `evaluate`; each adapter is evaluated at the ones that it has.
        output: The folder to write, with a folder for each adapter. Defaults to
            ``ADAPTER-evaluation`` next to each adapter.
        skip_bad: Whether to evaluate the other adapters if some cannot be evaluated.
        options: The options ``base_model``, ``base_revision``, ``dtype``, ``model_args``,
            ``num_fewshot``, ``limit``, ``max_batch_tokens``, ``force`` and ``progress`` of
            `evaluate`.

    Raises:
        MatryoshkaError: An adapter, its data or its base model cannot be read, or its output
            already exists, and it is not skipped; or an evaluation fails.
        MissingDependencyError: lm-evaluation-harness or PEFT is not installed.
    """
    if bool(tasks) == (data is not None):
        raise MatryoshkaError("Pass either `tasks`, such as 'arc_easy', or `data`.")
    paths = find_loras(folder)
    if not paths:
        raise MatryoshkaError(f"{folder} contains no adapters. Pass a folder that contains some.")
    with optional_imports("eval"):
        import torch
        from accelerate.state import PartialState

        from matryoshka_lora.peft.base_model import check_model, load_model

    base_options = options.get("base_model"), options.get("base_revision")
    jobs: dict[str, _Job] = {}
    failed: dict[str, str] = {}
    for path in paths:
        file = None if data is None else Path(data)
        if file is not None and file.is_dir():
            file /= f"{path.name}.jsonl"
        try:
            lora = open_adapter(path)
            lora_ranks = lora.available_ranks if ranks == "all" else ranks
            if lora_ranks is not None:
                lora_ranks = [r for r in lora_ranks if r <= lora.max_rank] or [lora.max_rank]
            lora_ranks = lora.check_ranks(lora_ranks)
            base = _BaseModel(*base_model_of(lora, *base_options))
            new_folder = default_output(path) if output is None else Path(output, path.name)
            check_output(new_folder, options.get("force", False), lora.sources)
            for index, example in enumerate([] if file is None else read_examples(file)):
                prompt_and_completion(example, index)
            jobs[path.name] = _Job(lora, base, lora_ranks, file, new_folder)
        except MatryoshkaError as error:
            failed[path.name] = str(error)
    for base in {job.base_model for job in jobs.values()}:
        try:
            check_model(*base)
        except MatryoshkaError as error:
            failed |= {name: str(error) for name, job in jobs.items() if job.base_model == base}
    for name in sorted(failed):
        logger.warning("Not evaluated: %s", with_name(name, failed[name]))
    names = sorted(jobs.keys() - failed.keys(), key=lambda name: (str(jobs[name].base_model), name))
    if failed and not (skip_bad and names):
        hint = " Correct or remove them, or pass `skip_bad=True`." if names else ""
        raise MatryoshkaError(
            f"{len(failed)} of {pluralize(len(paths), 'adapter')} cannot be evaluated. The first: "
            f"{with_name(min(failed), failed[min(failed)])}{hint}"
        )

    PartialState(cpu=not torch.accelerator.is_available())  # it selects the device of this process
    evaluations: dict[str, Evaluation] = {}
    model: PreTrainedModel | None = None
    model_base: _BaseModel | None = None
    for number, name in enumerate(names, start=1):
        logger.info("Evaluating %s, %d of %d.", name, number, len(names))
        job = jobs[name]
        is_shared = is_removable(job.lora)
        if job.base_model != model_base or not is_shared:
            model = model_base = None  # the next one needs the memory
        if model is None and is_shared:
            model_base = job.base_model
            load_options = {"dtype": options.get("dtype"), **(options.get("model_args") or {})}
            model = load_model(model_base.name, revision=model_base.revision, **load_options)
        try:
            evaluations[name] = evaluate(
                job.lora.name,
                tasks,
                job.data,
                job.ranks,
                output=job.output,
                model=model,
                **options,
            )
        except MatryoshkaError as error:
            if not skip_bad:
                raise
            logger.warning("%s cannot be evaluated: %s", name, error)
            failed[name] = str(error)
    return FolderEvaluation(evaluations, failed)
