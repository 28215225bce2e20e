"""Truncated factors and their errors, against dense matrices and NumPy's SVD."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matryoshka_lora.lora_file.lora import Layer, LoraFile
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from numpy.typing import NDArray
from safetensors import safe_open

from matryoshka_lora import MatryoshkaError, Nesting, NotFiniteError

Array = NDArray[Any]

R = 6
SCALE = 0.75
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def make_layer(
    name: str = "a",
    rank: int = R,
    in_shape: tuple[int, ...] = (9,),
    out_size: int = 8,
    num_experts: int = 1,
    scale: float = SCALE,
    dtype: Any = np.float32,
) -> Layer:
    """Return a layer of random factors, in PEFT's layout."""
    generator = np.random.default_rng(len(name) + rank)
    rows = rank * num_experts
    trailing_ones = (1,) * (len(in_shape) - 1)  # B of a convolution has a 1 x 1 kernel
    A = generator.normal(size=(rows, *in_shape)).astype(dtype)
    B = generator.normal(size=(out_size, rows, *trailing_ones)).astype(dtype)
    stored_A, stored_B = StoredTensor.from_array(A), StoredTensor.from_array(B)
    key_A, key_B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    return Layer(name, key_A, key_B, stored_A, stored_B, rank, scale, num_experts)


def make_lora(*layers: Layer, **fields: Any) -> PeftFolder:
    return PeftFolder("adapter", layers, {}, config={"peft_type": "LORA"}, **fields)


def dense_factors(layer: Layer) -> tuple[Array, Array]:
    """Return A (experts, R, in) and B (experts, out, R) in float64, expert by expert."""
    A, B = layer.A.read().astype(np.float64), layer.B.read().astype(np.float64)
    A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
    num_experts, rank = layer.num_experts, layer.rank
    expert_A = [A[index * rank : (index + 1) * rank] for index in range(num_experts)]
    expert_B = [B[:, index::num_experts] for index in range(num_experts)]
    return np.stack(expert_A), np.stack(expert_B)


