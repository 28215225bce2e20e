"""Steps down the loss of an adapter's prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.loaded import evaluation_mode
from matryoshka_lora.reordering.model import AdapterInModel, Factors, Part


@contextmanager
def learning(adapter: AdapterInModel) -> Iterator[None]:
    """A context in which factors have gradients and dropout is off.

    Frozen factors are frozen again afterwards. After an error, the factors are those of before.
    """
    start = adapter.factors()
    frozen = [parameter for parameter in adapter.parameters() if not parameter.requires_grad]
    adapter.model.zero_grad(set_to_none=True)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with _without_dropout(adapter.model):
            yield
    except BaseException:
        adapter.put_factors(start)
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradients_at(adapter: AdapterInModel, parts: Sequence[Part], ranks: Sequence[int]) -> Factors:
    """The gradients of a step's loss by all factors; see `loss_at`."""
    loss_at(adapter, parts, ranks, torch.Tensor.backward)
    gradients = adapter.gradients()
    adapter.model.zero_grad(set_to_none=True)
    return gradients


def loss_at(
    adapter: AdapterInModel,
    parts: Sequence[Part],
    ranks: Sequence[int],
    use: Callable[[Tensor], object] = lambda loss: None,
) -> float:
    """The loss of a step.

    Args:
        adapter: In the mode that it is to be in.
        parts: The rows.
        ranks: One for each row; all alike where rows are no longer rows.
        use: Gets the share of each part in the loss, while the ranks of its rows stand.

    Raises:
        NotFiniteError: The loss is NaN or infinity.
        MatryoshkaError: No row has a token to learn.
    """
    diagonals = {rank: adapter.state.diagonal(rank) for rank in set(ranks)}
    weight, total, begin = sum(part.weight for part in parts), 0.0, 0
    if not weight:
        raise MatryoshkaError(
            f"none of the {len(ranks)} rows of a step has a token to learn: leave out rows without labels"
        )
    for part in parts:
        mine, begin = ranks[begin : begin + part.rows], begin + part.rows
        if not part.weight:
            continue  # the mean over no token may be NaN
        diagonal = torch.stack([diagonals[rank] for rank in mine])
        with adapter.standing(diagonal if adapter.keeps_rows else diagonal[0], exact=False):
            loss = part.loss() * (part.weight / weight)
            if not bool(loss.isfinite()):
                raise NotFiniteError(f"the loss is {loss.item()}: the model computes NaN or infinity")
            use(loss)
        total += loss.item()
    return total


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, but for the modules that save memory in training mode."""
    with evaluation_mode(model):
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # its own, not that of the modules in it
        yield
