"""Follow every number that states a result, in the README and in docs/, to a file.

`claims.yaml` says where each stands and what it is: an expression over recorded runs, by the
statistics of `research`, or over JSON files. Values are rounded to the digits of the text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev
from typing import Any, NamedTuple

import pytest
import yaml

from research import stats
from research.commonsense import USUAL_METRIC
from research.figures import curves
from research.plan import rates, units
from research.runs import Job, Run
from research.study import load_study

ROOT = Path(__file__).parents[1]
CLAIMS = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
WHOLE = (
    *("README.md", "docs/results.md", "docs/performance.md", "research/README.md"),
    *("docs/combine.md", "docs/extract.md"),
)
"""Every number in the tables of these pages is a result."""
PAGES = {f"docs/{path.name}": path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES |= {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "research/README.md")}
SEVEN = {task: metric for task, metric in USUAL_METRIC.items() if task != "boolq"}

_NUMBER = r"(?:(?<!\w)[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
_CELL = re.compile(r"(?:\\\||[^|])+")
Span = tuple[int, int]


class Found(NamedTuple):
    """A place that a claim is about, its numbers, and what they must be."""

    span: Span
    numbers: list[Span]
    values: tuple[float, ...]


def percent(
    study: str, method: str, value: Any, task: Any = None, minus: Any = None
) -> list[float]:
    """Return mean and half width of a share, or of its difference to another method's, in %."""
    found = stats.mean(curves(study), method, value, task, minus)
    assert found is not None, f"{study} has no {method} on {task or 'any task'}"
    return [100 * part for part in (found.mean, found.half_width) if part is not None]


def middle(study: str, method: str, value: Any) -> list[float]:
    """Return the median and the lowest seed of a share, in %."""
    found = [100 * number for number in stats.values(curves(study), method, value).values()]
    return [median(found), min(found)]


def runs(study: str, method: str) -> float:
    """Return the tokens of one curve, as a multiple of a run of LoRA."""
    names = (method, "lora/svd")
    spent = [stats.values(curves(study), name, lambda result: result.tokens) for name in names]
    return fmean(spent[0].values()) / fmean(spent[1].values())


def tried(study: str, recipe: str, rate: float) -> list[Run]:
    """Return the runs of a recipe at a learning rate on validation rows."""
    found, wanted = load_study(study).load_runs(), (recipe, rate, "validation")
    return [r for j, r in found.items() if (j.recipe, j.learning_rate, j.split) == wanted]


@cache
def at_best(name: str, method: str) -> list[float]:
    """Return a method's validation loss at each rank, at the chosen rate, mean over the seeds."""
    study = load_study(name)
    found, (task,) = study.load_runs(), study.tasks
    (unit,) = units(study, method, task)
    rate = rates(study, found, unit).chosen or 0.0
    of_seeds = [
        found[Job(unit.recipe, task, unit.rank, rate, seed, "validation")].curves[unit.cut].loss
        for seed in study.rate_seeds
    ]
    return [fmean(each) for each in zip(*of_seeds, strict=True)]


def worse(method: str, studies: Iterable[str], last: bool) -> list[float]:
    """Return a method's validation loss as a multiple of lora/svd's: the mean, or that at R."""
    pick: Any = (lambda losses: losses[-1]) if last else fmean
    return [pick(at_best(one, method)) / pick(at_best(one, "lora/svd")) for one in studies]


