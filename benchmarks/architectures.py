"""Check the package on every causal language model that transformers knows.

    python benchmarks/architectures.py --out docs/architectures.md

Each architecture of transformers' mapping for causal language models is built as a tiny model with random weights, and
everything that an adapter does on it is compared with formulas, plain PEFT and transformers: see `adapter_checks` and
`lm_checks` in tests/. The table is written if nothing is wrong. Names of architectures after the options check those
only, and write nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from adapter_checks import Report, Verdict
from lm_checks import check_language_model, inputs
from tiny_architectures import ARCHITECTURES, VARIANTS, tiny_causal_lm

from matryoshka_lora.files import write_text

SECONDS = 600
"""For one architecture."""

# All that an adapter must be able to do; not every model can be merged into, or has a `generate` of its own.
_ADAPTER = ("nest", "train", "ranks", "reorder", "save")


@dataclass
class Found:
    """What was found of one architecture.

    Attributes:
        not_built: Why there is no tiny model of it; empty if there is.
        reports: For each choice of targets.
        seconds: What it took.
    """

    not_built: str = ""
    reports: dict[str, Report] = field(default_factory=dict)
    seconds: float = 0.0

    def verdicts(self) -> Iterable[tuple[str, Verdict]]:
        for targets, report in self.reports.items():
            for part, verdict in report.parts.items():
                yield f"{targets}, {part}", verdict

    @property
    def wrong(self) -> dict[str, str]:
        """What is wrong, by its part."""
        return {part: verdict.why for part, verdict in self.verdicts() if verdict.state == "wrong"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the table, in Markdown")
    parser.add_argument("names", nargs="*", help="architectures or variants to check; all if none is named")
    args = parser.parse_args()
    found: dict[str, Found] = {}
    names = args.names or [*ARCHITECTURES, *VARIANTS]
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        for name, one in zip(names, processes.map(in_a_process, names), strict=True):
            found[name] = one
            print(line(name, one), flush=True)
    wrong = [f"{name}: {part}: {why}" for name, one in found.items() for part, why in one.wrong.items()]
    if wrong:
        raise SystemExit("\nWrong:\n" + "\n".join(wrong))
    if args.out is not None and not args.names:
        write_text(args.out, page(found))


def in_a_process(name: str) -> Found:
    """Check one architecture where a crash or an endless loop does no harm to the others."""
    start = time.monotonic()
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    process = context.Process(target=_send, args=(name, there))
    process.start()
    there.close()
    try:
        answer: Found | None = here.recv() if here.poll(SECONDS) else None
        why = f"not done after {SECONDS} s"
    except EOFError:
        process.join()
        answer, why = None, f"the process ended without an answer, with exit code {process.exitcode}"
    process.kill()
    process.join()
    answer = answer or Found(reports={"all-linear": Report(parts={"nest": Verdict("wrong", why)})})
    answer.seconds = time.monotonic() - start
    return answer


def _send(name: str, pipe: Any) -> None:
    pipe.send(check(name))


def check(name: str) -> Found:
    """Check one architecture in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model = tiny_causal_lm(name)
        with torch.no_grad():
            model(**inputs(2, 8))
    except Exception as error:
        return Found(not_built=f"{type(error).__name__}: {' '.join(str(error).split()):.150}")
    return Found(reports=check_language_model(model))


def line(name: str, found: Found) -> str:
    """One line for the terminal."""
    if found.not_built:
        return f"{name}: not built: {found.not_built}"
    count: dict[str, int] = {}
    for _, verdict in found.verdicts():
        count[verdict.state] = count.get(verdict.state, 0) + 1
    said = ", ".join(f"{number} {state}" for state, number in count.items())
    return f"{name}: {said} ({found.seconds:.0f} s)" + "".join(f"\n  {p}: {why}" for p, why in found.wrong.items())


_PAGE = """# Architectures

`python benchmarks/architectures.py --out docs/architectures.md` wrote this page in {minutes:.0f} minutes of one
core, with {versions}.

Of the {architectures} architectures in transformers' mapping for causal language models:

* {usable} are right: an adapter does all that it should. {rows} of them also have a rank for each row, and {engine}
  the engine of `matryoshka eval`; the others are refused those, with the reason.
* {refused} are refused by `nest` or by PEFT, with the reason.
* {missing} could not be built tiny: {why_missing}
* None is wrong: the command would fail, and write nothing.

Each is a model of two to four layers with random weights, one layer of each of its kinds, in float64 where it computes
in that. The columns:

* *Adapter*: on all linear layers, or on some where PEFT cannot have all. Gradients are those of `W x + B P A x`. At
  each rank the model says what plain PEFT says with the exported rank, and `generate` writes the same. Reordering
  leaves full rank as it is, and makes lower ranks the closest ones. A merged rank computes the same, and unmerging
  takes it out. What was saved is loaded by this package and by plain PEFT. Layers that are not called with tokens
  alone, such as those for images, do not learn here.
* *Ranks for rows*: with `adapter.rows`, each row says what it says with its rank alone.
* *Engine*: log-likelihoods and answers of requests of different lengths and ranks are those of each request alone,
  without padding and cache.
* *Stacked experts*: an adapter on `target_parameters`, without rows and engine.

{table}

## Variants

What a config can turn on:

{variants}

## Reasons

{reasons}
"""


