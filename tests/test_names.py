"""The package's own names."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

import pytest


def modules(package: str) -> list[str]:
    found = [f"{package}.{info.name}" for info in pkgutil.iter_modules(import_module(package).__path__)]
    inside = [name for name in found if hasattr(import_module(name), "__path__")]
    return [*found, *(name for package in inside for name in modules(package))]


@pytest.mark.parametrize("name", [name for name in modules("matryoshka_lora") if not name.endswith("__main__")])
def test_a_module_has_its_name_for_itself(name: str) -> None:
    """A function of the same name in the package would hide the module, or be hidden by it, as imports come."""
    package, _, last = name.rpartition(".")
    assert getattr(import_module(package), last) is sys.modules[name]
    assert last not in getattr(import_module(package), "__all__", ())
