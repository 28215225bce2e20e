"""How many training examples the recorded runs have spent on a rank.

A run records the tokens of its training and of each deployment. ``lora/trained`` also records how
they are divided among the ranks. For other methods, this follows from the code of the runs, version
0.3, which is repeated here:

* ``lora-each`` spends all examples of a run on its rank, and ``lora/svd`` none.
* ``lora/trained-0.3`` takes steps of 16 examples, each of which trains one rank of all those from
  the smallest nested one to R. Rank r has a share in proportion to ``r ** -1.75`` of 7/8 of them,
  and R has 1/8 more. The number of examples is half of the run's, or less where the ranks are near
  R. It comes from the recorded tokens.
* ``lora/squeezed`` goes from the largest rank to the smallest. A rank needs no training if
  truncation leaves it near R. Otherwise it has a part of the steps that are left, in proportion to
  1 / r among the ranks from the smallest to itself. Which rank was the first to be trained is
  recorded: its loss is no longer that of the SVD of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matryoshka_lora import MatryoshkaError
from research.plan import rates, units
from research.runs import Run
from research.study import PER_RANK_RECIPES, Study, load_study, parse_method

RANK_EXPONENT = 1.75
MAX_RANK_SHARE = 1 / 8
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
    is_single = method in PER_RANK_RECIPES
    (unit,) = (unit for unit in units(study, method, task) if unit.rank == rank or not is_single)
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
    if method in PER_RANK_RECIPES:
        return study.num_training_examples(run.job.recipe)
    _, deployment = parse_method(method)
    if deployment == "svd":
        return 0.0
    if "examples_by_rank" in run.cost["cuts"][deployment]:
        return float(run.cost["cuts"][deployment]["examples_by_rank"].get(str(rank), 0))
    share = float(run.cost["cuts"][deployment]["tokens"] / run.cost["tokens"])
    num_examples = share * study.num_training_examples(run.job.recipe)
    if deployment == "trained-0.3":
        return num_examples * share_of_trained(rank, run.ranks[0], run.job.rank)
    if deployment == "squeezed" and "svd" in run.curves:
        return num_examples * share_of_squeezed(rank, _squeezed_ranks(run))
    raise MatryoshkaError(f"{run.job} does not record what {method} has spent on a rank.")


def share_of_trained(rank: int, min_rank: int, max_rank: int) -> float:
    """Return a rank's share of the steps of ``trained-0.3``."""
    weights = {r: float(r**-RANK_EXPONENT) for r in range(min_rank, max_rank + 1)}
    share = (1 - MAX_RANK_SHARE) * weights[rank] / sum(weights.values())
    return share + MAX_RANK_SHARE if rank == max_rank else share


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


def _squeezed_ranks(run: Run) -> list[int]:
    """Return the ranks that LoRA-Squeeze has trained: the first one, and all smaller ones."""
    pairs = zip(run.ranks, run.curves["squeezed"].loss, run.curves["svd"].loss, strict=True)
    different = [rank for rank, squeezed, svd in pairs if abs(squeezed - svd) > SAME_LOSS]
    return [rank for rank in run.ranks if different and rank <= max(different)]
