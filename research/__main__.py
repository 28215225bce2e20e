"""``matryoshka compare``."""

from __future__ import annotations

from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from research.config import Study


class Launcher(StrEnum):
    """The names of `research.work.Launcher`."""

    local = "local"
    ray = "ray"


def compare(
    study: Annotated[Path, typer.Argument(help="A study as a YAML file, such as configs/studies/headline.yaml.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of runs and report.", show_default="runs/NAME")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once; each has the study's number of threads.")] = 1,
    launcher: Annotated[Launcher, typer.Option(help="Processes of this machine, or a Ray cluster.")] = Launcher.local,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no run after so long.", show_default="until all are done")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="The folder of runs, which studies may share.", show_default="that of --out")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; report what is there.")] = False,
) -> None:
    """Compare ways of training an adapter for every rank: a grid of methods, tasks, learning rates and seeds.

    Each method's learning rate is chosen on validation data with a seed of its own; test data are looked at with the
    chosen rates only. Every finished run is a file, so a study that was stopped goes on when the same command is given
    again, and several machines may share its folder. Writes study.md, study.html and study.png.

    Example: matryoshka compare configs/studies/headline.yaml --out runs/study --workers 2
    """
    from research.config import load_study
    from research.plan import load_runs, missing_jobs
    from research.work import run_study

    checked = load_study(study)
    folder = out or Path("runs") / study.stem
    seconds = None if minutes is None else 60 * minutes
    if report:
        found = load_runs(checked, runs or folder)
    else:
        with _Progress() as show:
            found = run_study(checked, runs or folder, workers, launcher.value, show, seconds)
    left = len(missing_jobs(checked, found))
    if _report(checked, found, folder):
        typer.echo(f"The report is in {folder}: study.md, study.html, study.png")
    if left:
        again = "without --report" if report else "again"
        typer.echo(f"{len(found)} runs are there, {left} or more are missing. Next: the same command {again}")


def _report(study: Study, runs: Any, folder: Path) -> bool:
    from matryoshka_lora.privacy import shown
    from research.plan import MOST_RATES, diverged, results, tried
    from research.recipes import RECIPES, parse_method
    from research.report import write_report

    found = list(results(study, runs))
    if not found:
        typer.echo("No method has a test run yet: there is nothing to report.")
        return False
    training = ", ".join(f"{key} {value}" for key, value in shown(study.training).items() if key != "disable_tqdm")
    recipes = dict.fromkeys(parse_method(method)[0] for method in study.methods)
    versions = {tuple(sorted(run.versions.items())) for run in runs.values()}
    about = {
        "model": f"{shown(study.model)}, {study.dtype}, all linear layers, R = {study.rank}",
        "training": f"{training}; each built-in question once, unless the recipe says otherwise",
        "questions": ", ".join(f"{count} of {split}" for split, count in study.items.items()),
        "learning rates": f"grid from {', '.join(f'{rate:g}' for rate in study.learning_rates)} on validation data, "
        f"seed {study.rate_seed}, grown until its edge is not the best or {MOST_RATES} are tried",
        "versions": "; or ".join(", ".join(f"{name} {number}" for name, number in one) for one in sorted(versions)),
        **{f"recipe {name}": RECIPES[name].summary for name in recipes},
    }
    if lost := diverged(study, runs):
        about["diverged on test, not in the means"] = "; ".join(lost)
    named = study.winner if any(result.method == study.winner for result in found) else None
    planned = list(product(study.methods, study.tasks, study.seeds))
    rates = tried(study, runs)
    write_report(found, folder, title=study.title, about=about, tried=rates, planned=planned, winner=named)
    return True


class _Progress:
    """A bar of the runs that are known; more become known as learning rates are chosen."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} runs"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.bar.start()
        self.task = self.bar.add_task("comparing", total=None)
        return self.show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, running: int, missing: int) -> None:
        self.bar.update(self.task, completed=done, total=done + running + missing, description=f"{running} running")
