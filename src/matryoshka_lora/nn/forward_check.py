"""Check that a model's forward uses the chosen diagonal, and that a chosen rank has its order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nn.nested_layers import NestedLayers
from matryoshka_lora.nn.state import Diagonal
from matryoshka_lora.nn.variant import LoraModule, NestedVariant, factor_parameters


class ForwardCheck:
    """Hooks around the forward of a model with a nested adapter.

    Kernels of other libraries compute a layer from its A and B, without calling it, so they know no
    diagonal. The first forward with each diagonal that is not one finds them: they leave all layers
    of a kind, such as all ``gate_proj``, uncalled in modules that are called. Some models leave
    layers uncalled, too, such as Longformer without global attention. Training does not change
    these, so layers with B = 0 are not an error, but are checked again in the next forward. Plain
    LoRA is not checked.

    Args:
        layers: The adapter's layers.
    """

    def __init__(self, layers: NestedLayers) -> None:
        self._layers = layers
        self._state = layers.state
        self._root: nn.Module | None = None  # whose forward is watched now
        self._diagonal = self._state.eval_diagonal  # of that forward
        self._called: set[nn.Module] = set()
        self._handle: RemovableHandle | None = None

    def register(self) -> None:
        """Watch the forward of the model, which generate() and PeftModel enter differently."""
        tuner = self._layers.model.base_model
        for root in (tuner, tuner.model):
            root.register_forward_pre_hook(self._before)
            root.register_forward_hook(self._after, always_call=True)
        self._state.check_order = self.check_order

    def check_order(self) -> None:
        """Raise MatryoshkaError if the chosen rank needs an order, and the factors have changed."""
        state, layers = self._state, self._layers
        max_rank = state.nesting.max_rank
        if state.order is None or state.rank in (0, max_rank):
            return
        if not layers.has_quick_fingerprint():
            layers.verify_order()
        if not state.is_order_valid:
            raise MatryoshkaError(
                f"The factors of adapter {layers.name!r} have changed since set_rank({state.rank}),"
                f" by training or by a cast to another dtype, so rank {state.rank} is no longer "
                "available. Cast the model before the adapter is loaded, or call reorder() and "
                f"set_rank({state.rank})."
            )

    def _before(self, root: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or self._root is not None:
            return
        diagonal = self._active_diagonal()
        if diagonal is None or diagonal.is_one:
            return
        if diagonal is self._state.eval_diagonal:
            self.check_order()
        if not diagonal.is_checked:
            self._root = root
            self._diagonal = diagonal
            self._called = {self._layers.model.base_model.model}
            self._handle = register_module_forward_pre_hook(self._record)

    def _active_diagonal(self) -> Diagonal | None:
        """Return the diagonal of this forward; None without one, as if PEFT removed the adapter."""
        state, name = self._state, self._layers.name
        module = self._layers.first_module
        variant = module.lora_variant.get(name)
        if not isinstance(variant, NestedVariant) or variant.state is not state:
            return None
        is_active = name in module.active_adapters and name not in module.merged_adapters
        if module.disable_adapters or not is_active:
            return None
        if state.overrides:
            return state.overrides[-1]
        if module.training:
            return state.train_diagonal
        return state.eval_diagonal

    def _record(self, module: nn.Module, args: object) -> None:
        self._called.add(module)

    def _after(self, root: nn.Module, args: object, output: Tensor | None) -> None:
        if root is not self._root or self._handle is None:
            return
        self._handle.remove()
        self._root = self._handle = None
        called, self._called = self._called, set()
        if output is None:
            return  # the forward raised an error
        bypassed = self._bypassed_layers(called)
        if not bypassed:
            self._diagonal.is_checked = True
        elif self._have_updates(bypassed):
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in bypassed)
            raise MatryoshkaError(
                f"The model did not call its layers {', '.join(kinds):.80}: another library "
                "computes them from A and B, at rank R and without P. Disable its LoRA kernels "
                "(Axolotl: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel), or train with "
                "`rule='lora'` and use the saved folder without that library. If the model does "
                "not need these layers, leave them out of target_modules."
            )

    def _bypassed_layers(self, called: set[nn.Module]) -> dict[str, LoraModule]:
        """Return the layers, by name, of a kind that was not called in any module."""
        base_model: nn.Module = self._layers.model.base_model.model
        uncalled: dict[str, dict[str, LoraModule]] = {}
        called_kinds: set[str] = set()
        for name, module in self._layers.modules.items():
            parent_name, _, kind = name.rpartition(".")
            parent = base_model.get_submodule(parent_name)
            if parent not in called:
                continue
            if parent.get_submodule(kind) in called:
                called_kinds.add(kind)
            else:
                uncalled.setdefault(kind, {})[name] = module
        bypassed: dict[str, LoraModule] = {}
        for kind, layers in uncalled.items():
            if kind not in called_kinds:
                bypassed.update(layers)
        return bypassed

    def _have_updates(self, layers: dict[str, LoraModule]) -> bool:
        """Return whether any B is not zero."""
        for module in layers.values():
            _, B = factor_parameters(module, self._layers.name)
            if bool(B.any()):
                return True
        return False
