"""The rule of research/pages/default.md on recorded runs: a score for each method, from validation data alone.

python -m research.default research/configs/facts256.yaml --runs research/pages/runs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

from research.cuts import SAME_AT_ALL_RANKS
from research.plan import load_runs, rates, units
from research.recipes import EACH_RECIPES, parse_method
from research.records import Job
from research.study import Study, load_study

REFERENCE = "lora/svd"
MOST_LOST_AT_R = 1.02
"""Of the reference's loss at rank R."""


class Score(NamedTuple):
    """Of a method, over the families that have it.

    Attributes:
        method: Its name.
        of_families: Mean loss over the nested ranks as a multiple of the reference's, by family.
        at_r: The loss at rank R as a multiple of the reference's, by family.
    """

    method: str
    of_families: dict[str, float]
    at_r: dict[str, float]

    @property
    def score(self) -> float:
        """The geometric mean over the families. Small is good."""
        return geometric_mean(self.of_families.values())

    @property
    def may_be_default(self) -> bool:
        """Whether rank R keeps what plain LoRA has there."""
        return max(self.at_r.values()) <= MOST_LOST_AT_R


def scores(studies: Sequence[tuple[Study, Path]]) -> list[Score]:
    """The scores of the methods that every study has, best first; what makes one file for each rank is left out."""
    losses: dict[str, dict[str, tuple[float, float]]] = {}
    for study, folder in studies:
        for task in study.tasks:
            for method in study.methods:
                one_adapter = method not in EACH_RECIPES and parse_method(method)[1] in SAME_AT_ALL_RANKS
                if one_adapter and (found := _losses(study, folder, method, task)):
                    losses.setdefault(method, {})[task] = found
    reference = losses[REFERENCE]
    made = [
        Score(
            method,
            {task: mean / reference[task][0] for task, (mean, _) in found.items()},
            {task: last / reference[task][1] for task, (_, last) in found.items()},
        )
        for method, found in losses.items()
        if found.keys() == reference.keys()
    ]
    return sorted(made, key=lambda score: score.score)


def _losses(study: Study, folder: Path, method: str, task: str) -> tuple[float, float] | None:
    """Mean loss over the ranks and loss at R on validation data, at the chosen rate, mean over the seeds of rates."""
    (unit,) = units(study, method, task)
    runs = load_runs(study, folder)
    chosen = rates(study, runs, unit).chosen
    if chosen is None:
        return None
    jobs = [Job(unit.recipe, task, unit.rank, chosen, seed, "validation") for seed in study.rate_seeds]
    curves = [runs[job].curves[unit.cut].loss for job in jobs]
    return fmean(fmean(loss) for loss in curves), fmean(loss[-1] for loss in curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="YAML files of studies")
    parser.add_argument("--runs", type=Path, required=True, help="folder of their runs")
    given = parser.parse_args()
    found = scores([(load_study(path), given.runs) for path in given.studies])
    families = list(found[0].of_families)
    print(f"| method | {' | '.join(families)} | score | at rank R | may be the default |")
    print(f"|---|{'---|' * len(families)}---|---|---|")
    for one in found:
        parts = " | ".join(f"{one.of_families[family]:.2f}" for family in families)
        worst = max(one.at_r.values())
        print(f"| `{one.method}` | {parts} | {one.score:.2f} | {worst:.2f} | {'yes' if one.may_be_default else 'no'} |")


if __name__ == "__main__":
    main()
