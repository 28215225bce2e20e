"""A pytest plugin, loaded by `run_conversion.py`: patch PEFT if it is asked to, and count."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any

import factor_conversion
import pytest

outcomes: dict[str, str] = {}
num_calls: dict[str, int] = {"from_factors": 0}


def pytest_configure() -> None:
    """Patch PEFT, and count the conversions that need no dense update."""
    from tests import testing_utils  # type: ignore[attr-defined]

    testing_utils.hub_online_once = contextlib.nullcontext  # it would wait for the hub
    if os.environ["PEFT_SUITE_PATCH"] != "1":
        return
    factored_svd = factor_conversion.factored_svd

    @functools.wraps(factored_svd)
    def counted(*arguments: Any) -> Any:
        num_calls["from_factors"] += 1
        return factored_svd(*arguments)

    factor_conversion.factored_svd = counted
    factor_conversion.patch_peft()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of each test. A failed setup is a failure."""
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    report = {"outcomes": outcomes, **num_calls}
    Path(os.environ["PEFT_SUITE_REPORT"]).write_text(json.dumps(report))
