"""Steps down the loss of an adapter's prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

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


SCALES = (2.0**10, 1.0)
"""Of the loss, so that small gradients pass through float16; the second where large ones do not. Powers of two leave
other dtypes' gradients as they are."""


def gradients_at(adapter: AdapterInModel, parts: Sequence[Part], ranks: Sequence[int]) -> Factors:
    """The gradients of a step's loss by all factors; see `loss_at`.

    Raises:
        NotFiniteError: They are NaN or infinity, or the loss is.
        MatryoshkaError: No row has a token to learn.
    """
    for scale in SCALES:
        gradients = _scaled_gradients_at(adapter, parts, ranks, scale)
        if all(bool(gradient.isfinite().all()) for pair in gradients.values() for gradient in pair):
            return {name: (A / scale, B / scale) for name, (A, B) in gradients.items()}
    raise NotFiniteError("gradients are NaN or infinity: take a base model in bf16 or fp32, or a lower learning rate")


def _scaled_gradients_at(adapter: AdapterInModel, parts: Sequence[Part], ranks: Sequence[int], scale: float) -> Factors:
    loss_at(adapter, parts, ranks, lambda loss: (loss * scale).backward())  # type: ignore[no-untyped-call]
    gradients = adapter.gradients()
    adapter.model.zero_grad(set_to_none=True)
    if _place(parts)[1] > 1:
        each = [gradient for pair in gradients.values() for gradient in pair]
        whole = _sum_over_processes(torch.cat([gradient.flatten() for gradient in each]))
        parted = iter(torch.split(whole, [gradient.numel() for gradient in each]))
        gradients = {name: (next(parted).view_as(A), next(parted).view_as(B)) for name, (A, B) in gradients.items()}
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
        use: Gets the share in the loss of each part that this process computes, while the ranks of its rows stand.

    Returns:
        It, of all processes.

    Raises:
        NotFiniteError: The loss is NaN or infinity.
        MatryoshkaError: No row has a token to learn.
    """
    diagonals = {rank: adapter.state.diagonal(rank) for rank in set(ranks)}
    weight, total = sum(part.weight for part in parts), 0.0
    if not weight:
        raise MatryoshkaError(
            f"none of the {len(ranks)} rows of a step has a token to learn: leave out rows without labels"
        )
    here, processes = _place(parts)
    rest = iter(ranks)
    with_ranks = [(part, list(islice(rest, part.rows))) for part in parts]
    learned = [(part, its) for part, its in with_ranks if part.weight]  # the mean over no token may be NaN
    # Every process passes through the model as often as the others, for a Trainer's loss may wait for all of them.
    for number in range(here, -(-len(learned) // processes) * processes, processes):
        part, mine = learned[number % len(learned)]
        alike = len(set(mine)) == 1
        diagonal = diagonals[mine[0]] if alike else torch.stack([diagonals[rank] for rank in mine])
        with adapter.standing(diagonal, exact=False):
            loss = part.loss() * (part.weight / weight)
            if number < len(learned):
                use(loss)
                total += loss.item()
    if processes > 1:
        total = _sum_over_processes(torch.tensor([total], device=adapter.parameters()[0].device)).item()
    if not math.isfinite(total):
        raise NotFiniteError(f"the loss is {total}: the model computes NaN or infinity")
    return total


def teaches(parts: Sequence[Part]) -> bool:
    """Whether the rows of a step have a token to learn."""
    return any(part.weight for part in parts)


def _place(parts: Sequence[Part]) -> tuple[int, int]:
    """Which of the processes that share a step this one is, and how many they are."""
    if any(part.shared for part in parts):
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _sum_over_processes(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, but for the modules that save memory in training mode."""
    shares: list[tuple[nn.Module, str, float]] = []
    with evaluation_mode(model):
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # its own, not that of the modules in it
                # Some of them drop out themselves, by a share that is a number of theirs.
                shares += [(module, name, value) for name, value in vars(module).items() if _is_dropout(name, value)]
        try:
            for module, name, _ in shares:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, value in shares:
                setattr(module, name, value)


def _is_dropout(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, float)
