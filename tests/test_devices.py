"""Every tensor is on the device of the layer that computes with it: seen on the device ``meta``, so no card is needed.

Its tensors have a shape and no numbers.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from conftest import nested_layer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matryoshka_lora import Nesting
from matryoshka_lora.ops import low_rank_linear

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """An operation with tensors of two devices is an error, as on a card; copies, and numbers of a CPU, are none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if len({tensor.device for tensor in given}) > 1 and "copy" not in str(func):
            raise RuntimeError(f"{func} on two devices")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["matryoshka", "stratified", "dylora", "lora"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_a_layer_that_was_moved_computes_there(kind: str, rule: str) -> None:
    nested = nested_layer(kind, Nesting([1, 2, 4]), rule, dtype=torch.float32)
    x = oracle.KINDS[kind].batch(3)
    x = (x.float() if x.is_floating_point() else x).to(META)
    nested.adapter.draw(1, rows=3)
    nested.adapter.model.to(META)
    with OneDevice():
        y = nested.layer(x)
        assert y.device == META
        y.sum().backward()
        gradients = [factor.grad for factor in nested.factors]
        assert {gradient.device for gradient in gradients if gradient is not None} == {META}
        nested.adapter.model.eval()
        for rank in (1, 4):
            nested.adapter.set_rank(rank)
            assert nested.layer(x).device == META


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_a_diagonal_on_another_device_is_seen(shape: tuple[int, ...]) -> None:
    """So that the tests above can fail."""
    x, weight, A, B = (torch.empty(*size, device=META) for size in ((3, 5, 7), (6, 7), (4, 7), (6, 4)))
    with OneDevice(), pytest.raises(RuntimeError, match="two devices"):
        low_rank_linear(x, weight, None, A, B, torch.ones(shape))
