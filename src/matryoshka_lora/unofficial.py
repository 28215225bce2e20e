"""The private parts of torch, PEFT and transformers that this package uses, each with the reason.

They may change in any version. Seen in torch 2.13, PEFT 0.18 and 0.21, transformers 5.24. tests/test_unofficial.py says
which of them a new version has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def backward_node() -> int | None:
    """The number of autograd's node that runs now; -1 where it has none, None outside a backward pass.

    Gradient checkpointing runs a layer's forward inside backward, and nothing else tells.
    """
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def next_node() -> int:
    """The number of the next node that autograd makes: they are numbered in the order of the forward pass."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def saves_freely() -> bool:
    """Whether no hooks on saved tensors are set. Hooks mean checkpointing or offloading, which want little saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def kept_product(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Two tensors whose product is x and which autograd keeps for it, or None twice.

    Where autograd keeps both already, x need not be kept beside them.
    """
    node: Any = x.grad_fn
    if type(node).__name__ != "MulBackward0":
        return None, None
    saved = (node._raw_saved_self, node._raw_saved_other)
    # What a hook has packed is for the backward pass to unpack. A torch that does not tell counts as one with hooks.
    if any(getattr(tensor, "unpack_hook", True) is not None for tensor in saved):
        return None, None
    try:
        left, right = node._saved_self, node._saved_other
    except RuntimeError:  # freed by a backward pass through x, or changed in place: A and B can do without them
        return None, None
    alike = all(t is not None and (t.shape, t.dtype) == (x.shape, x.dtype) for t in (left, right))
    return (left, right) if alike else (None, None)


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in another shape, which is no view in autograd's eyes: a model may change it in place."""
    output: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return output


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called around a module's forward or backward: sharded modules gather their weights so."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_conv(module: nn.Module) -> bool:
    """Whether a LoRA layer is a convolution: PEFT's common class of them has no public name."""
    return any(kind.__name__ == "_ConvNd" and kind.__module__.startswith("peft.") for kind in type(module).__mro__)


@contextmanager
def only_active(module: Any, adapter: str) -> Iterator[None]:
    """A context in which one LoRA layer has one active adapter; PEFT's own switch is for the whole model."""
    active, disabled = module._active_adapter, module._disable_adapters
    module._active_adapter, module._disable_adapters = [adapter], False
    try:
        yield
    finally:
        module._active_adapter, module._disable_adapters = active, disabled


def embedded(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a LoRA layer's embedding makes of tokens with another weight, with its padding and its norms."""
    output: Tensor = module._embed(x, weight)
    return output


def embed_scale(module: Any) -> Tensor | None:
    """What an embedding multiplies its output with, as Gemma's does; None if with nothing."""
    scale: Tensor | None = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
    return scale


def prepared(trainer: Any, batch: Any) -> Any:
    """A batch as a Trainer gives it to its model."""
    return trainer._prepare_inputs(batch)


def training_collator(trainer: Any) -> Any:
    """A Trainer's collator as its training uses it: without the columns that its model does not take, such as text."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def load_best_model(trainer: Any) -> None:
    """What a Trainer does after its last step where ``load_best_model_at_end`` is set."""
    trainer._load_best_model()
