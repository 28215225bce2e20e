"""The demo from end to end, with fewer steps and questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka_lora import MatryoshkaError, read_sidecar
from matryoshka_lora.cli.main import app

CURVES = ["matryoshka-prefix", "matryoshka-svd", "matryoshka-learned", "lora-svd", "lora-learned"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "matryoshka_lora", "demo", "--out", str(out), "--steps", "1", "--items", "2"]
    # One thread: two that wait for one another on a busy machine would take many times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr[-3000:]
    data = json.loads((out / "evaluation.json").read_text())
    assert data["task"] == "family_relationships"
    assert list(data["curves"]) == CURVES
    for curve in data["curves"].values():
        assert curve["ranks"] == [1, 2, 4, 8, 16, 32]
        assert len(curve["loss"]) == len(curve["accuracy"]) == 6
    assert (out / "curve.png").stat().st_size > 10_000
    assert read_sidecar(out / "adapter").form == "reordered"
    assert json.loads((out / "rank-4" / "adapter_config.json").read_text())["r"] == 4
    assert not (out / "rank-4" / "nesting.json").exists()
    assert "gives the same answer to 2 of 2 questions" in first.stdout
    assert "adapter = nest(peft_model" in first.stdout
    assert first.stdout.splitlines()[-1].startswith("Next: matryoshka eval ")
    command = [sys.executable, "-m", "matryoshka_lora", "select", str(out), "--max-bytes", "10000000"]
    chosen = subprocess.run(command, capture_output=True, text=True)
    assert chosen.returncode == 0, chosen.stderr
    assert chosen.stdout.startswith("family_relationships: accuracy,none, 2 questions")
    assert f"Next: matryoshka export {out / 'adapter'} --rank " in chosen.stdout


@pytest.mark.parametrize("place", [".", "adapter", "rank-4"])
def test_the_demo_goes_over_nothing_of_others(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "adapter_config.json").write_text("{}")
    with pytest.raises(MatryoshkaError, match=r"holds .*adapter.* that no demo has made: choose another --out"):
        app(["demo", "--out", str(tmp_path)], standalone_mode=False)
    assert [path.name for path in (tmp_path / place).iterdir()] == ["adapter_config.json"]
