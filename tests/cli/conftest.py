"""The command line in the process of the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest

from matryoshka_lora.cli import main


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | Sequence[str]], tuple[int, str, str]]:
    """Return a function that runs a command, and returns its exit status, stdout and stderr."""

    def run(command: str | Sequence[str]) -> tuple[int, str, str]:
        words = command.split() if isinstance(command, str) else command
        monkeypatch.setattr(sys, "argv", ["matryoshka", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_request:
            main()
        stdout, stderr = capfd.readouterr()
        code = exit_request.value.code
        return (code if isinstance(code, int) else int(code is not None)), stdout, stderr

    return run
