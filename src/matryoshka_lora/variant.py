"""Apply P through PEFT's slot for LoRA variants: forward, merge, unmerge and state dict.

All layers of an adapter share one `Shared` object, which holds the diagonal between B and A.
The layers compute ``W x + s B diag(q) A x``. Here s is PEFT's own ``scaling`` and q = p / s, so
PEFT's functions that change the scaling keep their effect, and q = 1 is plain LoRA to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, LoraVariant
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.fused import at_least_float32, is_plain_linear, low_rank_linear
from matryoshka_lora.nesting import Nesting, Rule


class Diagonal:
    """Hold one q, of shape (R,) or (rows, R), on every device where a layer asks for it.

    Each draw makes a new object, so a backward pass after the next draw reads the old values.

    Args:
        q: The diagonal, float64.
        fewer: Accept a batch with fewer rows than q, such as the last one of an epoch.
    """

    def __init__(self, q: Tensor, fewer: bool = False) -> None:
        self.q, self.fewer = q, fewer
        self.is_one = bool((q == 1).all())
        self._moved = {q.device: q}

    def on(self, device: torch.device) -> Tensor:
        """Return q on a device."""
        if device not in self._moved:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._moved[device] = self.q.to(device, dtype)
        return self._moved[device]

    def for_rows(self, shape: torch.Size, device: torch.device, spatial: int = 0) -> Tensor:
        """Return q for an activation of shape (rows, ..., R, *spatial).

        Raises:
            MatryoshkaError: q is for another number of rows.
        """
        q, given, rows = self.on(device), len(self.q), shape[0]
        if self.q.ndim == 1:
            return q
        if len(shape) >= max(3, 2 + spatial):  # else rows and tokens share a dimension
            if rows == given:
                return q
            if self.fewer and rows < given:
                return q[:rows]
            # In generate, beams and several answers repeat each row in place. With gradients a
            # wrong number of rows must not pass for beams.
            if rows % given == 0 and not torch.is_grad_enabled():
                return q.repeat_interleave(rows // given, dim=0)
        raise MatryoshkaError(
            f"{given} rows have a rank each, and a layer got an input of shape {list(shape)}: give "
            "one rank for each row of the batch. Packed, flattened or expert-routed rows have no "
            "rank of their own; use set_rank, or a rule other than 'stratified'"
        )

    def times(self, hidden: Tensor, spatial: int = 0) -> Tensor:
        """Return ``hidden`` times q along its dimension of ranks."""
        # A compiler has one graph for all ranks, and would make another one for this shortcut.
        if not torch.compiler.is_compiling() and self.is_one and self.q.ndim == 1:
            return hidden
        q = at_least_float32(self.for_rows(hidden.shape, hidden.device, spatial), hidden.dtype)
        rows = () if q.ndim == 1 else (len(hidden), *(1,) * (hidden.ndim - 2 - spatial))
        return (hidden * q.view(*rows, -1, *(1,) * spatial)).to(hidden.dtype)


@dataclass
class Shared:
    """Hold what all layers of one adapter share.

    Attributes:
        seed: The seed of the ranks that the rule draws.
        deploy: ``"paper"`` drops P after training; ``"reordered"`` keeps it in what is saved.
        order: How the factors were reordered, or None.
        checksum: The factors' checksum when they were reordered.
        rank: The rank in eval mode, from 0 to R.
        training: The diagonal in train mode; None until the rule has drawn.
        deployed: The diagonal in eval mode and for merging.
        overrides: Diagonals that replace both while their context is open; the last one counts.
    """

    nesting: Nesting
    rule: Rule
    seed: int
    deploy: str
    order: str | None = None
    checksum: str | None = None
    rank: int = field(init=False)
    training: Diagonal | None = field(init=False, default=None)
    deployed: Diagonal = field(init=False)
    overrides: list[Diagonal] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Set rank R for eval mode and, for a fixed rule, its diagonal for train mode."""
        self.training = Diagonal(self.trained()) if self.rule.fixed else None
        self.set_rank(self.nesting.max_rank)

    def trained(self) -> Tensor:
        """Return the q that training optimises at rank R, shape (R,)."""
        if self.rule.fixed:
            return self.rule.draw(self.nesting, self.seed, 0) / self.nesting.scale
        return torch.ones(self.nesting.max_rank, dtype=torch.float64)

    def at(self, rank: int) -> Tensor:
        """Return the q that deploys a rank, shape (R,); it is 0 from entry ``rank`` on."""
        own_scale = self.deploy == "paper" or not (self.order or self.rule.fixed)
        if rank and own_scale:  # each rank was trained with its own scale
            return self.nesting.prefix(rank) / self.nesting.scale
        return self.trained() * (torch.arange(self.nesting.max_rank) < rank)

    def set_rank(self, rank: int) -> None:
        """Choose the rank of eval mode; 0 switches the update off."""
        self.rank, self.deployed = rank, Diagonal(self.at(rank))

    def folded(self) -> Tensor | None:
        """Return the q that state dicts fold into B, or None if there is nothing to fold.

        PEFT and the Trainer save state dicts, and read them back. There the adapter is plain
        LoRA and computes the eval-mode function at rank R.
        """
        q = self.trained()
        return None if self.deploy == "paper" or bool((q == 1).all()) else q

    def diagonal(self, training: bool) -> Diagonal:
        """Return the diagonal that applies now."""
        if self.overrides:
            return self.overrides[-1]
        if not training:
            return self.deployed
        if self.training is None:
            raise MatryoshkaError(
                f"rule {self.rule.name!r} draws ranks for every step and nothing was drawn: give "
                "adapter.callback() to the Trainer, or call adapter.draw(step) before each step"
            )
        return self.training


