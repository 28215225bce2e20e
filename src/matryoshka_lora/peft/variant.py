"""Apply the diagonal through PEFT's slot for LoRA variants: forward, merge, and state dicts.

The diagonal also selects the components: of the adapter, of its small adapter, or of both.

PEFT's classes, configs and parameters stay as they are. Each layer of an adapter gets a
`NestedVariant` in its ``lora_variant``, and all layers share one `NestingState`. Linear and
embedding layers also get another forward, and layers with P get state-dict hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.peft.fused import is_plain_linear, low_rank_linear
from matryoshka_lora.peft.lora_layers import (
    factor_parameters,
    small_factors,
)
from matryoshka_lora.peft.state import Diagonal, NestingState
from matryoshka_lora.training.factors import scale_columns


def attach(module: LoraLayer, adapter: str, state: NestingState) -> None:
    """Nest an adapter in a LoRA layer, state dicts included."""
    module.lora_variant[adapter] = NestedVariant(state)
    if "forward" not in vars(module):
        # Other PEFT layers need no replacement: their forward calls the variant. By exact class,
        # because subclasses have a forward of their own.
        if type(module) is Linear:
            module.forward = partial(_linear_forward, module)
        elif type(module) is Embedding:
            module.forward = partial(_embedding_forward, module)
    # The hooks serve all adapters of the layer, so they are registered once.
    has_hooks = _fold_into_state_dict in module._state_dict_hooks.values()
    if state.state_dict_q() is not None and not has_hooks:
        module.register_state_dict_post_hook(_fold_into_state_dict)
        module.register_load_state_dict_pre_hook(_unfold_from_state_dict)


class NestedVariant(LoraVariant):
    """Compute ``base(x) + s B diag(q) A x`` in a LoRA layer, for one adapter.

    `attach` adds it after PEFT has built the layer.
    """

    def __init__(self, state: NestingState) -> None:
        self.state = state

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: object) -> None:
        """Remove the variant, so that the adapter is plain until it is nested again.

        PEFT calls this when it re-creates the adapter.
        """
        del module.lora_variant[adapter_name]

    def supports_lora_conversion(self) -> bool:
        """Return whether ``s B A`` is the deployed update, as PEFT's conversion assumes."""
        return self.state.eval_diagonal.is_one

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """Return the base layer's result plus the update."""
        diagonal = self.state.active_diagonal(module.training)
        if active_adapter in module.lora_embedding_A:
            A, B = _factors_in_use(module, active_adapter, diagonal)
            hidden = diagonal.multiply(module._embed(x, A.T))
            embedded: Tensor = (hidden @ B.T) * module.scaling[active_adapter]
            embed_scale = module._get_embed_scale()
            if embed_scale is not None:  # as Gemma's, which scales the embeddings
                embedded = embedded * embed_scale.to(embedded.dtype)
            return result + embedded
        # A and B are called as modules: sharded training gathers their weights at the call.
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        pairs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = []
        if diagonal.uses_main:
            pairs.append((lora_A, lora_B))
        if diagonal.uses_small:
            A, B = small_factors(module, active_adapter)
            pairs.append((_with_weight(lora_A, A), _with_weight(lora_B, B)))
        x = module.lora_dropout[active_adapter](x)
        hidden_states = [lora_A(x) for lora_A, _ in pairs]
        spatial_dims = len(getattr(lora_A, "kernel_size", ()))
        dim = -1 - spatial_dims
        hidden = diagonal.multiply(torch.cat(hidden_states, dim), spatial_dims)
        split = hidden.split_with_sizes([state.shape[dim] for state in hidden_states], dim)
        update = sum(lora_B(part) for (_, lora_B), part in zip(pairs, split, strict=True))
        output: Tensor = result + update * module.scaling[active_adapter]
        return output

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight plus the update at the deployed rank."""
        self.state.check_order()
        return _add(module, orig_weight, self._delta_weight(module, active_adapter))

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update at the deployed rank to the base weight in place."""
        self.state.check_order()
        orig_weight.data += self._delta_weight(module, active_adapter).to(orig_weight.device)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Subtract the update."""
        # `set_rank` rejects merged adapters, so the rank is still the merged one.
        return _add(module, orig_weight, -self._delta_weight(module, active_adapter))

    def _delta_weight(self, module: LoraLayer, adapter: str) -> Tensor:
        with _folded(module, adapter, self.state.eval_diagonal):
            weight: Tensor = module.get_delta_weight(adapter)
            return weight


def _factors_in_use(module: LoraLayer, adapter: str, diagonal: Diagonal) -> tuple[Tensor, Tensor]:
    """Return A and B of the components that a diagonal uses, in PEFT's own layout."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if diagonal.uses_main:
        pairs.append(factor_parameters(module, adapter))
    if diagonal.uses_small:
        pairs.append(small_factors(module, adapter))
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)


