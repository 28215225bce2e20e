"""One nested layer: p between the factors of a PEFT LoRA layer, through PEFT's own slot for LoRA variants."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, LoraLayer, LoraVariant
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_factors, get_parameters, get_weight, to_weight
from matryoshka_lora.adapter.gate import Gate, RowCount, wrong_number
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.state import State, split
from matryoshka_lora.unofficial import backward_node, embed_scale, embedded, is_conv, next_node


class NestedVariant(LoraVariant):
    """Computes ``base(x) + B diag(p) A x`` in one LoRA layer, for one adapter.

    Attributes:
        state: Shared by all layers of the adapter.
        device: Where its gates are made.
        training: The rule's draw for this optimizer step; None until one was made.
        deployed: The chosen rank, used in eval mode and for merging.
        rank: The rank of `deployed`.
        override: Stands before both while a `rows` context is open: of several, that of the one opened last.
        apart: The adapters that were there when it was attached and are no copies of it; all its layers share them.
        sharing: Modules that had the weight of this variant's base layer when it was attached, by their names.
        rows: Counts the rows of the model's calls.
    """

    def __init__(self, state: State, module: LoraLayer, adapter: str, initial_scale: float, rows: RowCount) -> None:
        self.state = state
        self.rows = rows
        self.device = get_parameters(module, adapter)[0].device
        # PEFT's set_scale and scale_layer change module.scaling; their effect is the ratio to what it was at first.
        self.initial_scale = initial_scale
        self.training: Gate | None = None
        self.override: Gate | None = None
        self._standing: list[Gate] = []
        self.apart: set[str] = set()
        self.sharing: dict[str, nn.Module] = {}
        self.deployed: Gate
        self.rank: int
        self.takes_rows_first = False  # as far as was seen
        rows.unproven += 1
        # Since which node of autograd's graph which gates applied.
        self._history: list[tuple[int, tuple[Gate | None, Gate | None]]] = []
        self.set_rank(state.nesting.max_rank)
        self._merged: tuple[Gate, float] | None = None

    def copied(self, state: State, module: LoraLayer, adapter: str) -> NestedVariant:
        """One for a copy of its factors in the same layer: in training mode as this one is now, else at full rank."""
        copy = NestedVariant(state, module, adapter, self.initial_scale, self.rows)
        if self.training is not None:
            copy.begin_step(self.training)
        return copy

    def init(self, module: LoraLayer, *args: Any, **kwargs: Any) -> None:
        """PEFT makes the adapter anew in a layer: it is a plain one there until it is nested again."""
        module.lora_variant = {name: variant for name, variant in module.lora_variant.items() if variant is not self}

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

    def checked_gate(self, module: nn.Module, device: torch.device, x: Tensor | None = None) -> Gate:
        """The gate for a forward of the layer, on the device that it computes on.

        With its input x, rows may have ranks of their own there.
        """
        gate = self.gate(module.training)
        self._check_recomputation(module, gate)
        # A compiler would compile again for each number of rows; its code has no more than `Gate.for_rows` to go by.
        if x is not None and not torch.compiler.is_compiling():
            self._check_rows(module, gate, x)
        if self.device != device:
            self.device = device
        return gate.at(device)

    def ratio(self, module: LoraLayer, adapter: str) -> float:
        """What PEFT's scaling functions have multiplied the adapter by."""
        return float(module.scaling[adapter]) / self.initial_scale

    def exported(self, module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A, B and PEFT's scale of an ordinary adapter, filled up with zeros, that computes what eval mode does."""
        A, B = (factor.detach() for factor in get_parameters(module, adapter))
        work = torch.promote_types(B.dtype, torch.float32)
        p = self.deployed.diagonal.to(B.device, work)
        used = (p != 0).view(-1, *(1,) * (A.ndim - 1))
        folded = (B.to(work) * p.view(1, -1, *(1,) * (B.ndim - 2))).to(B.dtype)
        scale = 1.0 if self.deployed.scale is None else self.deployed.scale.item()
        return A * used, folded, scale * self.ratio(module, adapter)

    def is_plain(self) -> bool:
        """Whether eval mode computes what PEFT would from the factors alone."""
        p = self.state.diagonal(self.rank)
        return bool(torch.isclose(p, torch.full_like(p, self.initial_scale), rtol=1e-9, atol=0).all())

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        gate = self.checked_gate(module, x.device, x)
        is_embedding = active_adapter in module.lora_embedding_A
        update = (self._embedded if is_embedding else self._update)(module, active_adapter, x, gate)
        if gate.scale is not None:  # a GPU would round it to half precision, as CPUs and PEFT's own number are not
            update = (update.to(torch.promote_types(update.dtype, torch.float32)) * gate.scale).to(update.dtype)
        ratio = self.ratio(module, active_adapter)
        if ratio != 1:
            update = update * ratio
        # Gemma's embeddings multiply their output; the update belongs inside that factor.
        inside = embed_scale(module) if is_embedding else None
        return result + (update if inside is None else update * inside.to(update.dtype))

    def _update(self, module: Any, adapter: str, x: Tensor, gate: Gate) -> Tensor:
        lora_A, lora_B = module.lora_A[adapter], module.lora_B[adapter]
        spatial = lora_A.weight.ndim - 2
        hidden = _call(lora_A, module.lora_dropout[adapter](x), gate.learning(lora_A.weight, dim=0))
        return _call(lora_B, gate.apply(hidden, spatial), gate.learning(lora_B.weight, dim=1))

    def _embedded(self, module: Any, adapter: str, x: Tensor, gate: Gate) -> Tensor:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        learning_A, learning_B = gate.learning(A, dim=0), gate.learning(B, dim=1)
        hidden = embedded(module, x, (A if learning_A is None else learning_A).T)
        return gate.apply(hidden) @ (B if learning_B is None else learning_B).T

    def _check_recomputation(self, module: nn.Module, gate: Gate) -> None:
        """Gradient checkpointing runs the forward again inside backward: it must see the same diagonal."""
        if torch.compiler.is_compiling():
            return
        node = backward_node()
        if node is None:
            return
        then = self._gates_at(node)
        if then is not None and then[module.training] is not gate:
            raise MatryoshkaError(
                "gradient checkpointing recomputes a layer with other ranks than its forward had: "
                "call backward() inside the same `with adapter.rows(...)` as the forward"
            )

    def _check_rows(self, module: nn.Module, gate: Gate, x: Tensor) -> None:
        """The first dimension of x must be the rows of the model's call, and no other thing of the same number."""
        rows, given, first = self.rows.rows, gate.diagonal.shape[0], x.shape[0]
        per_row = gate.diagonal.ndim > 1
        text_only = None if gate.uniform else self.rows.text_only
        if text_only is not None and id(module) not in text_only and rows in (None, first):
            raise MatryoshkaError(
                f"the model got images, video or audio beside a text, and a layer got {first} that may be those and "
                "are not known to be one for each row: give each row one, take set_rank and a rule other than "
                "'stratified', or leave layers outside the language model out of target_modules"
            )
        if rows is None or (self.takes_rows_first and not per_row):
            return
        if per_row and self.rows.exact and rows != given and not gate.allow_fewer:
            raise wrong_number(given, rows)
        others = x.shape[1:] if isinstance(module, Embedding) else x.shape[1:-1]
        shows = is_conv(module) or (len(others) > 0 and rows not in others)
        if first == rows and shows and not self.takes_rows_first:
            self.takes_rows_first = True
            self.rows.unproven -= 1
        if gate.uniform:
            return
        if first != rows:
            raise MatryoshkaError(
                f"the model was called with {rows} rows, and the input of a layer begins with {first} of something "
                f"else (shape {list(x.shape)}): tokens, windows, images, or a part of the rows. No row has a rank of "
                "its own there: take set_rank and a rule other than 'stratified', or leave such layers out of "
                "target_modules"
            )
        if rows in others and not self.takes_rows_first:
            raise MatryoshkaError(
                f"there are {rows} rows and {rows} of something else in the input of a layer (shape {list(x.shape)}), "
                "which has not yet shown which of them it takes first: call the model once with another length, for "
                "example padded by a token"
            )

    def _gates_at(self, number: int) -> tuple[Gate | None, Gate | None] | None:
        """The gates of eval and of training mode that applied when autograd made its node of that number."""
        return next((gates for since, gates in reversed(self._history) if since <= number), None)

    def _remember(self) -> None:
        gates = (self.override or self.deployed, self.override or self.training)
        self._history = [*self._history[-31:], (next_node(), gates)]

    def begin_step(self, gate: Gate) -> None:
        """Train with this gate from now on."""
        self.training = gate
        self.rows.in_training = not gate.uniform
        self._remember()

    def stand_before(self, gate: Gate) -> None:
        """Let a gate stand before the rule's and the chosen rank's, until it stands back."""
        self._standing.append(gate)
        self._use_last()

    def stand_back(self, gate: Gate) -> None:
        """End it for this gate, which need not be the last."""
        self._standing.remove(gate)
        self._use_last()

    def _use_last(self) -> None:
        self.override = self._standing[-1] if self._standing else None
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

    def check_mergeable(self, module: LoraLayer) -> None:
        """Raises MatryoshkaError where another layer would change too, or PEFT would misread the base weight."""
        _check_layout(module)
        weight = get_weight(module)
        for name, other in self.sharing.items():
            if any(weight is parameter for parameter in other.parameters(recurse=False)):
                raise MatryoshkaError(
                    f"the base weight is also that of {name}, which merging would change as well. Use the adapter "
                    "without merging; or give one of the two layers a copy of the weight, and merge then"
                )

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.check_mergeable(module)
        return _add(module, orig_weight, self.merged_delta(module, active_adapter))

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        _check_layout(module)
        delta, self._merged = self.merged_delta(module, active_adapter, again=True), None
        return _add(module, orig_weight, -delta)


def _check_layout(module: LoraLayer) -> None:
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