class NestedVariant(LoraVariant):
    """Compute ``base(x) + s B diag(q) A x`` in one LoRA layer, for one adapter."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Remove the variant: PEFT re-creates the adapter, which is plain until it is nested."""
        module.lora_variant.pop(adapter_name)

    def supports_lora_conversion(self) -> bool:
        """Return whether ``s B A`` is the deployed update, as PEFT's conversion assumes."""
        return self.shared.deployed.is_one

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the base layer's result with the update."""
        diagonal, scaling = self.shared.diagonal(module.training), module.scaling[active_adapter]
        update: Tensor
        if active_adapter in module.lora_embedding_A:
            A, B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
            update = (diagonal.times(module._embed(x, A.T)) @ B.T) * scaling
            # Gemma scales its embeddings; the update must be scaled too.
            inside = module._get_embed_scale()
            return result + (update if inside is None else update * inside.to(update.dtype))
        # A and B are called as modules: sharded training gathers their weights at the call.
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        hidden = lora_A(module.lora_dropout[active_adapter](x))
        update = lora_B(diagonal.times(hidden, lora_A.weight.ndim - 2)) * scaling
        return result + update

    def _delta(self, module: Any, adapter: str) -> Tensor:
        with _folded_into_B(module, adapter, self.shared.deployed):
            delta: Tensor = module.get_delta_weight(adapter)
        return delta

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight plus the update at the chosen rank."""
        return _add(module, orig_weight, self._delta(module, active_adapter))

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update at the chosen rank to the base weight in place."""
        orig_weight.data += self._delta(module, active_adapter).to(orig_weight.device)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Subtract the update. The rank cannot change between merge and unmerge."""
        return _add(module, orig_weight, -self._delta(module, active_adapter))


@contextmanager
def _folded_into_B(module: Any, adapter: str, diagonal: Diagonal) -> Iterator[None]:
    """Hold ``B diag(q)`` in the place of B, so that PEFT's own formula gives the nested update."""
    _, B = factor_parameters(module, adapter)
    before = B.data
    try:
        B.data = _columns_times(before, diagonal.on(B.device))
        yield
    finally:
        B.data = before


def _columns_times(B: Tensor, q: Tensor) -> Tensor:
    """Return B of shape (out, R, ...) with q on its columns; B may be a DTensor."""
    q = at_least_float32(q, B.dtype).to(B.device)
    q = q.view(1, -1, *(1,) * (B.ndim - 2))
    if hasattr(B, "device_mesh"):
        from torch.distributed.tensor import Replicate, distribute_tensor

        q = distribute_tensor(q, B.device_mesh, [Replicate()] * B.device_mesh.ndim)
    return (B * q).to(B.dtype)


