"""The processes that train one adapter, each on its share of the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def num_processes() -> int:
    """Return the number of processes of torch.distributed; 1 without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def process_index() -> int:
    """Return the index of this process, from 0."""
    return torch.distributed.get_rank() if num_processes() > 1 else 0


def round_up_to_processes(number: int) -> int:
    """Return the smallest multiple of the number of processes that is not below a number.

    The loss of a Trainer may communicate, so each process must compute as many losses, of as many
    examples.
    """
    return math.ceil(number / num_processes()) * num_processes()


def share_of_process(items: Sequence[Item]) -> Sequence[Item]:
    """Return the items of this process: every n-th of n processes."""
    return items[process_index() :: num_processes()]


def min_over_processes(value: int, device: torch.device) -> int:
    """Return the minimum of a value over all processes."""
    if num_processes() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
    return int(tensor.item())


def sum_over_processes(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the sum of each tensor over all processes, the same bits in each process.

    Args:
        tensors: On any device, of the same shapes in each process.
        device: A device whose tensors the backend sends; NCCL needs a GPU's.
    """
    if num_processes() == 1:
        return list(tensors)
    flat = torch.cat([tensor.to(device).flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    sums = torch.split(flat, [tensor.numel() for tensor in tensors])
    pairs = zip(sums, tensors, strict=True)
    return [values.view(tensor.shape).to(tensor) for values, tensor in pairs]
