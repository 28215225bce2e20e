"""Print how much the losses on the device differ from those on the CPU."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tests have passed to `record_property`."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            test_name = report.nodeid.rpartition("::")[2]
            terminalreporter.write_line(f"{test_name}: {name} {value:.1e}")
