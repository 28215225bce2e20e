"""The state that the layers of a nested adapter share: settings, and the diagonals in use.

A layer computes ``W x + s B diag(q) A x``. Here s is PEFT's own ``scaling``, and q is the diagonal
p of the method divided by the scale of rank R: q = p / s. So PEFT's functions that change the
scaling keep their effect, and q = 1 is plain LoRA to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.nesting import Deploy, Nesting
from matryoshka_lora.peft.order import FactorOrder
from matryoshka_lora.rules import Rule
from matryoshka_lora.tensors import at_least_float32


class Diagonal:
    """A diagonal q, cached per device.

    A new q is a new object, so that a pending backward keeps the old values.

    Args:
        q: Shape (R,), or (R + k,), where the last k entries are for the components of the small
            adapter; or with a first dimension for one diagonal per row of a batch. float64.
        max_rank: R.

    Attributes:
        q: The entries of the components in use: of the main adapter, the small one, or both.
        uses_main: Whether the components of the main adapter are in use.
        uses_small: Whether the components of the small adapter are in use.
        is_one: Whether it is plain LoRA of rank R: ones for the main adapter's components.
        num_rows: The number of rows of the batch, or None for the rows of q. The last batch of
            an epoch may have fewer, and takes the first ones of q.
    """

    def __init__(self, q: Tensor, max_rank: int) -> None:
        self.uses_small = bool(q[..., max_rank:].any())
        self.uses_main = not self.uses_small or bool(q[..., :max_rank].any())
        q = q[..., 0 if self.uses_main else max_rank : None if self.uses_small else max_rank]
        self.q = q
        self.num_rows: int | None = None  # set by `ForwardCheck`
        self.is_one = not self.uses_small and bool((q == 1).all())
        self.is_checked = False  # by `ForwardCheck`
        self._by_device = {q.device: q}

    def to(self, device: torch.device) -> Tensor:
        """Return q on a device."""
        if device not in self._by_device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._by_device[device] = self.q.to(device, dtype)
        return self._by_device[device]

    def for_batch(self, shape: torch.Size, device: torch.device, spatial_dims: int = 0) -> Tensor:
        """Return q for an activation.

        Args:
            shape: The activation's shape, (rows, ..., components, *spatial).
            spatial_dims: The number of dimensions after the components, as in convolutions.

        Returns:
            Shape (components,), or (rows, components).

        Raises:
            MatryoshkaError: q has another number of rows.
        """
        q = self.to(device)
        if q.ndim == 1:
            return q
        q = q[: self.num_rows]
        # With fewer dimensions, rows and tokens are flattened into one.
        if len(shape) >= max(3, 2 + spatial_dims) and shape[0] == len(q):
            return q
        raise MatryoshkaError(
            f"Got ranks for {len(q)} rows, but a layer got an input of shape "
            f"{list(shape)}. Pass one rank for each row of the batch, and in generate() for each "
            "beam or sequence of a row. In packed, flattened or expert-routed batches, and in "
            "layers of relative positions, rows have no rank of their own: use set_rank() for "
            "them, or a rule with one diagonal for the whole batch."
        )

    def multiply(self, hidden: Tensor, spatial_dims: int = 0) -> Tensor:
        """Return an activation of shape (rows, ..., components, *spatial) times q."""
        # torch.compile uses one graph for all ranks. This shortcut would need a second one.
        if not torch.compiler.is_compiling() and self.is_one and self.q.ndim == 1:
            return hidden
        q = self.for_batch(hidden.shape, hidden.device, spatial_dims)
        q = at_least_float32(q, hidden.dtype)
        spatial = (1,) * spatial_dims
        if q.ndim == 1:
            q = q.view(-1, *spatial)
        else:
            token_dims = (1,) * (hidden.ndim - 2 - spatial_dims)
            q = q.view(len(hidden), *token_dims, -1, *spatial)
        return (hidden * q).to(hidden.dtype)


@dataclass
class NestingState:
    """The settings of one nested adapter, shared by its layers.

    Attributes:
        nesting: The nested ranks and their scales.
        rule: The training rule; ``lora`` once the factors are ordered.
        order: The order of the factors.
        seed: The seed of the rule's random numbers.
        small_rank: The rank k of the small adapter, whose prefixes are the ranks up to k; 0 if
            there is none.
        deploy: ``"paper"`` drops P after training; ``"reordered"`` keeps P, folded into B.
        max_rank_layers: The classes of PEFT's layers that compute rank R only; empty if there are
            none.
        weighted_values: If the order is ``"weighted"``, the weighted singular values of each layer
            by its name, shape (R,).
        rank: The rank in eval mode, from 0 to R.
        train_diagonal: The diagonal in train mode; None until the rule has drawn one.
        eval_diagonal: The diagonal in eval mode and for merging.
        overrides: Stack of diagonals that take precedence; the last one applies.
    """

    nesting: Nesting
    rule: Rule
    order: FactorOrder
    seed: int = 0
    deploy: Deploy = "reordered"
    max_rank_layers: str = ""
    small_rank: int = field(init=False, default=0)
    weighted_values: dict[str, Float64Array] = field(init=False, default_factory=dict)
    rank: int = field(init=False)
    train_diagonal: Diagonal | None = field(init=False, default=None)
    eval_diagonal: Diagonal = field(init=False)
    overrides: list[Diagonal] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set rank R in eval mode and, for a fixed rule, its diagonal in train mode."""
        self.train_diagonal = self.diagonal(self.trained_q()) if self.rule.fixed else None
        self.set_rank(self.nesting.max_rank)

    def set_rank(self, rank: int) -> None:
        """Set the rank in eval mode; 0 switches the update off."""
        self.eval_diagonal = self.diagonal(self.deployed_q(rank))
        self.rank = rank

    def diagonal(self, q: Tensor) -> Diagonal:
        """Return a diagonal of the adapter; see `Diagonal`.

        Raises:
            MatryoshkaError: It is not plain LoRA of rank R, and a layer computes nothing else.
        """
        diagonal = Diagonal(q, self.nesting.max_rank)
        if self.max_rank_layers and not diagonal.is_one:
            raise MatryoshkaError(
                f"PEFT's layers {self.max_rank_layers} compute rank R only. Export the rank, and "
                "load it with PEFT; or load the base model in another quantization, such as "
                "bitsandbytes."
            )
        return diagonal

    def check_order(self) -> None:
        """Raise MatryoshkaError if the rank in eval mode needs an order that has ended."""
        if self.order.kind is None or self.rank in (0, self.nesting.max_rank):
            return
        if self.order.current(quick=True) is None:
            raise MatryoshkaError(
                f"The factors of adapter {self.order.adapter!r} have changed since "
                f"set_rank({self.rank}), so rank {self.rank} is no longer available. Call "
                f"reorder() and set_rank({self.rank})."
            )

    def sample_q(self, step: int, batch_size: int = 1) -> Tensor:
        """Return the rule's q for an optimizer step, shape (R,) or (batch_size, R)."""
        p = self.rule.sample(self.nesting, self.seed, step, batch_size)
        return torch.from_numpy(p / self.nesting.scale)

    def trained_q(self) -> Tensor:
        """Return the q of rank R as trained, shape (R,)."""
        if self.rule.fixed:
            return self.sample_q(step=0)
        return torch.ones(self.nesting.max_rank, dtype=torch.float64)

    def deployed_q(self, rank: int) -> Tensor:
        """Return the q that deploys a rank; its entries from ``rank`` on are 0.

        The shape is (R,), or (R + k,) for a rank of the small adapter, whose first entries are 0.
        """
        if 0 < rank <= self.small_rank:
            unused = torch.zeros(self.nesting.max_rank, dtype=torch.float64)
            return torch.cat([unused, (torch.arange(self.small_rank) < rank).double()])
        # Each rank keeps its own scale if P is dropped, or if a random rule trained it and the
        # factors are unordered.
        has_own_scale = self.deploy == "paper" or not (self.order.kind or self.rule.fixed)
        if rank > 0 and has_own_scale:
            return torch.from_numpy(self.nesting.prefix(rank) / self.nesting.scale)
        return self.trained_q() * (torch.arange(self.nesting.max_rank) < rank)

    def state_dict_q(self) -> Tensor | None:
        """Return the q that state dicts fold into B, or None if there is nothing to fold.

        PEFT and the Trainer save state dicts and read them back. A state dict holds plain LoRA with
        the function of eval mode at rank R.
        """
        q = self.trained_q()
        if self.deploy == "paper" or bool((q == 1).all()):
            return None
        return q

    def active_diagonal(self, training: bool) -> Diagonal:
        """Return the diagonal that applies now.

        Raises:
            MatryoshkaError: The rule has drawn nothing yet.
        """
        if self.overrides:
            return self.overrides[-1]
        if not training:
            return self.eval_diagonal
        if self.train_diagonal is None:
            raise MatryoshkaError(
                f"No diagonal was drawn for this step, as rule {self.rule.name!r} requires. Add "
                "adapter.callback() to the Trainer, or call adapter.draw(step) before each step."
            )
        return self.train_diagonal