def _with_weight(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function of a layer without a bias, with another weight."""
    if isinstance(layer, nn.Linear):
        return lambda x: linear(x, weight)  # without the hooks of ZeRO-3
    return lambda x: functional_call(layer, {"weight": weight}, (x,))


def _add(module: LoraLayer, weight: Tensor, delta: Tensor) -> Tensor:
    # A quantized layer passes its dequantized weight, and rounds the sum itself.
    base_weight = getattr(module.get_base_layer(), "weight", None)
    if not isinstance(base_weight, Tensor) or not base_weight.is_floating_point():
        return weight.to(delta) + delta
    return weight + delta.to(weight)


@contextmanager
def _folded(module: LoraLayer, adapter: str, diagonal: Diagonal) -> Iterator[None]:
    """Replace A and B by ``A`` and ``B diag(q)`` of the components in use.

    So PEFT's own formulas compute the nested update.
    """
    parameters = factor_parameters(module, adapter)
    originals = [parameter.data for parameter in parameters]
    A, B = _factors_in_use(module, adapter, diagonal)
    try:
        parameters[0].data = A.data
        parameters[1].data = scale_columns(B.data, diagonal.to(B.device))
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


def _linear_forward(module: LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Replace the forward of PEFT's linear layer, to use the fused operation if possible."""
    diagonal = None
    if not args and not kwargs:
        diagonal = _fusable_diagonal(module, x)
    if diagonal is None:
        output: Tensor = Linear.forward(module, x, *args, **kwargs)
        return output
    adapter = module.active_adapters[0]
    A, B = _factors_in_use(module, adapter, diagonal)
    p = diagonal.for_batch(x.shape, x.device) * module.scaling[adapter]
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    weight = module.base_layer.weight.to(dtype)
    bias = module.base_layer.bias
    return low_rank_linear(x.to(dtype), weight, None if bias is None else bias.to(dtype), A, B, p)


def _fusable_diagonal(module: LoraLayer, x: Tensor) -> Diagonal | None:
    """Return the diagonal if the fused operation may run, or None.

    It runs in train mode, and while a context overrides the diagonal. Train mode without gradients
    is included, because TRL requires the same bits with and without gradients. In eval mode a
    single rank has the output of PEFT's own formula, bit for bit.
    """
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return None
    adapter = module.active_adapters[0]
    variant = module.lora_variant.get(adapter)
    if not isinstance(variant, NestedVariant):
        return None
    state = variant.state
    if module.training:
        may_fuse = isinstance(module.lora_dropout[adapter], nn.Identity)
    else:
        may_fuse = bool(state.overrides)
    if not may_fuse:
        return None
    base_layer = module.base_layer
    linears = (base_layer, module.lora_A[adapter], module.lora_B[adapter])
    is_frozen = not any(parameter.requires_grad for parameter in base_layer.parameters())
    if not is_frozen or not all(is_plain_linear(linear) for linear in linears):
        return None
    # With another dtype, PEFT's forward raises the error.
    if base_layer.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return state.active_diagonal(module.training)


def _embedding_forward(
    module: LoraLayer,
    x: Tensor,
    *args: object,
    adapter_names: list[str] | None = None,
    **kwargs: object,
) -> Tensor:
    """Replace the forward of PEFT's embedding, which calls no variants in mixed batches.

    Raises:
        MatryoshkaError: The batch is mixed, and an adapter has one diagonal per row.
    """
    with ExitStack() as stack:
        for adapter in set(adapter_names or ()):
            variant = module.lora_variant.get(adapter)
            if isinstance(variant, NestedVariant):
                diagonal = variant.state.active_diagonal(module.training)
                if diagonal.q.ndim > 1:
                    raise MatryoshkaError(
                        "A batch with adapter_names cannot have one rank per row. Call the model "
                        "outside of rows(), with set_rank()."
                    )
                stack.enter_context(_folded(module, adapter, diagonal))
        output: Tensor = Embedding.forward(module, x, *args, adapter_names=adapter_names, **kwargs)
    return output


def _fold_into_state_dict(
    module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """Multiply each B of a layer's state dict by q (state-dict hook)."""
    for key, q in _folded_keys(module, prefix):
        if key in state_dict:
            state_dict[key] = scale_columns(state_dict[key], q)


def _unfold_from_state_dict(
    module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """Divide each incoming B by q (load hook)."""
    for key, q in _folded_keys(module, prefix):
        if key in state_dict:
            state_dict[key] = scale_columns(state_dict[key], 1 / q)


def _folded_keys(module: LoraLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the key of each B that is stored multiplied by q, and that q."""
    for adapter, variant in module.lora_variant.items():
        if not isinstance(variant, NestedVariant):
            continue
        q = variant.state.state_dict_q()
        if q is None:
            continue
        if adapter in module.lora_embedding_B:
            yield f"{prefix}lora_embedding_B.{adapter}", q
        else:
            yield f"{prefix}lora_B.{adapter}.weight", q
