"""Describe a LoRA file without its base model."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka_lora.algebra.factors import relative_errors
from matryoshka_lora.lora_file.atomic import PathLike
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.open import open_lora
from matryoshka_lora.progress import progress_bar, single_threaded


@dataclass(frozen=True)
class LoraInfo:
    """The result of `info`.

    Attributes:
        lora: The opened file: its layers, ranks, order and other tensors.
        sizes: The size in bytes of the weights file that `export` writes at each nested rank.
        errors: The relative error of each nested rank: the norm of what it misses over the norm of
            the update.
    """

    lora: LoraFile
    sizes: dict[int, int]
    errors: dict[int, float]


def info(path: PathLike, *, revision: str | None = None) -> LoraInfo:
    """Return what a LoRA holds, and the size and error of each nested rank.

    Args:
        path: A PEFT folder, a single ``.safetensors`` file, or the Hub id of either.
        revision: Branch, tag or commit on the Hugging Face Hub.

    Raises:
        MatryoshkaError: The path is not a LoRA, is damaged, or cannot be truncated.
        NotFiniteError: A factor is NaN or infinite.
    """
    lora = open_lora(path, revision)
    with single_threaded():
        squared_errors = {
            layer.name: lora.squared_errors(layer)
            for layer in progress_bar(lora.layers, "computing errors")
        }
    sizes = {rank: lora.plan(rank).file_size for rank in lora.ranks}
    return LoraInfo(lora, sizes, relative_errors(squared_errors, lora.ranks))
