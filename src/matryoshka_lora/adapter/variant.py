"""One nested layer: p between the factors of a PEFT LoRA layer, through PEFT's own slot for LoRA variants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_factors, to_weight
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.state import State, split


class Gate(NamedTuple):
    """A diagonal on the device of its layer.

    ``diagonal`` has shape (R,) or (rows, R). ``scale`` is a tensor of no dimensions that multiplies the output, where
    PEFT multiplies it too, so that a deployed prefix is PEFT's result to the last bit. Both are tensors, so that
    compiled code needs no recompilation when they change; they are replaced and never written in place, so that a
    backward pass still finds the values of its forward. With ``allow_fewer``, a batch may have fewer rows than the
    diagonal, as the last one of an epoch does. Without ``exact``, eval mode may compute in the activations' dtype.
    """

    diagonal: Tensor
    scale: Tensor | None = None
    allow_fewer: bool = False
    exact: bool = True

    @classmethod
    def on(
        cls,
        device: torch.device,
        diagonal: Tensor,
        scale: float | None = None,
        allow_fewer: bool = False,
        exact: bool = True,
    ) -> Gate:
        """One whose tensors are on ``device``; the arguments are its attributes."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        scaled = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)
        return cls(diagonal.to(device, dtype), scaled, allow_fewer, exact)

    def apply(self, hidden: Tensor, spatial: int = 0) -> Tensor:
        """``hidden`` times the diagonal on its rank dimension, which ``spatial`` dimensions follow."""
        tail = (1,) * spatial
        if self.diagonal.ndim == 1:
            return hidden * self.diagonal.to(hidden.device, hidden.dtype).view(-1, *tail)
        between = (1,) * (hidden.ndim - 2 - spatial)
        rows = self.for_rows(hidden.shape, spatial).to(hidden.device, hidden.dtype)
        return hidden * rows.view(hidden.shape[0], *between, -1, *tail)

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
        raise MatryoshkaError(
            f"{given} rows have a rank, but a layer got {rows} rows: give one rank for each row of the batch. "
            "Packed, padding-free or flattened batches have no rows left; turn packing and padding_free off"
        )


