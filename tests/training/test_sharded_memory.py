"""No process gathers a sharded model while its ranks are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.two_processes import run_in_two_processes

from matryoshka_lora.formats import peft_folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_the_memory_of_a_sharded_model(strategy: str, tmp_path: Path) -> None:
    """Each process holds half of the model already, and needs a layer more, a twelfth."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    config = "ddp" if strategy == "zero3" else strategy  # the script has the settings of ZeRO-3
    run_in_two_processes(config, "sharded_memory.py", [str(tmp_path), strategy])
    one, two = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
    assert one["losses"] == two["losses"]
    assert one["outcome"] == two["outcome"] == "kept"
    for measured in (one, two):
        assert measured["before"] < 0.6 * measured["model"]
        assert 0 < measured["growth"] < 0.3 * measured["model"]
    assert peft_folder.read(tmp_path / "adapter").small is not None
