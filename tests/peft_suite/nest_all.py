"""A pytest plugin, loaded by `run.py`: nest each LoRA adapter once it is created, and count."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest

from matryoshka_lora import MatryoshkaError, nest

HUB_ERRORS = ("couldn't connect", "outgoing traffic has been disabled", "LocalEntryNotFoundError")
counts = {"nested": 0, "rejected": 0, "needs_hub": 0}


def nest_adapter(model: peft.PeftModel, name: str) -> None:
    """Nest an adapter with rule ``lora``, which is plain LoRA at rank R: all tests must pass."""
    try:
        nest(model, rule="lora", adapter_name=name)
    except MatryoshkaError:
        counts["rejected"] += 1
    else:
        counts["nested"] += 1


def patch_peft() -> None:
    """Let PEFT's models nest their LoRA adapters."""
    original_init = peft.PeftModel.__init__
    original_add_adapter = peft.PeftModel.add_adapter

    def init(
        self: Any, model: Any, peft_config: Any, adapter_name: str = "default", **options: Any
    ) -> None:
        original_init(self, model, peft_config, adapter_name, **options)
        if isinstance(peft_config, peft.LoraConfig):
            nest_adapter(self, adapter_name)

    def add_adapter(self: Any, adapter_name: str, peft_config: Any, **options: Any) -> None:
        original_add_adapter(self, adapter_name, peft_config, **options)
        if isinstance(peft_config, peft.LoraConfig):
            nest_adapter(self, adapter_name)

    peft.PeftModel.__init__ = init
    peft.PeftModel.add_adapter = add_adapter


def pytest_configure() -> None:
    """Patch PEFT before its tests are imported."""
    from tests import testing_utils  # type: ignore[attr-defined]

    testing_utils.hub_online_once = contextlib.nullcontext  # it would wait for the hub
    patch_peft()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of PEFT's other methods."""
    selected, deselected = [], []
    for item in items:
        if any(is_other_config(value) for value in parameters(item)):
            deselected.append(item)
        else:
            selected.append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = selected


def parameters(item: pytest.Item) -> list[Any]:
    callspec = getattr(item, "callspec", None)
    return list(callspec.params.values()) if callspec else []


def is_other_config(value: Any) -> bool:
    config_class = value if isinstance(value, type) else type(value)
    return issubclass(config_class, peft.PeftConfig) and config_class is not peft.LoraConfig


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Skip a test that asks for a model on the hub."""
    report = yield
    if report.failed and call.excinfo is not None:
        message = str(call.excinfo.getrepr())
        if any(error in message for error in HUB_ERRORS):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, "Skipped: needs the hub")
            counts["needs_hub"] += 1
    return report


def pytest_sessionfinish() -> None:
    Path(os.environ["PEFT_SUITE_REPORT"]).write_text(json.dumps(counts))
