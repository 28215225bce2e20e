"""``python -m research CONFIG``: run what is missing of a study, then write its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from matryoshka_lora import MatryoshkaError
from research.plan import FINALISTS, MOST_RATES, diverged, load_runs, missing_jobs, results, tried
from research.recipes import RECIPES, parse_method
from research.records import Job, Run
from research.report import write_report
from research.run import run_study
from research.study import Study, load_study

DESCRIPTION = """Compare ways of training an adapter for every rank: a grid of methods, tasks, learning rates and seeds.

Each method's learning rate is chosen on validation data with a seed of its own; test data are looked at with the chosen
rates only. Every finished run is a file, so a study that was stopped goes on when the same command is given again. The
same command in a second process, or on a second machine with the same folder, shares the work. Writes study.md
and study.png."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m research", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="a study as a YAML file, such as research/configs/headline.yaml")
    parser.add_argument("--out", type=Path, help="the folder of the report (default: runs/NAME)")
    parser.add_argument("--runs", type=Path, help="the folder of runs, which studies may share (default: --out)")
    parser.add_argument("--minutes", type=float, help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is there")
    given = parser.parse_args(arguments)
    try:
        compare(given.study, given.out or Path("runs") / given.study.stem, given.runs, given.minutes, given.report)
    except MatryoshkaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(
    path: Path, out: Path, runs: Path | None = None, minutes: float | None = None, report: bool = False
) -> None:
    """What the command does.

    Raises:
        MatryoshkaError: The study is wrong, a run cannot be done, or something cannot be written.
    """
    study, folder = load_study(path), runs or out
    if report:
        found = load_runs(study, folder)
    else:
        found = run_study(study, folder, None if minutes is None else 60 * minutes, _show)
    if _report(study, found, out):
        print(f"The report is in {out}: study.md and study.png")
    if left := len(missing_jobs(study, found)):
        again = "without --report" if report else "again"
        print(f"{len(found)} runs are there, {left} or more are missing. Next: the same command {again}")


def _show(done: int, missing: int) -> None:
    print(f"{done} runs are there, {missing} or more are missing", flush=True)


def _report(study: Study, runs: Mapping[Job, Run], folder: Path) -> bool:
    found = list(results(study, runs))
    if not found:
        print("No method has a test run yet: there is nothing to report.")
        return False
    training = ", ".join(f"{key} {value}" for key, value in study.training.items() if key != "disable_tqdm")
    recipes = dict.fromkeys(parse_method(method)[0] for method in study.methods)
    versions = {tuple(sorted(run.versions.items())) for run in runs.values()}
    about = {
        "model": f"{study.model_name}, {study.dtype}, all linear layers, R = {study.rank}",
        "training": f"{training}; each built-in question once, unless the recipe says otherwise",
        "questions": ", ".join(f"{count} of {split}" for split, count in study.items.items()),
        "learning rates": f"grid from {', '.join(f'{rate:g}' for rate in study.learning_rates)} on validation data, "
        f"seed {study.rate_seeds[0]}, grown until its edge is not the best or {MOST_RATES} are tried"
        + "".join(f"; the {FINALISTS} best with seed {seed} too" for seed in study.rate_seeds[1:]),
        "versions": "; or ".join(", ".join(f"{name} {number}" for name, number in one) for one in sorted(versions)),
        **{f"recipe {name}": RECIPES[name].summary for name in recipes},
    }
    if lost := diverged(study, runs):
        about["diverged on test, not in the means"] = "; ".join(lost)
    write_report(
        found,
        folder,
        title=study.title,
        about=about,
        tried=tried(study, runs),
        planned=list(product(study.methods, study.tasks, study.seeds)),
        winner=study.winner if any(result.method == study.winner for result in found) else None,
    )
    return True


if __name__ == "__main__":
    sys.exit(main())
