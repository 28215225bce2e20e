"""ComfyUI's progress bar and its Cancel button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import comfy.model_management
import comfy.utils

import matryoshka_lora as ml

T = TypeVar("T")


def with_progress(loras: Sequence[ml.Lora], passes: int) -> list[ml.Lora]:
    """Return LoRAs that move the progress bar of the node, and obey Cancel, at each layer.

    Cancel is an exception, after which the package leaves no file.

    Args:
        loras: The LoRAs that a node reads.
        passes: How often it reads each layer.
    """
    bar = comfy.utils.ProgressBar(passes * sum(len(lora.layers) for lora in loras))

    def watch(read: Callable[[], T]) -> Callable[[], T]:
        def watched() -> T:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)
            return read()

        return watched

    return [
        replace(
            lora,
            layers=tuple(
                replace(
                    layer,
                    read=watch(layer.read),
                    read_svd=layer.read_svd and watch(layer.read_svd),
                )
                for layer in lora.layers
            ),
        )
        for lora in loras
    ]
