"""``python -m research``: run what is missing of a study, and write its tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matryoshka_lora import MatryoshkaError
from research.plan import missing_jobs, results
from research.report import comparison, tables
from research.runs import read
from research.study import ROOT, RUNS, STUDIES, Study, load_study

TABLES = ROOT / "research" / "tables"

DESCRIPTION = """Compare ways to train an adapter for every rank.

Without a study: rebuild the tables of every study from the recorded runs. With one: run what is
missing of it, and rebuild its tables. Each finished run is appended to research/runs/STUDY.jsonl,
so a study that was stopped goes on when the same command is given again. Each method's learning
rate is chosen on
validation rows with seeds of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m research",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", help="a study of research/studies, or a YAML file")
    parser.add_argument("--methods", help="only these, as lora/svd,lora/trained")
    parser.add_argument("--seeds", help="only these, as 0,1,2")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after so long"
    )
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="run the test runs again into FILE, at the recorded learning rates, and compare",
    )
    given = parser.parse_args(arguments)
    try:
        if given.study is None:
            for path in sorted(STUDIES.glob("*.yaml")):
                write_tables(load_study(path.stem))
            return 0
        study = load_study(given.study)
        chosen = _chosen(study, given.methods, given.seeds)
        if given.again:
            run_again(chosen, given.again, 60 * given.minutes)
        else:
            run_missing(chosen, 60 * given.minutes)
            write_tables(study)
    except MatryoshkaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def write_tables(study: Study) -> None:
    """Write the tables of a study that has some results."""
    runs = study.load_runs()
    if any(results(study, runs)):
        TABLES.mkdir(exist_ok=True)
        (TABLES / f"{study.name}.md").write_text(tables(study, runs), encoding="utf-8")


def run_missing(study: Study, seconds: float) -> None:
    """Run what is missing, into the study's own file."""
    from research.run import run_study, set_up

    set_up(study.threads)
    runs = study.load_runs()
    if missing_jobs(study, runs):
        run_study(study, runs, RUNS / f"{study.name}.jsonl", seconds, _show)


def run_again(study: Study, file: Path, seconds: float) -> None:
    """Run test runs again into a file, at the recorded learning rates, and print both."""
    from research.run import run_study, set_up

    set_up(study.threads)
    recorded = study.load_runs()
    rates = {job: run for job, run in recorded.items() if job.split == "validation"}
    begun = {**rates, **study.its_own(read([file]))}
    found = run_study(study, begun, file, seconds, _show)
    print(comparison(study, list(results(study, recorded)), list(results(study, found))))


def _chosen(study: Study, methods: str | None, seeds: str | None) -> Study:
    """Return the study with these of its methods and seeds."""
    kept = tuple(methods.split(",")) if methods else study.methods
    if unknown := [method for method in kept if method not in study.methods]:
        raise MatryoshkaError(
            f"{study.name} has no method {unknown[0]}; it has {', '.join(study.methods)}"
        )
    numbers = tuple(int(seed) for seed in seeds.split(",")) if seeds else study.seeds
    return replace(study, methods=kept, seeds=numbers)


def _show(done: int, missing: int) -> None:
    print(f"{done} runs are there, {missing} or more are missing", flush=True)


if __name__ == "__main__":
    sys.exit(main())
