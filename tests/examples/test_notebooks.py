"""The notebooks of examples/ run, and are stored with their outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_runs_and_has_outputs(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    last_cells = [cell for cell in notebook.cells[-3:] if cell.cell_type == "code"]
    assert all(cell.outputs for cell in last_cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, resources=resources).execute()
