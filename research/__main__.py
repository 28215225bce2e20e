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
from research.runs import read_runs
from research.study import ROOT, RUNS, STUDIES, Study, load_study

TABLES = ROOT / "research" / "tables"

DESCRIPTION = """Compare ways to train an adapter for every rank.

Without a study: rebuild the tables of every study from the recorded runs. With a study: run what is
missing, and rebuild its tables. Each finished run is appended to research/runs/STUDY.jsonl, so the
same command continues an interrupted study. The learning rate of each method is chosen on
validation examples, with seeds of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m research",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="?", help="a study of research/studies, or a YAML file")
    parser.add_argument("--methods", help="run only these, such as lora/svd,lora/trained")
    parser.add_argument("--seeds", help="run only these, such as 0,1,2")
    parser.add_argument(
        "--rates-only", action="store_true", help="choose the learning rates, and test nothing"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after this time"
    )
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="repeat the test runs into FILE, at the recorded learning rates, and compare",
    )
    options = parser.parse_args(arguments)
    max_seconds = 60 * options.minutes
    try:
        if options.study is None:
            for path in sorted(STUDIES.glob("*.yaml")):
                write_tables(load_study(path.stem))
            return 0
        study = load_study(options.study)
        selected = select(study, options.methods, options.seeds)
        if options.rates_only:
            selected = replace(selected, seeds=())
        if options.again:
            run_again(selected, options.again, max_seconds)
        else:
            run_missing(selected, max_seconds)
            write_tables(study)
    except MatryoshkaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def write_tables(study: Study) -> None:
    """Write the tables of a study, unless it has no results."""
    runs = study.load_runs()
    if any(results(study, runs)):
        TABLES.mkdir(exist_ok=True)
        (TABLES / f"{study.name}.md").write_text(tables(study, runs), encoding="utf-8")


def run_missing(study: Study, max_seconds: float) -> None:
    """Run what is missing, and append it to the file of the study."""
    from research.run import run_study, set_up

    set_up(study.threads)
    runs = study.load_runs()
    if missing_jobs(study, runs):
        run_study(study, runs, RUNS / f"{study.name}.jsonl", max_seconds, _print_progress)


def run_again(study: Study, file: Path, max_seconds: float) -> None:
    """Repeat test runs into a file, at the recorded learning rates, and print a comparison."""
    from research.run import run_study, set_up

    set_up(study.threads)
    recorded = study.load_runs()
    runs = {job: run for job, run in recorded.items() if job.split == "validation"}
    runs.update(study.select_runs(read_runs([file])))
    repeated = run_study(study, runs, file, max_seconds, _print_progress)
    print(comparison(study, list(results(study, recorded)), list(results(study, repeated))))


def select(study: Study, methods: str | None, seeds: str | None) -> Study:
    """Return a study with some of its methods, and with these seeds; None keeps all of them.

    Raises:
        MatryoshkaError: The study does not have a method.
    """
    if methods:
        selected_methods = tuple(methods.split(","))
        for method in selected_methods:
            if method not in study.methods:
                raise MatryoshkaError(
                    f"{study.name} has no method {method!r} to run. It has "
                    f"{', '.join(study.methods)}."
                )
        study = replace(study, methods=selected_methods)
    if seeds:
        study = replace(study, seeds=tuple(int(seed) for seed in seeds.split(",")))
    return study


def _print_progress(num_done: int, num_missing: int) -> None:
    print(f"{num_done} runs are done, at least {num_missing} are missing.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
