"""Adapters that know nothing of this package, and what plain PEFT makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import LINEAR_LAYERS, randomize, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

IDS = torch.arange(3, 27).reshape(2, 12)
STYLES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "down and up": (".down.weight", ".up.weight"),
    "older": (".lora.down.weight", ".lora.up.weight"),  # alpha is beside the module's name
}


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
    """Write an adapter with random factors by PEFT itself; return its model."""
    options = {"r": 8, "lora_alpha": 8, "target_modules": LINEAR_LAYERS, **changes}
    model = get_peft_model(tiny_llama() if base is None else base, LoraConfig(**options))
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> Tensor:
    """Return what a model computes of fixed tokens."""
    with torch.no_grad():
        output = model.eval()(input_ids=IDS)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def by_peft(folder: Path, base: Callable[[], Any] = tiny_llama) -> Tensor:
    """Return what plain PEFT computes with the adapter in a folder."""
    return logits(PeftModel.from_pretrained(base(), folder))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of a difference over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def updates(folder: Path, base: Callable[[], Any] = tiny_llama) -> dict[str, np.ndarray]:
    """Return what plain PEFT adds to each weight when it merges the adapter in a folder."""
    before = base().double().state_dict()
    model: Any = PeftModel.from_pretrained(base().double(), folder)
    after = model.merge_and_unload().state_dict()
    found = {name: (after[name] - before[name]).numpy() for name in before}
    return {name: each for name, each in found.items() if each.ndim > 1 and np.abs(each).max() > 0}


def best(update: np.ndarray, rank: int) -> np.ndarray:
    """Return NumPy's best matrix of a rank; kernels are flattened, experts stand in front."""
    is_stack = update.ndim == 3 and update.shape[-1] > 3
    matrix = update if is_stack else update.reshape(len(update), -1)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    found: np.ndarray = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return found.reshape(update.shape)


def file_updates(file: Path) -> dict[str, np.ndarray]:
    """Return the dense updates of a single file by the pairs' names, scaled as its readers do."""
    state, found = load_file(file), {}
    for key in state:
        fits = [pair for pair in STYLES.values() if key.endswith(pair[0])]
        if fits:
            down, up = max(fits, key=lambda pair: len(pair[0]))
            name = key.removesuffix(down)
            A, B = state[key].double().flatten(1), state[name + up].double().flatten(1)
            alpha = state.get(f"{name}.alpha", torch.tensor(float(len(A))))
            found[name] = (B @ A * float(alpha) / len(A)).numpy()
    return found
