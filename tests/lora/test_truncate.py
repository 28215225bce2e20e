"""Truncated factors and their errors, against dense matrices and NumPy's SVD."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.layers import SCALE, R, factors_of, make_layer, make_lora, update_of
from helpers.plain_peft import best, plain_adapter, updates

import matryoshka_lora as ml
from matryoshka_lora import Lora, MatryoshkaError, Nesting
from matryoshka_lora.lora.truncate import with_ranks

LAYERS = {
    "linear": make_layer(),
    "convolution": make_layer(in_shape=(4, 3, 2)),
    "experts": make_layer(num_experts=3),
    "narrow": make_layer(in_shape=(4,)),
    **{str(dtype): make_layer(dtype=dtype) for dtype in (np.float16, ml_dtypes.bfloat16)},
}


@pytest.mark.parametrize("rank", [1, 3, R, R + 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_truncated_factors_are_the_best_approximation(kind: str, rank: int) -> None:
    layer = LAYERS[kind]
    update = update_of(layer)
    lora = make_lora(layer)
    truncated = with_ranks(lora, {layer.name: rank})
    (new_layer,) = truncated.layers
    factors = new_layer.read()
    assert (truncated.order, new_layer.rank) == ("svd", rank)
    assert (factors.A.shape[-2], factors.B.shape[-1]) == (rank, rank)
    assert new_layer.dtype == layer.dtype
    np.testing.assert_allclose(update_of(new_layer), best(update, rank), atol=1e-6)
    assert factors.squared_errors is not None
    assert factors.singular_values is not None
    for r in range(min(rank, R) + 1):
        missing = np.sum((update - best(update, r)) ** 2)
        np.testing.assert_allclose(factors.squared_errors[r], missing, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        lora.squared_errors()[layer.name], factors.squared_errors[: R + 1], rtol=1e-9, atol=1e-9
    )
    expected = np.linalg.svd(update, compute_uv=False)
    num_values = min(expected.shape[-1], factors.singular_values.shape[-1])
    np.testing.assert_allclose(
        factors.singular_values[..., :num_values], expected[..., :num_values], atol=1e-9
    )


ORDERED: dict[str, dict[str, Any]] = {
    "svd": {"order": "svd"},
    "trained": {"order": "trained"},
    "paper": {"nesting": Nesting((1, 2, R), "sqrt", SCALE), "deploy": "paper"},
}


@pytest.mark.parametrize("kind", ["linear", "convolution", "experts"])
@pytest.mark.parametrize("order", ORDERED)
def test_ordered_factors_are_sliced(kind: str, order: str) -> None:
    lora = make_lora(LAYERS[kind], **ORDERED[order])
    A, B = factors_of(LAYERS[kind])

    def prefix(rank: int) -> Any:
        scale = SCALE * math.sqrt(R / rank) if order == "paper" else SCALE
        return scale * B[..., :rank] @ A[..., :rank, :]

    for rank in (1, 2, R):
        truncated = lora.at_rank(rank)
        (new_layer,) = truncated.layers
        factors = new_layer.read()
        assert factors.singular_values is None
        np.testing.assert_array_equal(factors.A, A[..., :rank, :])
        np.testing.assert_array_equal(factors.B, B[..., :rank])
        np.testing.assert_allclose(update_of(new_layer), prefix(rank))
        assert factors.squared_errors is not None
        for r in range(1, R + 1):
            missing = np.sum((prefix(R) - prefix(r)) ** 2)
            np.testing.assert_allclose(factors.squared_errors[r], missing, atol=1e-9)
        np.testing.assert_allclose(factors.squared_errors[0], np.sum(prefix(R) ** 2))
        np.testing.assert_allclose(lora.squared_errors()["a"], factors.squared_errors, atol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"order": "trained"}], ids=["svd", "trained"])
def test_size_and_errors_of_an_output(fields: dict[str, Any], tmp_path: Path) -> None:
    layers = (make_layer("a"), make_layer("bb", rank=4, dtype=np.float16))
    lora = make_lora(*layers, **fields)
    ranks = {"a": 5, "bb": 2}
    truncated = with_ranks(lora, ranks)
    assert truncated.ranks == ranks
    result = truncated.save(tmp_path / "output")
    assert (result.ranks, result.size) == (ranks, truncated.file_size)
    assert (tmp_path / "output" / "adapter_model.safetensors").stat().st_size == result.size
    total = 0.0
    missing = {None: 0.0, 1: 0.0, 3: 0.0, 6: 0.0}
    for layer in layers:
        update = update_of(layer)
        A, B = factors_of(layer)
        total += np.sum(update**2)
        for rank in missing:
            r = rank or ranks[layer.name]
            kept = SCALE * B[:, :r] @ A[:r] if fields else best(update, r)
            missing[rank] += np.sum((update - kept) ** 2)
    for rank, squared_error in missing.items():
        expected = math.sqrt(squared_error / total)
        assert result.written.relative_error(rank) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert result.errors == {5: result.written.relative_error()}


def test_an_adapter_of_zeros_has_no_error(tmp_path: Path) -> None:
    result = make_lora(make_layer(size=0.0)).truncate(2).save(tmp_path / "output")
    assert result.errors == {2: 0.0}


def test_a_layer_of_a_smaller_rank_keeps_it() -> None:
    lora = make_lora(make_layer("a"), make_layer("bb", rank=2))
    assert lora.truncate(4).ranks == {"a": 4, "bb": 2}
    assert lora.reorder().ranks == {"a": R, "bb": R}  # padded, as PEFT has one rank


# The choice of the ranks


@pytest.fixture
def lora(tmp_path: Path) -> Lora:
    plain_adapter(tmp_path / "lora", r=8)
    return ml.open(tmp_path / "lora")


def dense(lora: Lora) -> dict[str, np.ndarray]:
    """Return what PEFT merges, by the name of the layer."""
    return {name.removesuffix(".weight"): update for name, update in updates(lora.name).items()}


def test_keep_is_the_smallest_rank_of_each_layer(lora: Lora) -> None:
    expected = {}
    for name, update in dense(lora).items():
        squares = np.linalg.svd(update, compute_uv=False) ** 2
        kept = np.cumsum(squares) / np.sum(squares)
        expected[name] = int(np.argmax(kept >= 0.6)) + 1
    assert lora.truncate(keep="60%").ranks == expected
    assert lora.reorder().truncate(keep=0.6).ranks == expected


@pytest.mark.parametrize("max_error", ["60%", 0.3])
def test_the_error_is_that_of_all_layers(lora: Lora, tmp_path: Path, max_error: Any) -> None:
    limit = 0.6 if max_error == "60%" else max_error
    small = lora.truncate(error=max_error)
    result = small.save(tmp_path / "small")
    missing = total = 0.0
    for name, update in dense(lora).items():
        missing += np.sum((update - best(update, small.ranks[name])) ** 2)
        total += np.sum(update**2)
    (error,) = result.errors.values()
    assert error == pytest.approx(np.sqrt(missing / total), rel=1e-5)
    assert error <= limit
    # The same error in every layer takes a larger file.
    assert small.file_size < lora.truncate(keep=1 - limit**2).file_size


def test_a_rank_is_an_upper_bound(lora: Lora) -> None:
    unbounded = lora.truncate(keep=0.6)
    bounded = lora.truncate(2, keep=0.6)
    assert bounded.ranks == {name: min(2, rank) for name, rank in unbounded.ranks.items()}
    assert "rank" in bounded.notes[0]
    assert lora.truncate(2, error=0.3).max_rank == 2
    size = unbounded.file_size
    sized = lora.truncate(3, max_bytes=size)
    assert sized.file_size <= size
    assert sized.max_rank <= 3
    both = lora.truncate(keep=0.6, max_bytes=sized.file_size)
    assert both.file_size <= sized.file_size
    assert all(rank <= unbounded.ranks[name] for name, rank in both.ranks.items())
    assert set(lora.truncate(max_bytes=lora.file_size).ranks.values()) == {8}


REQUESTS: list[dict[str, Any]] = [{"keep": "90%"}, {"error": "9%"}, {"max_bytes": "50kB"}]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("order", ["trained", "paper"])
def test_a_choice_of_ranks_needs_singular_values(order: str, request_: dict[str, Any]) -> None:
    lora = make_lora(make_layer(), **ORDERED[order])
    with pytest.raises(MatryoshkaError, match="singular values"):
        lora.truncate(**request_)


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": R + 1}, "rank"),
        ({"rank": 2.0}, "integer"),
        ({"keep": 1}, "share"),
        ({"error": "0%"}, "share"),
        ({"max_bytes": 0}, "size"),
        ({"max_bytes": 100}, "max_bytes"),
        ({"keep": 0.9, "error": 0.1}, "both"),
    ],
)
def test_invalid_requests_are_rejected(arguments: dict[str, Any], keyword: str) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        make_lora(make_layer()).truncate(**arguments)
