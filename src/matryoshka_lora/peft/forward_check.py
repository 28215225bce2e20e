"""Check that a model's forward uses the chosen diagonal, and that a chosen rank has its order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.peft.nested_layers import NestedLayers
from matryoshka_lora.peft.state import Diagonal
from matryoshka_lora.peft.variant import NestedVariant


class ForwardCheck:
    """Hooks around the forward of a model with a nested adapter.

    Kernels of other libraries compute a layer from its A and B, without calling it, so they know no
    diagonal. They replace the forward of the module that contains the layer. The first forward with
    each diagonal that is not one finds them: the replaced forward leaves all layers of a kind, such
    as all ``gate_proj``, uncalled. A model's own code may leave layers uncalled, as Longformer does
    without global attention. Plain LoRA is not checked.

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
        self._hooks: list[RemovableHandle] = []

    def register(self) -> None:
        """Watch the forward of the model, which generate() and PeftModel enter differently."""
        tuner = self._layers.model.base_model
        for root in (tuner, tuner.model):
            self._hooks += [
                root.register_forward_pre_hook(self._before),
                root.register_forward_hook(self._after, always_call=True),
            ]
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
                f" so rank {state.rank} is no longer available. Call reorder() and "
                f"set_rank({state.rank})."
            )

    def _before(self, root: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        if self._root is root:
            self._stop()  # Ctrl-C has interrupted the last forward
        if self._root is not None:
            return
        if self._layers.is_unloaded():
            self._remove()
            return
        diagonal = self._active_diagonal()
        if diagonal is None or diagonal.is_one:
            return
        if diagonal is self._state.eval_diagonal:
            self.check_order()
        if diagonal in self._state.overrides:
            self._check_override(diagonal)
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

    def _check_override(self, diagonal: Diagonal) -> None:
        model = self._layers.model
        if diagonal.q.ndim == 1 or not model.training or not torch.is_grad_enabled():
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise MatryoshkaError(
                "Gradient checkpointing computes the layers again after rows() has ended. Call "
                "model.gradient_checkpointing_disable() before rows() in train mode."
            )

    def _remove(self) -> None:
        """Remove the hooks of a model whose adapter was unloaded."""
        for hook in self._hooks:
            hook.remove()

    def _record(self, module: nn.Module, args: object) -> None:
        self._called.add(module)

    def _after(self, root: nn.Module, args: object, output: Tensor | None) -> None:
        if root is not self._root:
            return
        called = self._stop()
        if output is None:
            return  # the forward raised an error
        kinds = self._bypassed_kinds(called)
        if kinds:
            raise MatryoshkaError(
                f"The model did not call its layers {', '.join(kinds):.80}: another library "
                "computes them from A and B, at rank R and without P. Disable its LoRA kernels "
                "(Axolotl: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel), or train with "
                "`rule='lora'` and use the saved folder without that library."
            )
        self._diagonal.is_checked = True

    def _stop(self) -> set[nn.Module]:
        """Stop watching, and return the modules that were called."""
        if self._handle is not None:
            self._handle.remove()
        called = self._called
        self._root = self._handle = None
        self._called = set()
        return called

    def _bypassed_kinds(self, called: set[nn.Module]) -> list[str]:
        """Return the names of layers that a replaced forward has left uncalled."""
        modules = dict(self._layers.model.base_model.model.named_modules())
        uncalled_kinds: dict[str, None] = {}  # in the model's order
        called_kinds: set[str] = set()
        for name in self._layers.modules:
            parent_name, _, kind = name.rpartition(".")
            if modules[name] in called:
                called_kinds.add(kind)
                continue
            while modules[parent_name] not in called:  # the model itself was called
                parent_name = parent_name.rpartition(".")[0]
            if _has_replaced_forward(modules[parent_name]):
                uncalled_kinds[kind] = None
        return [kind for kind in uncalled_kinds if kind not in called_kinds]


def _has_replaced_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is from another Python module than its class."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return bool(module.forward.__module__ != cls.__module__)
    return False
