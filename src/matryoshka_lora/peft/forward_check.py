"""Check that a model's forward uses the chosen diagonal, and that a chosen rank has its order.

The number of rows of a batch is also known only here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.variant import NestedVariant


class ForwardCheck:
    """Hooks around the forward of a model with a nested adapter.

    Kernels of other libraries compute a layer from its A and B, without calling it, so they know no
    diagonal. They replace the forward of the module that contains the layer. The first forward with
    each diagonal detects them: the replaced forward leaves all layers of a kind, such as all
    ``gate_proj``, uncalled. A model's own code may leave layers uncalled, as Longformer does
    without global attention. A diagonal of ones, which is plain LoRA, is not checked.
    """

    def __init__(self, adapter: NestedAdapter) -> None:
        self._name = adapter.name
        self._state = adapter.state
        self._layers = adapter.layers
        self._model: Any = adapter.base_model
        # The state of the forward that is being recorded:
        self._root: nn.Module | None = None
        self._diagonal = self._state.eval_diagonal
        self._called: set[nn.Module] = set()
        self._recording: RemovableHandle | None = None
        # generate() enters the model past the tuner.
        self._hooks: list[RemovableHandle] = []
        tuners = [adapter.model.base_model] if adapter.model is not self._model else []
        for root in (*tuners, self._model):
            self._hooks += [
                root.register_forward_pre_hook(self._before, with_kwargs=True),
                root.register_forward_hook(self._after, always_call=True),
            ]

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        diagonal = self._state.train_diagonal
        if diagonal is not None and diagonal.q.ndim > 1:
            diagonal.num_rows = _num_rows(self._model, args, kwargs)
        if torch.compiler.is_compiling():
            return
        if self._root is root:
            self._stop_recording()  # Ctrl-C has interrupted the last forward
        if self._root is not None:
            return
        name, layer = next(iter(self._layers.items()))
        if self._model.get_submodule(name) is not layer:  # the adapter was unloaded
            for hook in self._hooks:
                hook.remove()
            return
        if self._is_in_use(layer):
            self._check_forward(root, layer)

    def _is_in_use(self, layer: LoraLayer) -> bool:
        variant = layer.lora_variant.get(self._name)
        if not isinstance(variant, NestedVariant) or variant.state is not self._state:
            return False  # PEFT has removed or re-created the adapter
        is_active = self._name in layer.active_adapters and self._name not in layer.merged_adapters
        return is_active and not layer.disable_adapters

    def _check_forward(self, root: nn.Module, layer: LoraLayer) -> None:
        state = self._state
        needs_backward = torch.is_grad_enabled() and (self._model.training or layer.training)
        if needs_backward:
            state.order.may_have_changed = True  # an optimizer step may follow
        if state.train_diagonal is None and layer.training and not state.overrides:
            return  # the rule has drawn no diagonal, which the layers report
        diagonal = state.active_diagonal(layer.training)
        if diagonal.is_one:
            return
        if diagonal is state.eval_diagonal:
            state.check_order()
        if state.overrides and diagonal.q.ndim > 1 and needs_backward:
            modules = self._model.modules()
            if any(getattr(module, "gradient_checkpointing", False) for module in modules):
                raise MatryoshkaError(
                    "Gradient checkpointing computes the layers again after rows() has ended. Call "
                    "model.gradient_checkpointing_disable() before rows() in train mode."
                )
        if not diagonal.is_checked:
            self._root = root
            self._diagonal = diagonal
            self._called = {self._model}
            self._recording = register_module_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, args: object) -> None:
        self._called.add(module)

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.remove()
        self._root = self._recording = None

    def _after(self, root: nn.Module, args: object, output: Tensor | None) -> None:
        if root is not self._root:
            return
        self._stop_recording()
        called, self._called = self._called, set()
        if output is None:
            return  # the forward raised an error
        kinds = self._bypassed_kinds(called)
        if kinds:
            raise MatryoshkaError(
                f"The model did not call its layers {', '.join(kinds)}: another library "
                "computes them from A and B, at rank R and without P. Disable its LoRA kernels "
                "(Axolotl: lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel), or train with "
                "`rule='lora'` and use the saved folder without that library."
            )
        self._diagonal.is_checked = True

    def _bypassed_kinds(self, called: set[nn.Module]) -> list[str]:
        """Return the names of layers that a replaced forward has left uncalled."""
        modules = dict(self._model.named_modules())
        uncalled_kinds: dict[str, None] = {}  # in the model's order
        called_kinds: set[str] = set()
        for name in self._layers:
            parent_name, _, kind = name.rpartition(".")
            if modules[name] in called:
                called_kinds.add(kind)
                continue
            while modules[parent_name] not in called:  # the model itself was called
                parent_name = parent_name.rpartition(".")[0]
            if _has_replaced_forward(modules[parent_name]):
                uncalled_kinds[kind] = None
        return [kind for kind in uncalled_kinds if kind not in called_kinds]


def _num_rows(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of rows of a model's inputs; None if no input has rows."""
    # A model of images and text has other tensors without rows.
    main_input = kwargs.get(getattr(model, "main_input_name", ""))
    for value in (main_input, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
    return None


def _has_replaced_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is from another Python module than its class."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return bool(module.forward.__module__ != cls.__module__)
    return False
