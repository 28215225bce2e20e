"""The factors of a model: masked for a rank, and restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.examples import all_equal, copy_lora_parameters
from helpers.formula import KINDS, is_close, output_and_gradients, random_input
from helpers.models import nested_layer, nested_llama

from matryoshka_lora import MatryoshkaError, Nesting
from matryoshka_lora.training.factors import ModelFactors

NESTING = Nesting((1, 2, 6), "none", 0.7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_masked_factors_compute_a_rank_and_its_gradients(kind: str, rank: int) -> None:
    nested = nested_layer(kind, NESTING, "lora")
    before = copy_lora_parameters(nested.adapter)
    q = (torch.arange(6) < rank).double()
    x = random_input(nested)
    expected, *expected_gradients = output_and_gradients(nested.expected(q * 0.7, x), nested, x)
    with nested.adapter.factors.masked(q):
        actual, *gradients = output_and_gradients(nested.layer(x), nested, x)
    assert is_close(actual, expected)
    for index, (gradient, expected_gradient) in enumerate(
        zip(gradients, expected_gradients, strict=True)
    ):
        columns: Any = [slice(rank), (slice(None), slice(rank)), ...][index]
        assert is_close(gradient[columns].contiguous(), expected_gradient[columns].contiguous())
    assert all_equal(before, copy_lora_parameters(nested.adapter))


@pytest.mark.parametrize("error_type", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_restored_after_an_exception(
    error_type: type[BaseException], dtype: torch.dtype
) -> None:
    adapter = nested_llama(NESTING, "lora", layers=1)
    adapter.model.to(dtype)
    before = copy_lora_parameters(adapter)
    factors = adapter.factors
    with pytest.raises(error_type), factors.masked(torch.full((6,), 0.3)):
        raise error_type
    assert all_equal(before, copy_lora_parameters(adapter))
    changed = {name: (A + 1, B - 1) for name, (A, B) in factors.copy().items()}

    def change_and_fail() -> None:
        with factors.restored(after_errors_only=True):
            factors.write(changed)
            assert not all_equal(before, copy_lora_parameters(adapter))
            raise error_type

    with pytest.raises(error_type):
        change_and_fail()
    assert all_equal(before, copy_lora_parameters(adapter))


def test_flattened_factors_are_an_error() -> None:
    """FSDP 1 has pieces of a flat parameter in their place."""
    piece = torch.zeros(8)
    with pytest.raises(MatryoshkaError, match="fsdp_version"):
        ModelFactors(torch.nn.Linear(2, 2), {"layer": (piece, piece)}).check_shapes()
