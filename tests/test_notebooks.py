"""The notebooks run as they are, and their outputs are kept in them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

BOOKS = sorted((Path(__file__).parents[1] / "examples/notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_notebooks_run(book: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(book, as_version=4)
    assert all(cell.get("outputs") for cell in notebook.cells[-3:] if cell.cell_type == "code")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
