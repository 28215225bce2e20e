"""What is said of a layer's directions, against NumPy's SVD and the theorem of Eckart and Young."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from research.singular import describe

Array = np.ndarray[Any, Any]
RECORDED = json.loads((Path(__file__).parents[2] / "docs" / "singular.json").read_text(encoding="utf-8"))


def missing(values: Array) -> Array:
    """Of the prefixes of a matrix with these singular values."""
    rest = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)
    shares: Array = np.sqrt(rest / rest[0])
    return shares


def test_directions_in_the_order_of_an_svd() -> None:
    dense = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 5).tril()
    U, S, Vt = np.linalg.svd(dense.numpy(), full_matrices=False)
    found = describe(torch.tensor(Vt[:3]), torch.tensor(U[:, :3] * S[:3]))
    assert found["norms"] == pytest.approx(S[:3], rel=1e-4)
    assert found["missing"] == pytest.approx(missing(S[:3]), abs=1e-4)


def test_the_order_as_trained_is_that_of_the_columns() -> None:
    A, B = torch.eye(2, 3), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert describe(A, B) == {"norms": [3.0, 4.0], "missing": [1.0, 0.8, 0.0]}


def test_the_recorded_layer_obeys_the_theorem() -> None:
    trained, svd = RECORDED["trained"], RECORDED["svd"]
    assert svd["norms"] == sorted(svd["norms"], reverse=True)
    assert svd["missing"] == pytest.approx(missing(np.array(svd["norms"])), abs=1e-4)
    assert all(best <= other for best, other in zip(svd["missing"], trained["missing"], strict=True))
