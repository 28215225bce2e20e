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
from research.study import LORA_EACH, load_study

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
            accuracy = run.curves[unit.deployment].accuracy[run.ranks.index(rank)]
            num_examples = study.num_training_examples(unit.recipe)
            cost = run.cost["cuts"][unit.deployment]
            if method == LORA_EACH:
                examples = float(num_examples)
            elif unit.deployment == "svd":
                examples = 0.0
            elif unit.deployment == "trained":
                examples = float(cost["examples_by_rank"].get(str(rank), 0))
            elif unit.deployment == "squeezed" and "svd" in run.curves:
                losses = zip(run.curves["squeezed"].loss, run.curves["svd"].loss, strict=True)
                is_trained = [abs(squeezed - svd) > SAME_LOSS for squeezed, svd in losses]
                num_trained = max(
                    (i + 1 for i, trained in enumerate(is_trained) if trained), default=0
                )
                share = share_of_squeezed(rank, run.ranks[:num_trained])
                examples = share * num_examples * cost["tokens"] / run.cost["tokens"]
            else:
                raise MatryoshkaError(
                    f"{run.job} does not record what {method} has spent on a rank."
                )
            points.append(Spent(seed, examples, accuracy))
    return points


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
