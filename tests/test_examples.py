"""Each example runs as a user would run it, with few steps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the TRL script leaves."""
    folder = tmp_path_factory.mktemp("examples") / "trl"
    assert "any rank from 1 to 32" in run("train_with_trl.py", "--steps", 2, "--out", folder)
    return folder


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        if file.name not in ("README.md", "__pycache__"):
            assert f"({file.name})" in listed
            assert f'"{file.name}"' in tests


def test_the_trl_script_has_four_calls_more(adapter: Path) -> None:
    source = (EXAMPLES / "train_with_trl.py").read_text()
    assert [f"  # {i} of 4" in source for i in (1, 2, 3, 4, 5)] == [True, True, True, True, False]
    assert (adapter / "README.md").read_text().startswith("---\nlibrary_name: peft")


def test_a_stranger_s_adapter(tmp_path: Path) -> None:
    options = ("--by", "loss", "--steps", 2, "--rows", 4, "--items", 2)
    out = run("reorder_a_stranger.py", *options, "--out", tmp_path / "s")
    assert [line for line in out.splitlines() if line.startswith('{"rank": ')][-1].startswith('{"rank": 32')


def test_the_notebook(tmp_path: Path) -> None:
    """Every cell runs, with fewer steps and questions; in the repository its outputs are cleared."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    long, short = "STEPS, QUESTIONS = 60, 50", "STEPS, QUESTIONS = 2, 3"
    assert cells[0].source.startswith(long)
    cells[0].source = cells[0].source.replace(long, short)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    written = json.loads((tmp_path / "quickstart/small/adapter_config.json").read_text())
    assert cells[-2].outputs[-1].text.splitlines()[-1] == f"rank {written['r']}"
    assert "assistant" in cells[-1].outputs[-1].text


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_qlora(tmp_path: Path) -> None:
    out = run("qlora.py", "--steps", 1, "--reorder", "svd", "--out", tmp_path / "qlora")
    assert "rank 16: the largest logit is" in out


def test_a_rank_per_request(adapter: Path) -> None:
    out = run("rank_per_request.py", "--adapter", adapter)
    differences = [float(line.rpartition(" ")[2]) for line in out.splitlines()]
    assert len(differences) == 3
    assert max(differences) < 1e-3


def test_a_device(adapter: Path) -> None:
    out = run("device.py", "--adapter", adapter, "--rank", 4)
    assert "1,221,120 numbers were read" in out
    assert float(out.split("differ by ")[1].split()[0]) < 1e-3


def test_a_ladder_for_vllm(adapter: Path, tmp_path: Path) -> None:
    """The command is made, and not run: `make test-vllm` runs another one."""
    bash = shutil.which("bash")
    assert bash
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [bash, str(EXAMPLES / "serve_with_vllm.sh"), str(adapter), str(tmp_path / "ladder")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    last = result.stdout.splitlines()[-1]
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 32" in last


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="make test-deploy installs llama.cpp")
def test_llama_cpp(adapter: Path) -> None:
    out = run("serve_with_llama_cpp.py", "--adapter", adapter, "--rank", 8)
    assert "Verified: the largest difference" in out
