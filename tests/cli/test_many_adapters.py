"""The commands on a folder of 50 adapters: one is DoRA and one is damaged."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.many_adapters import BROKEN, DORA, NUM_ADAPTERS, save_many_adapters
from helpers.outputs import names_in

LAYERS = {"model.layers.0.self_attn.q_proj": (80, 72)}


def test_fifty_adapters_are_described_truncated_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[str], tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks = save_many_adapters(Path("adapters"), LAYERS, "org/base")
    assert len(ranks) == NUM_ADAPTERS - 2

    code, stdout, _ = run("info adapters")
    assert code == 1
    rows = {line.split()[-1]: line.split()[0] for line in stdout.splitlines() if "adapter-" in line}
    assert {name: int(rows[name]) for name in ranks} == ranks
    for name in (DORA, BROKEN):
        (line,) = re.findall(f"Not read: .*{name}.+", stdout)
        assert line.count(name) == 1
    assert "48 LoRAs" in stdout
    code, stdout, _ = run("info adapters --json")
    assert code == 1
    assert json.loads(stdout)["failed"].keys() == {DORA, BROKEN}

    code, stdout, stderr = run("export adapters --rank 8 -o small --skip-bad")
    assert code == 0
    assert "48 LoRAs exported, 2 failed" in stdout
    assert all(name in stderr for name in (DORA, BROKEN))
    written = set(names_in(Path("small")))
    assert written == ranks.keys()
    for name in ranks:
        assert json.loads(Path("small", name, "adapter_config.json").read_text())["r"] == 8

    code, stdout, _ = run("serve small --dry-run")
    assert code == 0
    (command,) = [line for line in stdout.splitlines() if "--lora-modules" in line]
    words = shlex.split(command)
    modules = [json.loads(word) for word in words if word.startswith("{")]
    assert {module["name"]: module["path"] for module in modules} == {
        name: f"small/{name}" for name in ranks
    }
    for option, value in (("--max-lora-rank", "8"), ("--max-cpu-loras", "48")):
        assert words[words.index(option) + 1] == value
    assert "--model=org/base" in words
    assert run("serve adapters --dry-run")[0] == 1  # two cannot be served