def _add(module: Any, weight: Tensor, delta: Tensor) -> Tensor:
    # A quantised layer hands over its dequantised weight and rounds the sum itself.
    if not module.get_base_layer().weight.is_floating_point():
        return weight.to(delta) + delta
    return weight + delta.to(weight)


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield the LoRA layers that hold an adapter, by their names in the base model."""
    for name, module in model.named_modules():
        holds = isinstance(module, LoraLayer)
        if holds and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield name.removeprefix("base_model.model."), module


def factor_parameters(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the parameters A and B of one adapter in a LoRA layer, in PEFT's own layout."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def attach(module: Any, adapter: str, shared: Shared) -> None:
    """Put the variant into a LoRA layer, with its hooks on the layer's state dict."""
    module.lora_variant[adapter] = NestedVariant(shared)
    forward = {Linear: _forward, Embedding: _forward_embedding}.get(type(module))
    if forward and "forward" not in vars(module):
        module.forward = partial(forward, module)
    if shared.folded() is not None and not hasattr(module, "folds_p"):
        module.folds_p = True  # the hooks serve every adapter of the layer, so they come once
        module.register_state_dict_post_hook(partial(_fold, False))
        module.register_load_state_dict_pre_hook(partial(_fold, True))


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the forward of PEFT's linear layer; use the fused operation where possible."""
    diagonal = None if args or kwargs else _fusable(module, x)
    if diagonal is None:
        result: Tensor = type(module).forward(module, x, *args, **kwargs)
        return result
    base, (adapter,) = module.base_layer, module.active_adapters
    p = diagonal.for_rows(x.shape, x.device) * module.scaling[adapter]
    return low_rank_linear(x, base.weight, base.bias, *factor_parameters(module, adapter), p)


def _forward_embedding(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the forward of PEFT's embedding, which calls no variants in mixed batches."""
    with ExitStack() as stack:
        for adapter in set(kwargs.get("adapter_names") or ()):
            variant = module.lora_variant.get(adapter)
            if isinstance(variant, NestedVariant):
                diagonal = variant.shared.diagonal(module.training)
                stack.enter_context(_folded_into_B(module, adapter, diagonal))
        result: Tensor = type(module).forward(module, x, *args, **kwargs)
    return result


def _fusable(module: Any, x: Tensor) -> Diagonal | None:
    """Return the diagonal if the fused operation may run, in training or under `rows`, or None.

    In training the fused operation runs with gradients or without: TRL compares the two, and they
    must be the same to the last bit. In eval mode a single rank is PEFT's result to the last bit.
    """
    active = module.active_adapters
    variant = module.lora_variant.get(active[0]) if len(active) == 1 else None
    if not isinstance(variant, NestedVariant) or module.disable_adapters or module.merged:
        return None
    shared, adapter = variant.shared, active[0]
    dropout = module.training and not isinstance(module.lora_dropout[adapter], nn.Identity)
    exact = not (module.training or shared.overrides)
    if dropout or exact or torch.is_autocast_enabled(x.device.type):
        return None
    base, A, B = module.base_layer, module.lora_A[adapter], module.lora_B[adapter]
    plain = is_plain_linear(base) and is_plain_linear(A) and is_plain_linear(B)
    frozen = plain and not any(parameter.requires_grad for parameter in base.parameters())
    return shared.diagonal(module.training) if frozen and base.weight.dtype == x.dtype else None


def _fold(back: bool, module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fold q into each B of a state dict, or back out of it where the state dict is loaded."""
    for adapter, variant in module.lora_variant.items():
        q = variant.shared.folded() if isinstance(variant, NestedVariant) else None
        is_embedding = adapter in module.lora_embedding_B
        name = f"lora_embedding_B.{adapter}" if is_embedding else f"lora_B.{adapter}.weight"
        key = f"{prefix}{name}"
        if q is not None and key in state_dict:
            state_dict[key] = _columns_times(state_dict[key], 1 / q if back else q)
