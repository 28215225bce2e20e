"""How many training examples the recorded runs have spent on a rank.

``lora-each`` spends all examples of a run on its rank, and ``lora/svd`` none. ``lora/trained``
records how it divides its examples among the ranks. ``lora/squeezed`` records its tokens only. It
goes from the largest rank to the smallest. A rank needs no training if truncation leaves it near R.
Otherwise it has a part of the steps that are left, in proportion to 1 / r among the ranks from the
smallest to itself. The first rank that was trained has another loss than the SVD of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matryoshka_lora import MatryoshkaError
from research.plan import rates, units
from research.runs import Run
from research.study import LORA_EACH, Study, load_study, parse_method

SAME_LOSS = 1e-4
"""In nats. Two deployments of a run with the same adapter differ by rounding, which is less."""


class Spent(NamedTuple):
    """A rank of a test run.

    Attributes:
        seed: The seed of the run.
        examples: The training examples that were spent on the rank, counting repetitions.
        accuracy: The share of right answers.
    """

    seed: int
    examples: float
    accuracy: float


def examples_spent(study_name: str, method: str, task: str, rank: int) -> list[Spent]:
    """Return what each test run of a method has spent on a rank, and its right answers.

    Raises:
        MatryoshkaError: The runs do not record what the method has spent on a rank.
    """
    study = load_study(study_name)
    runs = study.load_runs()
    (unit,) = (u for u in units(study, method, task) if u.rank == rank or method != LORA_EACH)
    rate = rates(study, runs, unit).chosen
    points: list[Spent] = []
    for seed in study.seeds if rate is not None else ():
        run = runs.get(unit.job(rate or 0.0, seed, "test"))
        if run is not None and unit.deployment in run.curves:
            examples = _examples(study, run, method, rank)
            accuracy = run.curves[unit.deployment].accuracy[run.ranks.index(rank)]
            points.append(Spent(seed, examples, accuracy))
    return points


def _examples(study: Study, run: Run, method: str, rank: int) -> float:
    if method == LORA_EACH:
        return study.num_training_examples(run.job.recipe)
    _, deployment = parse_method(method)
    if deployment == "svd":
        return 0.0
    if "examples_by_rank" in run.cost["cuts"][deployment]:
        return float(run.cost["cuts"][deployment]["examples_by_rank"].get(str(rank), 0))
    if deployment != "squeezed" or "svd" not in run.curves:
        raise MatryoshkaError(f"{run.job} does not record what {method} has spent on a rank.")
    pairs = zip(run.ranks, run.curves["squeezed"].loss, run.curves["svd"].loss, strict=True)
    different = [r for r, squeezed, svd in pairs if abs(squeezed - svd) > SAME_LOSS]
    trained_ranks = [r for r in run.ranks if different and r <= max(different)]
    share = run.cost["cuts"][deployment]["tokens"] / run.cost["tokens"]
    num_examples = share * study.num_training_examples(run.job.recipe)
    return float(num_examples * share_of_squeezed(rank, trained_ranks))


def share_of_squeezed(rank: int, ranks: Sequence[int]) -> float:
    """Return a rank's share of the steps of ``squeezed``, which trains some ranks, increasing."""
    share_left = 1.0
    for index in reversed(range(len(ranks))):
        weights = [1 / r for r in ranks[: index + 1]]
        share = share_left * weights[-1] / sum(weights)
        if ranks[index] == rank:
            return share
        share_left -= share
    return 0.0
