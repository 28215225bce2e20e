"""Every number that states a result, in the README and in docs/, is that of a file in the repository.

`claims.yaml` says where each stands and what it is: an expression over recorded runs, by the study's own statistics, or
over JSON files, or of what was measured once and typed the command. Values are rounded to the digits of the text.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pytest
import yaml

from research import stats
from research.commonsense import USUAL_METRIC
from research.figures import curves
from research.plan import load_runs
from research.records import Result, Run
from research.study import load_study

ROOT = Path(__file__).parents[1]
CLAIMS = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
PAGES = {f"docs/{path.name}": path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES |= {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "research/pages/reordering.md")}
WHOLE = ("README.md", "docs/results.md", "docs/performance.md")  # every number in their tables is a result

SEVEN = {task: metric for task, metric in USUAL_METRIC.items() if task != "boolq"}

_NUMBER = r"(?:(?<!\w)[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
_CELL = re.compile(r"(?:\\\||[^|])+")
Span = tuple[int, int]


class Found(NamedTuple):
    """A place in a page that a claim is about, its numbers, and what they must be; None where the text is literal."""

    span: Span
    numbers: list[Span]
    values: tuple[float, ...] | None = None


def percent(study: str, method: str, value: Any, task: str | None = None, minus: str | None = None) -> list[float]:
    """Mean and half width of a share, or of its difference to another method's, in %."""
    found = stats.mean(curves(study), method, value, task, minus)
    assert found is not None, f"{study} has no {method} on {task or 'any task'}"
    return [100 * part for part in (found.mean, found.half_width) if part is not None]


def runs(study: str, method: str) -> float:
    """The tokens of one curve, as a multiple of a run of LoRA."""
    spent = [stats.values(curves(study), name, lambda result: result.tokens) for name in (method, "lora/svd")]
    return fmean(spent[0].values()) / fmean(spent[1].values())


def nats(study: str, method: str) -> list[float]:
    """Mean and half width of the mean loss over the ranks."""
    return [part / 100 for part in percent(study, method, stats.mean_loss)]


def tried(study: str, recipe: str, rate: float) -> list[Run]:
    """The runs of a recipe at a learning rate on validation data."""
    found = load_runs(load_study(ROOT / f"research/configs/{study}.yaml"), ROOT / "research/pages/runs")
    wanted = (recipe, rate, "validation")
    return [run for job, run in found.items() if (job.recipe, job.learning_rate, job.split) == wanted]


def of_base(study: str) -> list[float]:
    """The mean over the tasks of choices that the base model has right, and over those but BoolQ, in %."""
    first = curves(study)[0]
    return [100 * (stats.chosen_at(metrics, 0)(first) or 0.0) for metrics in (USUAL_METRIC, SEVEN)]


NAMES: dict[str, Any] = {
    **{name: json.loads((ROOT / path).read_text(encoding="utf-8")) for name, path in CLAIMS["files"].items()},
    **{
        "percent": percent,
        "runs": runs,
        "nats": nats,
        "tried": tried,
        "of_base": of_base,
        "fmean": fmean,
        "aurac": stats.aurac_log2,
        "accuracy_at": stats.accuracy_at,
        "seven_at": lambda rank: stats.chosen_at(SEVEN, rank),
        "curves": curves,
    },
    "spread": lambda found: [fmean(found := list(found)), stdev(found)],
    "ends": lambda found: [min(found := list(found)), max(found)],
    "at_most": lambda bound, value: bound if value <= bound else value,
}


@cache
def evaluated(expression: str, row: Any = None, column: Any = None) -> tuple[float, ...]:
    """What an expression of the YAML file is."""
    found = eval(expression, {**NAMES, "row": row, "column": column})
    return tuple(found) if isinstance(found, Iterable) else (found,)


def plain(cell: re.Match[str]) -> str:
    return re.sub(r"[*`]", "", cell[0]).strip()


def numbers(text: str, span: Span) -> list[Span]:
    return [match.span() for match in re.compile(_NUMBER).finditer(text, *span)]


def cells(text: str, at: str | int) -> Iterator[tuple[str, str, Span]]:
    """Of the first table from some words on: its row, numbered where it comes again, its column, and the place."""
    begin = at if isinstance(at, int) else text.find(at)
    table = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE).search(text, begin) if begin >= 0 else None
    assert table, f"{at!r} is not there, or no table after it"
    heading, _, *lines = (list(_CELL.finditer(line)) for line in table[0].splitlines())
    places, names = [m.start() for m in re.finditer("^.", table[0], re.MULTILINE)][2:], list(map(plain, heading))
    seen: Counter[str] = Counter()
    for start, (first, *others) in zip(places, lines, strict=True):
        seen[row := plain(first)] += 1
        row += f" ({seen[row]})" if seen[row] > 1 else ""
        for name, part in zip(names[1:], others, strict=True):
            yield row, name, (table.start() + start + part.start(), table.start() + start + part.end())


