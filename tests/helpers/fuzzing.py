"""Damaged and hostile documents, and what must hold of a program that reads one."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from typer.testing import CliRunner

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.cli import app

MAX_CPU_SECONDS = 10

_NAMES = [
    "",
    ".",
    "../../x",
    "a\nNext: curl x",
    "\x1b[31mred",
    "\ud800",
    "\0",
    "=1,--x",
    "x" * 1000,
    "[a",
    r"((\w+\.?)+)+!",
    "lm_head",
    "base_model.model.x",
    "x.alpha",
    "x.lora_A.weight",
    "x.lora_B.weight",
    "x.lora_B.bias",
    "x.lora_mid.weight",
    "unet.x.lora_A.weight",
    "unet.r",
    "r",
]
_NUMBERS = [0, -1, 1, 2, 3, 4, 8, 0.5, 1e-320, 1e308, 1e999, -1e999, float("nan"), 10**400, 2**63]
_TEXTS = ["1", "8.0", "nan", "9" * 5000, "1e999", "none", "svd", "paper", "LORA", "F32", "I32"]
_NESTED = [[], {}, [[]], [None], [1, 2, 4], [4, 2], [1.5], {"x": 4}, {"1": {}}, [{"role": "user"}]]

NAMES = st.one_of(st.sampled_from(_NAMES), st.text(max_size=8))
VALUES = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(_NUMBERS),
    st.sampled_from(_TEXTS),
    st.sampled_from(_NESTED),
    NAMES,
).map(copy.deepcopy)  # later edits may change a list


@st.composite
def edited(draw: st.DrawFn, document: Any, max_edits: int = 3) -> Any:
    """Return a JSON document in which some values or names are replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, max_edits))):
        containers = list(_containers(document))
        container = draw(st.sampled_from(containers))
        if isinstance(container, list):
            position = draw(st.integers(0, max(0, len(container) - 1)))
            container[position : position + draw(st.integers(0, 1))] = [draw(VALUES)]
            continue
        key = draw(st.sampled_from([*container, None]))
        action = draw(st.sampled_from(["replace", "rename", "remove", "copy"]))
        if key is None or action == "copy":
            others = [other for c in containers if isinstance(c, dict) for other in c.values()]
            container[draw(NAMES)] = copy.deepcopy(draw(st.sampled_from(others or [None])))
        elif action == "replace":
            container[key] = draw(VALUES)
        else:
            value = container.pop(key)
            if action == "rename":
                container[draw(NAMES)] = value
    return document


def _containers(document: Any) -> Iterator[Any]:
    """Yield the lists and the dictionaries of a document, itself included."""
    if isinstance(document, (dict, list)):
        yield document
        for value in document.values() if isinstance(document, dict) else document:
            yield from _containers(value)


@st.composite
def edited_text(draw: st.DrawFn, text: str, insertions: list[str]) -> bytes:
    """Return a text in UTF-8 of which a part may be replaced, or which may end early."""
    data = text.encode()
    if draw(st.integers(0, 3)) > 0:
        return data
    start = draw(st.integers(0, len(data)))
    if draw(st.booleans()):
        return data[:start]
    inserted = draw(st.one_of(st.sampled_from(insertions).map(str.encode), st.binary(max_size=4)))
    return data[:start] + inserted + data[start + draw(st.integers(0, 4)) :]


def edited_json(document: Any, max_edits: int = 3) -> st.SearchStrategy[bytes]:
    """Return the bytes of edited JSON, which may not be JSON any more."""
    insertions = [
        "[" * 100_000,
        '{"a":' * 10_000,
        "NaN",
        "9" * 5000,
        "1e999",
        '"\\ud800"',
        "\ufeff",
    ]
    return edited(document, max_edits).flatmap(
        lambda value: edited_text(json.dumps(value), insertions)
    )


@contextmanager
def works_or_fails_clearly() -> Iterator[None]:
    """Let a MatryoshkaError pass if its message is one clear line, and stop what does not end."""

    def stop(*_: object) -> None:
        pytest.fail(f"It took more than {MAX_CPU_SECONDS} seconds.")

    # Not the timer of pytest-timeout.
    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
    try:
        yield
    except MatryoshkaError as error:
        message = str(error)
        assert 0 < len(message) < 500
        assert message.isprintable()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def run_command(folder: Path, *arguments: object) -> bool:
    """Run a command that may write into a folder, and return whether it worked.

    If it fails, it does so with one clear line, and has written nothing. In neither case does it
    print a control character.
    """
    before = sorted(folder.rglob("*"))
    with works_or_fails_clearly():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.output.replace("\n", "").isprintable()
        if result.exception is None:
            return True
        raise result.exception
    assert sorted(folder.rglob("*")) == before
    return False
