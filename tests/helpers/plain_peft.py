"""Adapters that PEFT alone has written, and what PEFT alone computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from helpers.layers import best_matrix
from helpers.models import LINEAR_LAYERS, randomize, tiny_llama

IDS = torch.arange(3, 27).reshape(2, 12)


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer, each narrower or wider than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 12)
        self.convolution = nn.Conv1d(12, 10, 3)
        self.head = nn.Linear(10, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.convolution(self.embedding(input_ids % 11).mT)
        output: Tensor = self.head(hidden.mT)
        return output


def plain_adapter(folder: Path, base: Any = None, **changes: Any) -> Any:
    """Save an adapter with random factors, and return its model in eval mode."""
    options = {"r": 8, "lora_alpha": 8, "target_modules": LINEAR_LAYERS, **changes}
    model = get_peft_model(tiny_llama() if base is None else base, LoraConfig(**options))
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Return what a model computes in eval mode for fixed tokens, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        output = model.eval()(input_ids=ids.to(device))
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.cpu()


def by_peft(folder: Path, base: Callable[[], Any] = tiny_llama) -> Tensor:
    """Return the logits of the adapter in a folder, loaded by PEFT."""
    return logits(PeftModel.from_pretrained(base(), folder))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def is_close(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> bool:
    """Return whether no error exceeds a share of the largest expected entry."""
    error = (actual - expected).detach().abs().max()
    return bool(error <= tolerance * expected.detach().abs().max())


def updates(folder: Path, base: Callable[[], Any] = tiny_llama) -> dict[str, np.ndarray]:
    """Return what PEFT adds to each weight when it merges the adapter in a folder."""
    before = base().double().state_dict()
    model: Any = PeftModel.from_pretrained(base().double(), folder)
    after = model.merge_and_unload().state_dict()
    differences: dict[str, np.ndarray] = {}
    for name, weight in before.items():
        difference = (after[name] - weight).numpy()
        if difference.ndim > 1 and np.abs(difference).max() > 0:
            differences[name] = difference
    return differences


def best(update: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of a rank by NumPy's SVD of the dense update.

    Kernels of convolutions are flattened. In stacks of experts, the expert is the first dimension.
    """
    is_stack = update.ndim == 3 and update.shape[-1] > 3
    matrix = update if is_stack else update.reshape(len(update), -1)
    return best_matrix(matrix, rank).reshape(update.shape)