def sentences(text: str, says: str) -> list[re.Match[str]]:
    """Where a sentence stands, with some number for each {} of it, and with lines that end anywhere."""
    pattern = r"\s+".join(re.escape(word).replace(r"\{\}", f"({_NUMBER})") for word in says.split())
    found = list(re.finditer(pattern, text))
    assert found, f"{says!r} is not there"
    return found


def places(page: str, text: str) -> Iterator[Found]:
    """All that is claimed of a page."""
    for claim in (claim for claim in CLAIMS["tables"] if claim["page"] == page):
        rows, columns = claim.get("rows", CLAIMS["methods"]), claim["columns"]
        there = list(cells(text, claim["at"]))
        lacking = {*columns, *claim.get("rows", ())} - {name for row, column, _ in there for name in (row, column)}
        assert not lacking, f"the table at {claim['at']!r} has no {lacking}"
        for row, column, span in there:
            if row in rows and column in columns and (inside := numbers(text, span)):
                yield Found(span, inside, evaluated(claim["cell"], str(rows[row]), str(columns[column])))
    for claim in (claim for claim in CLAIMS["texts"] if claim["page"] == page):
        for match in sentences(text, claim["says"]):
            yield Found(match.span(), [match.span(n + 1) for n in range(match.re.groups)], evaluated(claim["is"]))
    for claim in (claim for claim in CLAIMS["measured_by"] if claim["page"] == page):
        found = [match.span() for says in claim.get("says", ()) for match in sentences(text, says)]
        if "at" in claim:
            table = [span for _, _, span in cells(text, claim["at"])]
            digits = [text[slice(*number)] for span in table for number in numbers(text, span)]
            assert digits == claim["numbers"].split(), f"the table at {claim['at']!r} has {' '.join(digits)}"
            found += table
        yield from (Found(span, numbers(text, span)) for span in found)


def rounded(number: str, value: float) -> bool:
    """Whether a number of a text is a value, to the text's digits."""
    mantissa, exponent, _ = (number := number.replace(",", "")).partition("e")
    form = f".{len(mantissa.partition('.')[2])}{'e' if exponent else 'f'}"
    return float(number) == float(f"{value:{form}}")


def wrong(page: str, text: str) -> list[str]:
    """What a page says that its files do not."""
    faults = []
    try:
        for _, inside, values in places(page, text):
            there = [text[slice(*span)] for span in inside]
            if values is not None and (len(there) != len(values) or not all(map(rounded, there, values))):
                faults.append(f"{page} says {there}, and the files {values}")
    except AssertionError as error:  # a sentence or a table is not there
        faults.append(f"{page}: {error}")
    return faults


@pytest.mark.parametrize("page", PAGES)
def test_every_claim_is_what_its_file_says(page: str) -> None:
    assert wrong(page, PAGES[page]) == []


@pytest.mark.parametrize("page", PAGES)
def test_no_result_is_without_a_claim(page: str) -> None:
    """In the tables of the pages of results, no number; anywhere else, none with its ±."""
    text = PAGES[page]
    asked = [match.span() for match in re.finditer(rf"{_NUMBER}\s±\s{_NUMBER}", text)]
    for table in re.finditer(r"(?<!\|\n)^\|", text, re.MULTILINE) if page in WHOLE else ():
        asked += [span for _, _, span in cells(text, table.start()) if numbers(text, span)]
    known = [one.span for one in places(page, text)]
    lacking = [text[a:b] for a, b in asked if not any(start <= a and b <= end for start, end in known)]
    assert lacking == [], "no claim of tests/claims.yaml is about these"


@pytest.mark.parametrize("page", PAGES)
def test_another_number_in_the_text_is_found(page: str) -> None:
    text = PAGES[page]
    for end in {end for one in places(page, text) for _, end in one.numbers}:
        changed = f"{text[: end - 1]}{(int(text[end - 1]) + 5) % 10}{text[end:]}"
        assert wrong(page, changed), f"the number at the end of {text[end - 40 : end]!r} may be another"


def more(value: Any) -> Any:
    """A file, or the runs of a study, with other numbers."""
    if isinstance(value, dict):
        return {key: more(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(more(inner) for inner in value)
    if isinstance(value, Result):
        return replace(value, curve=replace(value.curve, accuracy=more(value.curve.accuracy)))
    return value + 5 if isinstance(value, float) else value


@pytest.mark.parametrize("name", [*CLAIMS["files"], "curves"])
def test_another_number_in_a_file_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "curves":
        monkeypatch.setattr(sys.modules[__name__], name, lambda study, real=curves: more(real(study)))
    else:
        monkeypatch.setitem(NAMES, name, more(NAMES[name]))
    evaluated.cache_clear()
    assert any(wrong(page, PAGES[page]) for page in PAGES)
    evaluated.cache_clear()


def test_every_claim_is_of_a_page_and_what_measured_a_typed_number_is_there() -> None:
    assert {claim["page"] for part in ("tables", "texts", "measured_by") for claim in CLAIMS[part]} <= PAGES.keys()
    for claim in CLAIMS["measured_by"]:
        assert {"command", "machine"} <= claim.keys()
        assert claim.get("version") == "0.1" or (ROOT / claim["script"]).is_file()