class Reasons:
    """Numbers of reasons; those that differ in names and counts only are one."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, why: str) -> str:
        """The reason's number, as a link to it."""
        plain = re.sub(r"(\blayer )?\b[\w.]+\.\d+\.[\w.]+", "a layer", " ".join(why.split()))
        plain = re.sub(r"\b\w+(ForCausalLM|LMHeadModel|WithLMHead|ForConditionalGeneration)\b", "the model", plain)
        plain = re.sub(r"\b\d+ rows\b", "n rows", plain).removeprefix("PEFT: [PEFT:PeftType.LORA] ")
        plain = re.sub(r" \(model_type=.*?\)|Incompatible modules: .*?\. ", "", plain)
        number = self.numbers.setdefault(plain, len(self.numbers) + 1)
        return f"[{number}](#reason-{number})"

    def __str__(self) -> str:
        return "\n\n".join(f'<a id="reason-{number}"></a>{number}: {why}' for why, number in self.numbers.items())


def page(found: Mapping[str, Found]) -> str:
    """The table in Markdown."""
    reasons = Reasons()
    all_of_them = {name: one for name, one in found.items() if name not in VARIANTS}
    missing = {name: one for name, one in all_of_them.items() if one.not_built}
    rows = {name: row(name, one, reasons) for name, one in found.items() if not one.not_built}
    built = [cells for name, cells in rows.items() if name in all_of_them]
    usable = [cells for cells in built if cells[1].startswith("right")]
    return _PAGE.format(
        minutes=sum(one.seconds for one in found.values()) / 60,
        versions=f"transformers {transformers.__version__}, PEFT {peft.__version__} and torch {torch.__version__}",
        architectures=len(all_of_them),
        usable=len(usable),
        rows=sum(cells[2].startswith("right") for cells in usable),
        engine=sum(cells[3].startswith("right") for cells in usable),
        refused=len(built) - len(usable),
        missing=len(missing),
        why_missing="; ".join(f"`{name}`: {one.not_built}" for name, one in missing.items()),
        table=_table(built),
        variants=_table([cells for name, cells in rows.items() if name in VARIANTS]),
        reasons=reasons,
    )


def _table(rows: Iterable[Sequence[str]]) -> str:
    """One line for all architectures of which the same is said."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        alike.setdefault(tuple(cells), []).append(name)
    head = ["architectures", "adapter", "ranks for rows", "engine", "stacked experts"]
    lines = [[", ".join(names), *cells] for cells, names in alike.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def row(name: str, found: Found, reasons: Reasons) -> list[str]:
    """The cells of one architecture."""
    whole, some, experts = (found.reports.get(targets) for targets in ("all-linear", "named", "experts"))
    assert whole is not None
    adapter = _cell(whole, _ADAPTER, reasons)
    if some is not None and some.parts["nest"].state == "right":
        adapter = f"{_cell(some, _ADAPTER, reasons)} on some layers {reasons.mark(whole.parts['nest'].why)}"
        whole = some
    for part in ("generate", "merge"):
        if part in whole.parts and whole.parts[part].state != "right":
            adapter += f", but {part} {reasons.mark(whole.parts[part].why)}"
    if whole.unused:
        adapter += f", {len(whole.unused)} of {whole.layers} layers not called"
    return [
        f"`{name}`",
        adapter,
        _cell(whole, ("rows",), reasons),
        _cell(whole, ("engine",), reasons),
        "" if experts is None else _cell(experts, _ADAPTER, reasons),
    ]


def _cell(report: Report, parts: Iterable[str], reasons: Reasons) -> str:
    """Right, or the first reason why not."""
    verdicts = [report.parts[part] for part in parts if part in report.parts]
    if not verdicts:
        return ""
    refused = next((verdict for verdict in verdicts if verdict.state != "right"), None)
    return "right" if refused is None else f"refused {reasons.mark(refused.why)}"


if __name__ == "__main__":
    main()
