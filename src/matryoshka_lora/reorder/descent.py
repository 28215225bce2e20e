"""Losses of an adapter's prefixes and their gradients, which `learned` and `trained` descend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.reorder.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A of shape (R, in) and B of shape (out, R) by the layer's name."""


@contextmanager
def descending(adapter: NestedAdapter) -> Iterator[None]:
    """Give gradients to the factors alone, and switch dropout off, until the context ends.

    Then modes, ``requires_grad`` and torch's random state are as before, and no parameter has a
    gradient. After an error, a KeyboardInterrupt included, the factors are as before too.
    """
    model, start = adapter.model, adapter.factors()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for (
                module,
                _,
            ) in modes:  # a layer checkpoints in train mode alone, its parts stay in eval
                module.training = bool(vars(module).get("gradient_checkpointing"))
            model.requires_grad_(False)
            for pair in adapter.parameters().values():
                for parameter in pair:
                    parameter.requires_grad_()
            yield
        except BaseException:
            adapter.put_factors(start)
            raise
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training


def gradients_at(
    adapter: NestedAdapter, rows: Rows, batches: Sequence[Batch], q: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return the gradients of a step's loss by all factors, in float32 at least, and the loss.

    Args and Raises: as `loss_at`; NotFiniteError also where a gradient is not finite.
    """
    parameters = adapter.parameters()

    def gradient(parameter: Tensor) -> Tensor:
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return in_float32(found.flatten(1)) / scale

    # The first scale lifts small gradients over float16's underflow, the second serves where large
    # ones overflow. Powers of two do not change the digits of other dtypes.
    for scale in (2.0**10, 1.0):
        adapter.model.zero_grad(set_to_none=True)
        loss = loss_at(adapter, rows, batches, q, lambda part, s=scale: (part * s).backward())
        found = {name: (gradient(A), gradient(B)) for name, (A, B) in parameters.items()}
        every = [gradient for pair in found.values() for gradient in pair]
        if torch.nn.utils.get_total_norm(every).isfinite():
            return found, loss
    raise NotFiniteError(
        "gradients are NaN or infinite: load the base model in bfloat16 or float32, or reorder by "
        "'svd', which needs none"
    )


def loss_at(
    adapter: NestedAdapter,
    rows: Rows,
    batches: Sequence[Batch],
    q: Tensor,
    use: Callable[[Tensor], object] = lambda part: None,
) -> float:
    """Return the mean loss in nats of the tokens with labels.

    Args:
        adapter: In `descending`.
        rows: What the batches are from.
        batches: The rows of one step.
        q: What stands between the factors, shape (R,), or (rows, R) for the rows of all batches.
        use: Gets each batch's share in the loss, while q stands.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
        MatryoshkaError: There is no batch.
    """
    if not batches:
        raise MatryoshkaError(
            "no row has a token with a label to learn or to judge by: check the labels"
        )
    weights = [int((batch["labels"] != -100).sum()) for batch in batches]
    total, first = 0.0, 0
    for batch, weight in zip(batches, weights, strict=True):
        last = first + len(batch["labels"])
        with adapter.standing(q if q.ndim == 1 else q[first:last]):
            loss = rows.loss(batch) * (weight / sum(weights))
            use(loss)
        total, first = total + loss.item(), last
    if not math.isfinite(total):
        raise NotFiniteError(
            f"the loss is {total}: training diverged, or the base model's dtype is too narrow. Load it "
            "in bfloat16 or float32, or reorder by 'svd', which needs no loss"
        )
    return total


def prefix(adapter: NestedAdapter, rank: int) -> Tensor:
    """Return q of a rank: 1 on the first entries and 0 after, shape (R,)."""
    return (torch.arange(adapter.nesting.max_rank) < rank).double()


def in_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_ranks(adapter: NestedAdapter) -> None:
    """Raise MatryoshkaError where there is no nested rank below R."""
    if len(adapter.nesting.ranks) == 1:
        raise MatryoshkaError(
            f"the adapter has the one nested rank {adapter.nesting.max_rank}, so data cannot order it: "
            "nest it with smaller ranks too, or reorder it by 'svd'"
        )
