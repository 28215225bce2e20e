"""The rule of research/pages/default.md on recorded runs: a score for each method, from validation data alone.

python -m research.default research/configs/facts256.yaml --runs research/pages/runs
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

from research.cuts import SAME_AT_ALL_RANKS
from research.plan import load_runs, rates, units
from research.recipes import EACH_RECIPES, parse_method
from research.records import Job, Run
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
        runs = load_runs(study, folder)
        for task in study.tasks:
            for method in study.methods:
                one_adapter = method not in EACH_RECIPES and parse_method(method)[1] in SAME_AT_ALL_RANKS
                if one_adapter and (found := validation_losses(study, runs, method, task)):
                    losses.setdefault(method, {})[task] = fmean(found), found[-1]
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


def validation_losses(study: Study, runs: Mapping[Job, Run], method: str, task: str) -> list[float] | None:
    """A loss for each nested rank, at the chosen rates, mean over the seeds of rates; None where it is unfinished."""
    found: list[float] = []
    for unit in units(study, method, task):
        chosen = rates(study, runs, unit).chosen
        if chosen is None:
            return None
        jobs = [Job(unit.recipe, task, unit.rank, chosen, seed, "validation") for seed in study.rate_seeds]
        curves = [runs[job].curves[unit.cut].loss for job in jobs]
        by_rank = [fmean(each) for each in zip(*curves, strict=True)]
        found += by_rank[-1:] if unit.alone else by_rank
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="YAML files of studies")
    parser.add_argument("--runs", type=Path, required=True, help="folder of their runs")
    parser.add_argument("--by-rank", action="store_true", help="print the validation losses at each rank instead")
    given = parser.parse_args()
    studies = [(load_study(path), given.runs) for path in given.studies]
    if given.by_rank:
        for study, folder in studies:
            _print_by_rank(study, load_runs(study, folder))
        return
    found = scores(studies)
    families = list(found[0].of_families)
    print(f"| method | {' | '.join(families)} | score | at rank R | may be the default |")
    print(f"|---|{'---|' * len(families)}---|---|---|")
    for one in found:
        parts = " | ".join(f"{one.of_families[family]:.2f}" for family in families)
        worst = max(one.at_r.values())
        print(f"| `{one.method}` | {parts} | {one.score:.2f} | {worst:.2f} | {'yes' if one.may_be_default else 'no'} |")


def _print_by_rank(study: Study, runs: Mapping[Job, Run]) -> None:
    for task in study.tasks:
        ranks = study.nesting(study.rank)
        print(f"| {task} | {' | '.join(map(str, ranks))} |")
        print(f"|---|{'---|' * len(ranks)}")
        for method in study.methods:
            if found := validation_losses(study, runs, method, task):
                print(f"| `{method}` | {' | '.join(f'{loss:.3f}' for loss in found)} |")


if __name__ == "__main__":
    main()
