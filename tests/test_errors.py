"""Errors of other libraries become errors of this package."""

from __future__ import annotations

import pickle

import pytest

from matryoshka_lora import MatryoshkaError, MissingDependencyError, NotFiniteError
from matryoshka_lora.errors import optional_imports, wrap_errors


@pytest.mark.parametrize(
    ("module", "extra", "expected"),
    [
        ("torch", None, "peft"),
        ("lm_eval.api.model", None, "eval"),
        ("iso3166", None, "demo"),
        ("diffusers.loaders", None, "image"),
        ("torch", "train", "train"),
    ],
)
def test_a_missing_module_names_the_extra(module: str, extra: str | None, expected: str) -> None:
    with pytest.raises(MissingDependencyError, match=rf"\[{expected}\]"), optional_imports(extra):
        raise ModuleNotFoundError(name=module)


@pytest.mark.parametrize("error", [ModuleNotFoundError(name="unknown"), ImportError("broken")])
def test_other_import_errors_pass(error: ImportError) -> None:
    with pytest.raises(type(error)) as raised, optional_imports():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", [MissingDependencyError, NotFiniteError])
def test_all_errors_are_matryoshka_errors(error: type[MatryoshkaError]) -> None:
    assert issubclass(error, MatryoshkaError)
    assert issubclass(MatryoshkaError, ValueError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ä „b“", "ä „b“"),
        ("a\n\x1b[31mNext: curl\u202e\ud800", "a\\n\\x1b[31mNext: curl\\u202e\\ud800"),
    ],
)
def test_a_message_is_one_printable_line(text: str, expected: str) -> None:
    error = NotFiniteError(text)
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == expected


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(MissingDependencyError(f"first {'x' * 9999} last"))
    assert len(message) < 500
    assert message.startswith("first")
    assert message.endswith("last")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("disk\n  full."), "Cannot save: disk full. Free some space."),
        (OSError(), "Cannot save: OSError. Free some space."),
    ],
)
def test_wrapped_errors_have_the_reason_and_a_hint(error: OSError, expected: str) -> None:
    with pytest.raises(MatryoshkaError) as raised, wrap_errors("Cannot save", "Free some space"):
        raise error
    assert str(raised.value) == expected
    assert raised.value.__cause__ is error


def test_wrapping_passes_other_types_and_matryoshka_errors() -> None:
    with pytest.raises(KeyError), wrap_errors("Cannot save", exceptions=OSError):
        raise KeyError
    error = NotFiniteError("a factor is NaN")
    with pytest.raises(NotFiniteError) as raised, wrap_errors("Cannot save"):
        raise error
    assert raised.value is error