def read(path: str) -> Any:
    """Return the content of a file of JSON or of JSON lines."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [*map(json.loads, text.splitlines())] if path.endswith("jsonl") else json.loads(text)


NAMES: dict[str, Any] = {
    **{name: read(path) for name, path in CLAIMS["files"].items()},
    **{
        "percent": percent,
        "middle": middle,
        "runs": runs,
        "tried": tried,
        "worse": worse,
        "curves": curves,
    },
    **{"fall": stats.largest_fall, "at_best": at_best, "loss_at": stats.loss_at},
    **{"fmean": fmean, "geometric_mean": geometric_mean, "aurac": stats.aurac_log2},
    "nats": lambda study, method: [n / 100 for n in percent(study, method, stats.mean_loss)],
    "of_base": lambda study: [
        100 * (stats.chosen_at(metrics, 0)(curves(study)[0]) or 0)
        for metrics in (USUAL_METRIC, SEVEN)
    ],
    "accuracy_at": stats.accuracy_at,
    "seven_at": lambda rank: stats.chosen_at(SEVEN, rank),
    "spread": lambda found: [fmean(found := list(found)), stdev(found)],
    "ends": lambda found: [min(found := list(found)), max(found)],
}


@cache
def evaluated(expression: str, row: Any = None, column: Any = None) -> tuple[float, ...]:
    """Return what an expression of the YAML file is."""
    found = eval(expression, {**NAMES, "row": row, "column": column})
    return tuple(found) if isinstance(found, Iterable) else (found,)


def numbers(text: str, span: Span) -> list[Span]:
    """Return the places of numbers."""
    return [match.span() for match in re.compile(_NUMBER).finditer(text, *span)]


def cells(text: str, at: str | int) -> Iterator[tuple[str, str, Span]]:
    """Yield row, column and place of each cell of the first table from some words on."""
    begin = at if isinstance(at, int) else text.find(at)
    table = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE).search(text, begin) if begin >= 0 else None
    assert table, f"{at!r} is not there, or no table after it"
    heading, _, *lines = (list(_CELL.finditer(line)) for line in table[0].splitlines())
    starts = [match.start() for match in re.finditer("^.", table[0], re.MULTILINE)][2:]
    seen: Counter[str] = Counter()
    for start, (first, *others) in zip(starts, lines, strict=True):
        row = re.sub(r"[*`]", "", first[0]).strip()
        seen[row] += 1
        row += f" ({seen[row]})" if seen[row] > 1 else ""
        for name, part in zip(heading[1:], others, strict=True):
            place = (table.start() + start + part.start(), table.start() + start + part.end())
            yield row, re.sub(r"[*`]", "", name[0]).strip(), place


def places(page: str, text: str) -> Iterator[Found]:
    """Yield all that is claimed of a page."""
    for claim in (claim for claim in CLAIMS["tables"] if claim["page"] == page):
        rows, columns = claim.get("rows", CLAIMS["methods"]), claim["columns"]
        there = list(cells(text, claim["at"]))
        lacking = {*columns, *claim.get("rows", ())} - {
            name for *names, _ in there for name in names
        }
        assert not lacking, f"the table at {claim['at']!r} has no {lacking}"
        for row, column, span in there:
            if row in rows and column in columns and (inside := numbers(text, span)):
                values = evaluated(claim["cell"], str(rows[row]), str(columns[column]))
                yield Found(span, inside, values)
    for claim in (claim for claim in CLAIMS["texts"] if claim["page"] == page):
        words = (re.escape(word).replace(r"\{\}", f"({_NUMBER})") for word in claim["says"].split())
        found = list(re.finditer(r"\s+".join(words), text))
        assert found, f"{claim['says']!r} is not there"
        for match in found:
            inside = [match.span(n + 1) for n in range(match.re.groups)]
            yield Found(match.span(), inside, evaluated(claim["is"]))


def rounded(number: str, value: float) -> bool:
    """Return whether a number of a text is a value, to the text's digits."""
    mantissa, exponent, _ = (number := number.replace(",", "")).partition("e")
    form = f".{len(mantissa.partition('.')[2])}{'e' if exponent else 'f'}"
    return float(number) == float(f"{value:{form}}")


def wrong(page: str, text: str) -> list[str]:
    """Return what a page says that its files do not."""
    faults = []
    for _, inside, values in places(page, text):
        there = [text[slice(*span)] for span in inside]
        if len(there) != len(values) or not all(map(rounded, there, values)):
            faults.append(f"{page} says {there}, and the files {values}")
    return faults


@pytest.mark.parametrize("page", PAGES)
def test_claims_are_what_their_files_say(page: str) -> None:
    assert wrong(page, PAGES[page]) == []
    last = [one.numbers[-1][1] for one in places(page, PAGES[page]) if one.numbers][-1:]
    for end in last:  # another digit is found
        text = PAGES[page]
        assert wrong(page, f"{text[: end - 1]}{(int(text[end - 1]) + 5) % 10}{text[end:]}")


@pytest.mark.parametrize("page", PAGES)
def test_no_result_is_without_a_claim(page: str) -> None:
    """A claim is about each number in the tables of the pages of results, and about each ±."""
    text = PAGES[page]
    asked = [match.span() for match in re.finditer(rf"{_NUMBER}\s±\s{_NUMBER}", text)]
    for table in re.finditer(r"(?<!\|\n)^\|", text, re.MULTILINE) if page in WHOLE else ():
        asked += [span for _, _, span in cells(text, table.start()) if numbers(text, span)]
    known = [one.span for one in places(page, text)]
    lacking = [text[a:b] for a, b in asked if not any(s <= a and b <= e for s, e in known)]
    assert lacking == [], "no claim of tests/claims.yaml is about these"
