"""Losses of an adapter's prefixes and their gradients, which `learned` and `trained` descend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.reordering.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

Step = Sequence[tuple[Batch, int]]  # batches, each with the rank of its rows
Factors = dict[str, tuple[Tensor, Tensor]]  # A, shape (R, in), and B, shape (out, R), by layer


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
            # Checkpointing works in train mode only; submodules stay in eval mode.
            for module, _ in modes:
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


def loss_at(
    adapter: NestedAdapter,
    rows: Rows,
    step: Step,
    use: Callable[[Tensor], None] = lambda loss: None,
) -> float:
    """Return the mean loss, in nats, of the tokens with labels.

    Args:
        adapter: One in `descending`.
        rows: What computes the loss.
        step: The batches.
        use: Called with each batch's share of the loss, while the rank is set.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
    """
    weights = [int((batch["labels"] != -100).sum()) for batch, _ in step]
    total = 0.0
    for (batch, rank), weight in zip(step, weights, strict=True):
        q = torch.arange(adapter.nesting.max_rank) < rank
        with adapter.standing(q.double()):
            loss = rows.loss(batch) * (weight / sum(weights))
            use(loss)
        total += loss.item()
    if not math.isfinite(total):
        raise NotFiniteError(
            f"the loss is {total}: training diverged, or the base model's dtype is too narrow. "
            "Load it in bfloat16 or float32, or reorder by 'svd', which needs no loss"
        )
    return total


def gradients_at(adapter: NestedAdapter, rows: Rows, step: Step) -> tuple[Factors, float]:
    """Return the gradients of a step's loss by all factors, in float32 at least, and the loss.

    Args and Raises: as `loss_at`. A gradient that is not finite is a NotFiniteError too.
    """

    def backward(loss: Tensor) -> None:
        (loss * scale).backward()  # type: ignore[no-untyped-call]

    def gradient(parameter: Tensor) -> Tensor:
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return in_float32(found.flatten(1)) / scale

    # The first scale lifts small gradients over float16's underflow, the second serves where large
    # ones overflow. Powers of two do not change the digits of other dtypes.
    for number in (2.0**10, 1.0):
        scale = number
        adapter.model.zero_grad(set_to_none=True)
        loss = loss_at(adapter, rows, step, backward)
        found = {name: (gradient(A), gradient(B)) for name, (A, B) in adapter.parameters().items()}
        if torch.nn.utils.get_total_norm([g for pair in found.values() for g in pair]).isfinite():
            return found, loss
    raise NotFiniteError(
        "gradients are NaN or infinite: load the base model in bfloat16 or float32, or reorder by "
        "'svd', which needs none"
    )


def in_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_ranks(adapter: NestedAdapter) -> None:
    """Raise MatryoshkaError where there is no nested rank below R."""
    if len(adapter.nesting.ranks) == 1:
        raise MatryoshkaError(
            f"{adapter.nesting.max_rank} is the only nested rank, so data cannot order it: nest "
            "the adapter with smaller ranks too, or reorder it by 'svd'"
        )
