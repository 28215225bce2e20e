"""A plugin of pytest, loaded by `run.py`: nest each LoRA adapter as it is made, and count."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest

from matryoshka_lora import MatryoshkaError, nest

NO_HUB = ("couldn't connect", "outgoing traffic has been disabled", "LocalEntryNotFoundError")
counts = {"nested": 0, "refused": 0, "needs_hub": 0}


def nest_adapter(model: peft.PeftModel, name: str) -> None:
    """At full rank rule "lora" is plain LoRA, so that every test must find what it expects."""
    try:
        nest(model, rule="lora", adapter=name)
    except MatryoshkaError:
        counts["refused"] += 1
    else:
        counts["nested"] += 1


def nest_from_now_on() -> None:
    """PEFT's models nest their adapters themselves."""
    make, add = peft.PeftModel.__init__, peft.PeftModel.add_adapter

    def nested_init(
        self: Any, model: Any, peft_config: Any, adapter_name: str = "default", **options: Any
    ) -> None:
        make(self, model, peft_config, adapter_name, **options)
        if isinstance(peft_config, peft.LoraConfig):
            nest_adapter(self, adapter_name)

    def nested_add(self: Any, adapter_name: str, peft_config: Any, **options: Any) -> None:
        add(self, adapter_name, peft_config, **options)
        if isinstance(peft_config, peft.LoraConfig):
            nest_adapter(self, adapter_name)

    peft.PeftModel.__init__, peft.PeftModel.add_adapter = nested_init, nested_add


def pytest_configure() -> None:
    """Before the tests are imported."""
    from tests import testing_utils  # type: ignore[attr-defined]

    testing_utils.hub_online_once = lambda model_id: (
        contextlib.nullcontext()
    )  # it would wait for the hub
    nest_from_now_on()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is parametrized by another of PEFT's methods."""
    others = [item for item in items if any(is_other_config(value) for value in parameters(item))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def parameters(item: pytest.Item) -> list[Any]:
    callspec = getattr(item, "callspec", None)
    return list(callspec.params.values()) if callspec else []


def is_other_config(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return issubclass(kind, peft.PeftConfig) and kind is not peft.LoraConfig


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that asked for a model of the hub is left out."""
    report = yield
    if (
        report.failed
        and call.excinfo is not None
        and any(sign in str(call.excinfo.getrepr()) for sign in NO_HUB)
    ):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: needs the hub")
        counts["needs_hub"] += 1
    return report


def pytest_sessionfinish() -> None:
    Path(os.environ["PEFT_SUITE_REPORT"]).write_text(json.dumps(counts))
