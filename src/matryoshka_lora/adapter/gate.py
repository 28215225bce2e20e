"""The diagonal that stands in a layer, on the layer's device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.ops import full_precision


@dataclass(eq=False)
class Gate:
    """A diagonal on the device of its layer.

    ``diagonal`` has shape (R,) or (rows, R). ``scale`` is a tensor of no dimensions that multiplies the output, where
    PEFT multiplies it too, so that a deployed prefix is PEFT's result to the last bit. Both are tensors, so that
    compiled code needs no recompilation when they change; they are replaced and never written in place, so that a
    backward pass still finds the values of its forward. With ``allow_fewer``, a batch may have fewer rows than the
    diagonal, as the last one of an epoch does. Without ``exact``, eval mode may compute in the activations' dtype.
    ``learn`` says which columns of B and rows of A receive a gradient; None means all.
    ``uniform`` says that all rows have the same diagonal, so that it does not matter which is which.
    """

    diagonal: Tensor
    scale: Tensor | None = None
    allow_fewer: bool = False
    exact: bool = True
    learn: Tensor | None = None
    uniform: bool = False
    _moved: Gate | None = field(default=None, init=False, repr=False)

    @classmethod
    def on(
        cls,
        device: torch.device,
        diagonal: Tensor,
        scale: Tensor | float | None = None,
        allow_fewer: bool = False,
        exact: bool = True,
        learn: Tensor | None = None,
    ) -> Gate:
        """One whose tensors are on ``device``; the arguments are its attributes."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        scaled = None if scale is None else torch.as_tensor(scale, dtype=dtype, device=device)
        learning = None if learn is None else learn.to(device)
        uniform = diagonal.ndim == 1 or bool((diagonal == diagonal[:1]).all())
        return cls(diagonal.to(device, dtype), scaled, allow_fewer, exact, learning, uniform)

    def at(self, device: torch.device) -> Gate:
        """Itself, or its one copy on the device that a layer was moved to after the gate was made."""
        if self.diagonal.device == device:
            return self
        if self._moved is None or self._moved.diagonal.device != device:
            self._moved = Gate.on(device, self.diagonal, self.scale, self.allow_fewer, self.exact, self.learn)
        return self._moved

    def apply(self, hidden: Tensor, spatial: int = 0) -> Tensor:
        """``hidden`` times the diagonal on its rank dimension, which ``spatial`` dimensions follow."""
        rank, nested_rank = hidden.shape[-1 - spatial], self.diagonal.shape[-1]
        if rank != nested_rank:
            raise MatryoshkaError(
                f"an adapter was nested at rank {nested_rank} and has rank {rank} now: PEFT has put another one in its "
                "place (hotswap_adapter). Load that one under a name of its own"
            )
        p = full_precision(self.for_rows(hidden.shape, spatial), hidden.dtype)
        rows = () if p.ndim == 1 else (hidden.shape[0], *(1,) * (hidden.ndim - 2 - spatial))
        return (hidden * p.view(*rows, -1, *(1,) * spatial)).to(hidden.dtype)

    def learning(self, weight: Tensor, dim: int) -> Tensor | None:
        """The weight with gradient in the learning rows or columns only; None where all of it learns."""
        if self.learn is None or not torch.is_grad_enabled():
            return None
        shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
        return torch.where(self.learn.view(shape), weight, weight.detach())

    def for_rows(self, shape: torch.Size, spatial: int = 0) -> Tensor:
        """The one diagonal of all rows, or one for each row of a batch of this shape.

        Beam search and several returned sequences repeat each row in place. Rows that were packed, or routed to
        experts, are no longer rows: they must not be served by accident.
        """
        diagonal, given = self.diagonal, self.diagonal.shape[0]
        rows = shape[0] if len(shape) >= 2 + spatial else 1  # else the input has no batch dimension
        if diagonal.ndim == 1 or rows == given == shape[0]:
            return diagonal
        if self.allow_fewer and rows < given and len(shape) >= 2 + spatial:
            return diagonal[:rows]
        has_tokens = len(shape) > 2 or spatial > 0
        # Without gradients only, as in `generate`: a wrong number of rows in a training batch must not pass for beams.
        if has_tokens and not torch.is_grad_enabled() and rows % given == 0:
            return diagonal.repeat_interleave(rows // given, dim=0)
        raise wrong_number(given, rows)


def wrong_number(given: int, rows: int) -> MatryoshkaError:
    """The error for a batch that has not as many rows as there are ranks."""
    return MatryoshkaError(
        f"{given} rows have a rank, but a layer got {rows} rows: give one rank for each row of the batch. "
        "Packed, padding-free or flattened batches have no rows left; turn packing and padding_free off"
    )
