"""The demo from end to end, with fewer steps and questions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from matryoshka_lora import MatryoshkaError, select
from matryoshka_lora.cli.main import app
from matryoshka_lora.evaluation.select import read_evaluation
from matryoshka_lora.formats.opened import open_adapter

RANKS = (1, 2, 4, 8, 16, 32)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_leaves_what_it_promises_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is killed in a process of its own, and goes on in this one."""
    out = tmp_path / "the demo"  # a name that a shell needs quotes for
    adapter, answers = out / "adapter", out / "adapter" / "evaluation" / "answers.jsonl"
    arguments = ["demo", "--out", str(out), "--steps", "1", "--items", "2"]
    command = [sys.executable, "-m", "matryoshka_lora", *arguments]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < 3):
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    before = answers.read_bytes().rpartition(b"\n")[0]

    monkeypatch.setenv("COLUMNS", "120")
    app(arguments, standalone_mode=False)
    said = capsys.readouterr().out
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    assert before.count(b"\n") >= 2
    assert answers.read_bytes().startswith(before)
    found = read_evaluation(out / "adapter")
    assert (list(found.tasks), found.ranks) == (["family_relationships"], list(RANKS))
    assert found.tasks["family_relationships"]["items"] == 2
    assert (adapter / "evaluation" / "curve.png").stat().st_size > 10_000
    opened = open_adapter(adapter)
    assert opened.nested.nesting.ranks == RANKS
    # What one step of the lowest rank has made may not be worth keeping.
    assert opened.nested.reordered in ("trained", "svd")
    assert "reorder: trained" in (adapter / "train.yaml").read_text()

    # What is exported is the first columns; plain PEFT has read them.
    small = load_file(out / "rank-4" / "adapter_model.safetensors")
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        assert tensor[:4].equal(small[key]) if "lora_A" in key else tensor[:, :4].equal(small[key])
    assert not (out / "rank-4" / "nesting.json").exists()

    # What it prints: a row for each rank, and what may be pasted.
    lines = said.splitlines()
    rows = [line.split() for line in lines if line.strip().startswith(("none ", *(f"{rank} " for rank in RANKS)))]
    assert [row[0] for row in rows] == ["none", *map(str, RANKS)]
    assert "gives the same answer to 8 of 8 questions" in said
    assert "adapter = nest(peft_model)" in said
    assert lines[-1] == f"Next: matryoshka select '{adapter}' --within 5%"
    assert select(adapter, max_bytes=found.about["bytes"][0]).rank == 1


@pytest.mark.parametrize("place", [".", "adapter", "rank-4"])
def test_the_demo_goes_over_nothing_of_others(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "adapter_config.json").write_text("{}")
    with pytest.raises(MatryoshkaError, match=r"holds .*adapter.* that no demo has made: choose another --out"):
        app(["demo", "--out", str(tmp_path)], standalone_mode=False)
    assert [path.name for path in (tmp_path / place).iterdir()] == ["adapter_config.json"]


def test_another_demo_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """With other steps: the adapter that is there stays."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "train.yaml").write_text("max_steps: 9\n")
    (tmp_path / "adapter" / "trainer_state.json").write_text("{}")
    with pytest.raises(MatryoshkaError, match=r"For the demo: delete .*, or give another folder with --out"):
        app(["demo", "--out", str(tmp_path), "--steps", "1"], standalone_mode=False)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["train.yaml", "trainer_state.json"]
