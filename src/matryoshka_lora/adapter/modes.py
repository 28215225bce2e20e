"""Modes of a model's modules for some time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; each of its modules has its own mode again afterwards.

    Layers with 4-bit weights are in training mode meanwhile, which computes the same: in evaluation mode, bitsandbytes
    repacks them for the CPU at the first forward, and they cannot be merged into from then on.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = _is_4bit(module)
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None