class NestedVariant(LoraVariant):
    """Computes ``base(x) + B diag(p) A x`` in one LoRA layer, for one adapter.

    Attributes:
        state: Shared by all layers of the adapter.
        training: The rule's draw for this optimizer step; None until one was made.
        learn: Which columns of B and rows of A learn at this step; None means all.
        deployed: The chosen rank, used in eval mode and for merging.
        rank: The rank of `deployed`.
        override: Stands before both while a `rows` context is open.
    """

    def __init__(self, state: State, module: LoraLayer, adapter: str) -> None:
        self.state = state
        self.device = get_factors(module, adapter)[0].device
        # PEFT's set_scale and scale_layer change module.scaling; their effect is the ratio to what was attached.
        self.attached_scaling = float(module.scaling[adapter])
        self.training: Gate | None = None
        self.learn: Tensor | None = None
        self.override: Gate | None = None
        self.deployed: Gate
        self.rank: int
        # Since which node of autograd's graph which gates applied.
        self._history: list[tuple[int, tuple[Gate | None, Gate | None]]] = []
        self.set_rank(state.nesting.max_rank)
        self._merged: tuple[Gate, float] | None = None

    def set_rank(self, rank: int) -> None:
        self.rank = rank
        self.deployed = Gate.on(self.device, *split(self.state.diagonal(rank)))
        self._remember()

    def gate(self, training: bool) -> Gate:
        """The diagonal that applies now."""
        if self.override is not None:
            return self.override
        if not training:
            return self.deployed
        if self.training is None:
            raise MatryoshkaError(
                f"rule {self.state.rule.name!r} draws ranks for every optimizer step and nothing was drawn: give "
                "adapter.callback() to the Trainer, or call adapter.draw(step) before each step of your own loop"
            )
        return self.training

    def checked_gate(self, module: nn.Module) -> Gate:
        """The gate for a forward of the layer that has this variant."""
        gate = self.gate(module.training)
        self._check_recomputation(module, gate)
        return gate

    def ratio(self, module: LoraLayer, adapter: str) -> float:
        """What PEFT's scaling functions have multiplied the adapter by since it was attached."""
        return float(module.scaling[adapter]) / self.attached_scaling

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        gate = self.checked_gate(module)
        is_embedding = active_adapter in module.lora_embedding_A
        update = (self._embedded if is_embedding else self._update)(module, active_adapter, x, gate)
        if gate.scale is not None:
            update = update * gate.scale
        ratio = self.ratio(module, active_adapter)
        if ratio != 1:
            update = update * ratio
        # Gemma's embeddings multiply their output; the update belongs inside that factor.
        embed_scale = module._get_embed_scale() if is_embedding and hasattr(module, "_get_embed_scale") else None
        return result + (update if embed_scale is None else update * embed_scale.to(update.dtype))

    def _update(self, module: Any, adapter: str, x: Tensor, gate: Gate) -> Tensor:
        lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
        spatial = lora_A.weight.ndim - 2
        hidden = _call(lora_A, module.lora_dropout[adapter](x), self._learning(lora_A.weight, dim=0))
        return _call(lora_B, gate.apply(hidden, spatial), self._learning(lora_B.weight, dim=1))

    def _embedded(self, module: Any, adapter: str, x: Tensor, gate: Gate) -> Tensor:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        learning_A, learning_B = self._learning(A, dim=0), self._learning(B, dim=1)
        hidden = module._embed(x, (A if learning_A is None else learning_A).T)
        return gate.apply(hidden) @ (B if learning_B is None else learning_B).T

    def _learning(self, weight: Tensor, dim: int) -> Tensor | None:
        """The weight with gradient in the learning rows or columns only; None where all of it learns."""
        if self.learn is None or not torch.is_grad_enabled():
            return None
        shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
        return torch.where(self.learn.to(weight.device).view(shape), weight, weight.detach())

    def _check_recomputation(self, module: nn.Module, gate: Gate) -> None:
        """Gradient checkpointing runs the forward again inside backward: it must see the same diagonal."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            return
        node = torch._C._current_autograd_node()
        then = self._gates_at(-1 if node is None else node._sequence_nr())
        if then is not None and then[module.training] is not gate:
            raise MatryoshkaError(
                "gradient checkpointing recomputes a layer with other ranks than its forward had: "
                "call backward() inside the same `with adapter.rows(...)` as the forward"
            )

    def _gates_at(self, number: int) -> tuple[Gate | None, Gate | None] | None:
        """The gates of eval and of training mode that applied when autograd made its node of that number."""
        return next((gates for since, gates in reversed(self._history) if since <= number), None)

    def _remember(self) -> None:
        gates = (self.override or self.deployed, self.override or self.training)
        self._history = [*self._history[-31:], (_next_number(), gates)]

    def begin_step(self, gate: Gate, learn: Tensor | None) -> None:
        """Train with this gate from now on."""
        self.training, self.learn = gate, learn
        self._remember()

    def stand_before(self, gate: Gate | None) -> None:
        """Let a gate stand before the rule's and the chosen rank's; None ends it."""
        self.override = gate
        self._remember()

    def delta(self, module: LoraLayer, adapter: str, gate: Gate, ratio: float | None = None) -> Tensor:
        """``B diag(p) A`` in the shape of the base layer's weight, in the dtype of the factors."""
        A, B = get_factors(module, adapter)
        work = torch.promote_types(A.dtype, torch.float32)  # half precision products are slow and coarse on CPUs
        ratio = self.ratio(module, adapter) if ratio is None else ratio
        scale = ratio * (1.0 if gate.scale is None else gate.scale.item())
        product = (B.to(work) * gate.diagonal.to(B.device, work)) @ A.to(work) * scale
        return to_weight(module, product).to(A.dtype)

    def merged_delta(self, module: LoraLayer, adapter: str, again: bool = False) -> Tensor:
        """What merging adds; ``again`` gives what was added, though rank or scale may have changed since."""
        if not again or self._merged is None:
            self._merged = (self.deployed, self.ratio(module, adapter))
        return self.delta(module, adapter, *self._merged)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        check_mergeable(module)
        return _add(module, orig_weight, self.merged_delta(module, active_adapter))

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        check_mergeable(module)
        delta, self._merged = self.merged_delta(module, active_adapter, again=True), None
        return _add(module, orig_weight, -delta)


def _next_number() -> int:
    """Of the next node that autograd makes: they are numbered in the order of the forward pass."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def check_mergeable(module: LoraLayer) -> None:
    """Raises MatryoshkaError where the base weight is in a layout that PEFT would misread."""
    state = getattr(getattr(module.get_base_layer(), "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise MatryoshkaError(
            "bitsandbytes has repacked its 4-bit weights for this CPU, and PEFT would merge into or out of garbage: "
            "merge before the first forward in eval mode, or export the rank and merge it into a model that is not "
            "quantised"
        )


def _call(layer: nn.Module, x: Tensor, weight: Tensor | None) -> Tensor:
    # A and B are called as modules: sharded training gathers their weights at the call.
    output: Tensor = layer(x) if weight is None else torch.func.functional_call(layer, {"weight": weight}, (x,))
    return output


def _add(module: LoraLayer, weight: Tensor, delta: Tensor) -> Tensor:
    # A quantised layer hands over its dequantised weight and rounds the sum itself.
    quantised = not module.get_base_layer().weight.is_floating_point()
    return weight.to(delta.dtype) + delta if quantised else weight + delta.to(weight.dtype)