def best_approximation(update: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(update, full_matrices=False)
    result: Array = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return result


def product(A: Array, B: Array, scale: float) -> Array:
    result: Array = scale * B.astype(np.float64) @ A.astype(np.float64)
    return result


LAYERS = {
    "linear": make_layer(),
    "convolution": make_layer(in_shape=(4, 3, 2)),
    "experts": make_layer(num_experts=3),
    "narrow": make_layer(in_shape=(4,)),
    **{str(dtype): make_layer(dtype=dtype) for dtype in DTYPES},
}


@pytest.mark.parametrize("rank", [1, 3, R, R + 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_truncated_factors_are_the_best_approximation(kind: str, rank: int) -> None:
    layer = LAYERS[kind]
    A, B = dense_factors(layer)
    update = product(A, B, layer.scale)
    output_scale = 0.3
    lora = make_lora(layer)
    new_layer = layer.with_rank(rank, output_scale)
    truncated, new_A, new_B, squared_errors, new_singular_values = lora.truncate(layer, new_layer)
    assert truncated == new_layer
    assert (new_A.shape[-2], new_B.shape[-1]) == (rank, rank)
    assert new_A.dtype == new_B.dtype == layer.A.dtype

    tolerance = {2: 0.05, 4: 1e-5}[layer.A.dtype.itemsize] * np.abs(update).max()
    result = product(new_A, new_B, output_scale).reshape(update.shape)
    np.testing.assert_allclose(result, best_approximation(update, rank), atol=tolerance)
    for r in range(min(rank, R) + 1):
        missing = update - best_approximation(update, r)
        expected = np.sum(missing**2)
        np.testing.assert_allclose(squared_errors[r], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        lora.squared_errors(layer), squared_errors[: R + 1], rtol=1e-9, atol=1e-9
    )
    expected = np.linalg.svd(update, compute_uv=False)
    for values in (lora.singular_values(layer), new_singular_values):
        assert values is not None
        assert values.shape[-1] >= R
        values = values.reshape(len(A), -1)[:, : expected.shape[-1]]
        np.testing.assert_allclose(values, expected[:, : values.shape[-1]], atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "convolution", "experts"])
@pytest.mark.parametrize(
    ("fields", "keep_factors"),
    [
        ({"order": "trained"}, False),
        ({"nesting": Nesting((1, 2, R), "sqrt", SCALE), "deploy": "paper"}, False),
        ({}, True),
    ],
    ids=["trained", "paper", "keep_factors"],
)
def test_ordered_factors_are_sliced(kind: str, fields: dict[str, Any], keep_factors: bool) -> None:
    layer = LAYERS[kind]
    lora = make_lora(layer, **fields)
    A, B = dense_factors(layer)

    def scale_at(rank: int) -> float:
        return SCALE * math.sqrt(R / rank) if lora.deploy == "paper" else SCALE

    for rank in (1, 2, R):
        output_scale = scale_at(rank)
        _, new_A, new_B, squared_errors, singular_values = lora.truncate(
            layer, layer.with_rank(rank, output_scale), keep_factors
        )
        assert singular_values is None
        np.testing.assert_array_equal(new_A.reshape(len(A), rank, -1), A[:, :rank])
        np.testing.assert_array_equal(new_B.reshape(len(B), -1, rank), B[..., :rank])
        _, rescaled_A, rescaled_B, *_ = lora.truncate(
            layer, layer.with_rank(rank, 2.0), keep_factors
        )
        np.testing.assert_allclose(
            product(rescaled_A, rescaled_B, 2.0), product(new_A, new_B, output_scale), rtol=1e-4
        )
        for r in range(1, R + 1):
            missing = product(A, B, SCALE) - product(A[:, :r], B[..., :r], scale_at(r))
            np.testing.assert_allclose(squared_errors[r], np.sum(missing**2), atol=1e-9)
        np.testing.assert_allclose(squared_errors[0], np.sum(product(A, B, SCALE) ** 2))
    if not keep_factors:
        np.testing.assert_allclose(lora.squared_errors(layer), squared_errors, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_and_tensors(kind: str) -> None:
    layer = LAYERS[kind]
    A, B = layer.A.read(), layer.B.read()
    matrices = layer.to_matrices(A, B)
    for matrix, expected in zip(matrices, dense_factors(layer), strict=True):
        assert matrix.ndim == (2 if layer.num_experts == 1 else 3)
        np.testing.assert_array_equal(matrix.reshape(expected.shape).astype(float), expected)
    for tensor, expected in zip(layer.from_matrices(*matrices), (A, B), strict=True):
        np.testing.assert_array_equal(tensor, expected)
    assert layer.parameters_per_rank == (A.size + B.size) / layer.rank


@pytest.mark.parametrize("keep_factors", [False, True])
def test_infinity_is_never_written(keep_factors: bool, tmp_path: Path) -> None:
    layer = make_layer(scale=1e12, dtype=np.float16)
    lora = make_lora(layer)
    assert lora.plan(2).layers[0][1].scale > 1e11  # fp16 can represent the factors then
    layers = ((layer, layer.with_rank(R, 1.0)),)
    plan = replace(lora.plan(R), layers=layers, keep_factors=keep_factors)
    with pytest.raises(NotFiniteError, match="float16"):
        plan.write_weights(tmp_path / "file.safetensors")


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_that_are_not_finite_are_rejected(factor: str, value: float, dtype: Any) -> None:
    layer = make_layer(name="model.layer", dtype=dtype)
    array = getattr(layer, factor).read().copy()
    array[0, 0] = value
    layer = replace(layer, **{factor: StoredTensor.from_array(array)})
    lora = make_lora(layer)
    with pytest.raises(NotFiniteError, match=r"model\.layer"):
        lora.truncate(layer, 2, 1.0)
    with pytest.raises(NotFiniteError, match=r"model\.layer"):
        lora.spectra({layer.name: layer.rank for layer in lora.layers})


PAPER = {"nesting": Nesting((1, 2, R), scale=SCALE), "deploy": "paper"}


@pytest.mark.parametrize(
    ("fields", "ranks", "available_ranks"),
    [
        ({}, (1, 2, 4, R), range(1, R + 1)),
        ({"nesting": Nesting((2, R), scale=SCALE)}, (2, R), range(1, R + 1)),
        (PAPER, (1, 2, R), (1, 2, R)),
    ],
    ids=["plain", "nested", "paper"],
)
def test_available_ranks(
    fields: dict[str, Any], ranks: tuple[int, ...], available_ranks: Any
) -> None:
    lora = make_lora(make_layer(), **fields)
    assert lora.max_rank == R
    assert lora.ranks == lora.check_ranks(None) == ranks
    for rank in range(-1, R + 3):
        if rank in available_ranks:
            lora.check_rank(rank)
            assert lora.check_ranks([rank]) == (rank,)
            assert lora.plan(np.int64(rank)).rank == rank  # a rank may come from an array
        else:
            for action in (lora.check_rank, lora.plan, lambda rank: lora.check_ranks([rank])):
                with pytest.raises(MatryoshkaError, match="rank"):
                    action(rank)


@pytest.mark.parametrize(
    "ranks", [[], [2, 1], [1, 1], [1, 7], ["2"], [2.5], [2.0], [True]], ids=str
)
def test_ranks_that_are_not_available_are_rejected(ranks: Any) -> None:
    lora = make_lora(make_layer())
    with pytest.raises(MatryoshkaError, match="rank"):
        lora.check_ranks(ranks)


@pytest.mark.parametrize("rank", [True, 2.0, 2.5, "2", None], ids=str)
def test_ranks_that_are_not_integers_are_rejected(rank: Any) -> None:
    lora = make_lora(make_layer())
    for action in (lora.check_rank, lora.plan):
        with pytest.raises(MatryoshkaError, match="integer"):
            action(rank)


@pytest.mark.parametrize("fields", [{}, {"order": "trained"}], ids=["svd", "trained"])
def test_plan_knows_size_and_error(fields: dict[str, Any], tmp_path: Path) -> None:
    layers = (make_layer("a"), make_layer("bb", rank=4, dtype=np.float16))
    other_tensors = {"bias": StoredTensor.from_array(np.arange(3.0))}
    lora: LoraFile = replace(make_lora(*layers, **fields), other_tensors=other_tensors)
    ranks = {"a": 5, "bb": 2}
    plan = lora.plan(ranks)
    assert (plan.rank, plan.ranks) == (5, ranks)
    written = plan.write_weights(tmp_path / "file.safetensors")
    assert (tmp_path / "file.safetensors").stat().st_size == plan.file_size
    with safe_open(tmp_path / "file.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("bias"), np.arange(3.0))

    total = 0.0
    missing = {None: 0.0, 1: 0.0, 3: 0.0, 6: 0.0}
    for layer in layers:
        (A,), (B,) = dense_factors(layer)
        update = product(A, B, SCALE)
        total += np.sum(update**2)
        for rank in missing:
            r = rank or ranks[layer.name]
            truncated = product(A[:r], B[:, :r], SCALE)
            if not fields:
                truncated = best_approximation(update, r)
            missing[rank] += np.sum((update - truncated) ** 2)
    for rank, squared_error in missing.items():
        expected = math.sqrt(squared_error / total)
        assert written.relative_error(rank) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_relative_error_of_an_adapter_of_zeros(tmp_path: Path) -> None:
    layer = make_layer()
    layer = replace(layer, B=StoredTensor.from_array(np.zeros(layer.B.shape, np.float32)))
    written = make_lora(layer).plan(2).write_weights(tmp_path / "file.safetensors")
    assert written.relative_error() == 0.0
