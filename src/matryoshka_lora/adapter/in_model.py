"""One nested adapter in all layers of a model: which hold it, what stands between its factors, how it is reordered."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import assign, get_factors, get_gradients, get_parameters, has_adapter, has_modules
from matryoshka_lora.adapter.gate import Gate, RowCount, main_input, wrong_number
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.layout import as_parameters, layer_name
from matryoshka_lora.state import By, State

COPIES = ("ref", "teacher")
"""What TRL names a copy of the adapter that it trains: as it was before training, and its moving average."""


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The LoRA layers that hold an adapter, nested or not, by their names in the base model."""
    for name, module in model.named_modules():
        if has_adapter(module, adapter):
            yield layer_name(name), module


def nested_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, NestedVariant]]:
    """The layers that hold a nested adapter, each with what stands between its factors."""
    for name, module in lora_layers(model, adapter):
        variant = module.lora_variant.get(adapter)
        if isinstance(variant, NestedVariant):
            yield name, module, variant


def checked_layers(model: nn.Module, adapter: str) -> list[tuple[str, Any, NestedVariant]]:
    """All layers of a nested adapter, as `nested_layers`.

    Raises:
        MatryoshkaError: There is none, or PEFT has made the adapter anew in one of them.
    """
    nested = list(nested_layers(model, adapter))
    if not nested:
        raise MatryoshkaError(f"the model has no nested adapter {adapter!r}: call nest() or load() first")
    plain = {name for name, _ in lora_layers(model, adapter)} - {name for name, _, _ in nested}
    if plain:
        raise MatryoshkaError(
            f"PEFT has made adapter {adapter!r} anew in layer {min(plain)} after it was nested: call nest() again"
        )
    return nested


def check_names(model: nn.Module, adapters: Collection[str]) -> None:
    """Refuse adapters with a name that stands in the keys of adapters' weights: PEFT takes such weights for theirs.

    It would leave them out of the files of all other adapters. One that is alone may have any name.

    Raises:
        MatryoshkaError: There is such an adapter.
    """
    if len(adapters) == 1:
        return
    found = {"weight": "weight", "bias": "bias"}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            parts = name.split(".")
            found |= {part: ".".join(parts[: place + 1]) for place, part in enumerate(parts)}
            inside = [child for child, _ in module.named_children()]
            if isinstance(module, AuxiliaryTrainingWrapper):
                inside += [part for below, _ in module.original_module.named_modules() for part in below.split(".")]
            found |= {part: f"{name}.{part}" for part in inside}
    for adapter in adapters:
        if adapter in found:
            raise MatryoshkaError(
                f"adapter {adapter!r} has the name of a part of the model, {layer_name(found[adapter])}: PEFT would "
                "leave what is below that part out of the files of all other adapters. Give the adapter another name; "
                f"if the model has it already, call delete_adapter({adapter!r}) first"
            )


def gated(
    model: nn.Module,
    adapter: str,
    diagonal: Tensor,
    allow_fewer: bool = False,
    exact: bool = True,
    learn: Tensor | None = None,
) -> list[tuple[NestedVariant, Gate]]:
    """Every layer's variant with a gate where its factors are now: a Trainer moves the model after `nest`."""
    made: dict[torch.device, Gate] = {}
    found = []
    for _, module, variant in nested_layers(model, adapter):
        device = get_parameters(module, adapter)[0].device
        if device not in made:
            made[device] = Gate.on(device, diagonal, None, allow_fewer, exact, learn)
        found.append((variant, made[device]))
    return found


def draw(model: nn.Module, adapter: str, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Apply the rule's draw for an optimizer step; see `matryoshka_lora.NestedAdapter.draw`."""
    index, count = share
    state = next(nested_layers(model, adapter))[2].state
    drawn = state.draw(step, None if rows is None else rows * count)
    diagonal = drawn.diagonal
    if diagonal.ndim > 1 and rows is not None:
        diagonal = diagonal[index * rows : (index + 1) * rows]
    for variant, gate in gated(model, adapter, diagonal, allow_fewer=True, learn=drawn.learn):
        variant.begin_step(gate)


def begin(model: nn.Module, adapter: str) -> None:
    """Apply an adapter's state: its rank in eval mode and, where it is fixed, its diagonal in training.

    A rank that the state does not know any more becomes the largest.
    """
    for _, _, variant in nested_layers(model, adapter):
        state = variant.state
        variant.set_rank(variant.rank if variant.rank in state.ranks else state.nesting.max_rank)
    if not state.draws:
        draw(model, adapter, step=0)


def no_copies(model: PeftModel, layers: Sequence[tuple[str, Any]], adapter: str) -> set[str]:
    """The plain adapters that have the name of a copy, as TRL calls them, and other factors than the adapter."""
    there = [name for name in COPIES if name in model.peft_config and not any(nested_layers(model, name))]
    return {name for name in there if not all(_is_copy(module, name, adapter) for _, module in layers)}


def _is_copy(module: Any, name: str, adapter: str) -> bool:
    """Whether one adapter has the factors of another in a layer, up to the rounding to the dtype of one of them."""
    if not has_adapter(module, name):
        return False
    pairs = list(zip(get_parameters(module, name), get_parameters(module, adapter), strict=True))
    return all(
        a.device == b.device and (torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))) for a, b in pairs
    )


@torch.no_grad()
def nest_copies(model: PeftModel, adapter: str) -> dict[str, State]:
    """Nest the copies that TRL keeps of a nested adapter, as far as they are not, and return their states by name.

    DPO, KTO, GRPO and RLOO measure how far training has gone from adapter "ref"; SDFT and SDPO learn from "teacher".
    TRL adds both by the nested adapter's own config and fills in its factors. Without p between them, they would be
    another function than what they are copies of. An adapter of such a name that was there before, or that has factors
    of its own, is none: call this while the factors still are what they are copies of.
    """
    config = model.peft_config[adapter]
    states: dict[str, State] = {}
    for name in COPIES:
        if name == adapter or model.peft_config.get(name) != config:
            continue
        layers = [module for _, module in lora_layers(model, name)]
        plain = [
            (module, original)
            for module in layers
            if module.lora_variant.get(name) is None
            and isinstance(original := module.lora_variant.get(adapter), NestedVariant)
            and name not in original.apart
        ]
        found = (module.lora_variant.get(name) for module in layers)
        state = next((variant.state for variant in found if isinstance(variant, NestedVariant)), None)
        if plain and all(_is_copy(module, name, adapter) for module, _ in plain):
            # A state of their own, since the adapter may be reordered and its copies are not.
            state = state or replace(plain[0][1].state)
            for module, original in plain:
                module.lora_variant[name] = original.copied(state, module, name)
        if state is not None:
            states[name] = state
    return states


def check_prompts(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs of ``generate`` that are not as many as the rows with ranks; later, beams are rows too.

    Raises:
        MatryoshkaError: As a forward pass does.
    """
    counted: RowCount = model.base_model.row_count
    counted.forget()
    _, prompts = main_input(model, args, kwargs)
    # transformers repeats the prompts before the first forward pass: a rank may be one of a prompt or of an answer.
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    times = max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)
    for adapter in model.active_adapters:
        for _, module, variant in islice(nested_layers(model, adapter), 1):
            gate = None if module.disable_adapters else variant.override
            given = 0 if gate is None or gate.diagonal.ndim == 1 else len(gate.diagonal)
            if prompts is not None and given and given not in (len(prompts), len(prompts) * times):
                raise wrong_number(given, len(prompts))


class InModel:
    """One nested adapter of a PEFT model.

    Args:
        model: The PEFT model.
        name: The adapter's.

    Raises:
        MatryoshkaError: There is none, or PEFT has made it anew in a layer. So do `state`, `rank` and `draw`.
    """

    def __init__(self, model: PeftModel, name: str) -> None:
        self.model, self.name = model, name
        self._layers = [(layer, module) for layer, module, _ in checked_layers(model, name)]

    @property
    def state(self) -> State:
        """What all layers share."""
        return checked_layers(self.model, self.name)[0][2].state

    @property
    def rank(self) -> int | dict[str, int]:
        """The rank in eval mode: one number, or one for each layer where they differ."""
        ranks = {name: variant.rank for name, _, variant in checked_layers(self.model, self.name)}
        return ranks if len(set(ranks.values())) > 1 else next(iter(ranks.values()))

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows of a batch are still rows in every layer; not so where tokens are routed to experts."""
        return not any(".experts." in f".{name}." or isinstance(module, ParamWrapper) for name, module in self._layers)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A of shape (R, in) and B of shape (out, R) of each layer; stacked experts are a leading dimension. Copies."""
        found = {name: get_factors(module, self.name) for name, module in self._layers}
        return {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in found.items()}

    @torch.no_grad()
    def put_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write factors, of the shapes of `factors`, into the layers that are named."""
        for name, module in self._layers:
            if name in factors:
                parameters = get_parameters(module, self.name)
                new = as_parameters(*factors[name], parameters[0].shape, parameters[1].shape)
                for parameter, value in zip(parameters, new, strict=True):
                    assign(parameter, value)

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the last loss by each layer's factors, in the shapes of `factors`; zero where there is none."""
        return {name: get_gradients(module, self.name) for name, module in self._layers}

    def parameters(self) -> list[Tensor]:
        """What PEFT trains of the nested layers."""
        return [parameter for _, module in self._layers for parameter in get_parameters(module, self.name)]

    def inner_modules(self) -> dict[str, nn.Module]:
        """The modules that compute ``A x``, by layer. Embeddings and bare parameters have none."""
        return {name: module.lora_A[self.name] for name, module in self._layers if has_modules(module, self.name)}

    def set_reordered(self, by: By, spectra: Mapping[str, Tensor]) -> None:
        """Say that the factors have been reordered: from now on the scale of R stands between them."""
        state = self.state
        state.reordered, state.deploy, state.spectra = by, "reordered", spectra
        begin(self.model, self.name)

    def draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Apply the rule's draw, to the copies that TRL keeps too; see `matryoshka_lora.NestedAdapter.draw`."""
        names = (self.name, *nest_copies(self.model, self.name))
        if self.state.reordered:
            warnings.warn(
                f"adapter {self.name!r} was reordered, and is trained on: its order is lost. Call reorder() again "
                "after training",
                stacklevel=2,
            )
            for name in names:
                InModel(self.model, name).state.end_order()
                begin(self.model, name)
        for name in names:
            draw(self.model, name, step, rows, share)

    @contextmanager
    def standing(self, diagonal: Tensor, exact: bool = True) -> Iterator[None]:
        """A context in which this diagonal, (R,) or (rows, R), stands in every layer, in training and in eval mode.

        Of several that are open, the one that was opened last counts, in whichever order they end.
        """
        if self.name not in self.model.active_adapters:
            raise MatryoshkaError(
                f"adapter {self.name!r} is not active, {', '.join(self.model.active_adapters)} is: call "
                f"adapter.model.set_adapter({self.name!r}) first"
            )
        gates = gated(self.model, self.name, diagonal, exact=exact)
        rows, differ = gates[0][0].rows, not gates[0][1].uniform
        with rows.opened():
            rows.forget()
            rows.contexts += differ
            for variant, gate in gates:
                variant.stand_before(gate)
            try:
                yield
            finally:
                rows.contexts -= differ
                for variant, gate in gates:
                    variant.stand_back(gate)


def unmerge(layers: Sequence[Any], adapter: str) -> None:
    """Undo the merge of a nested adapter; PEFT's own ``unmerge_adapter`` would take out all that are merged.

    Args:
        layers: PEFT's modules that hold the adapter.
        adapter: Its name.

    Raises:
        MatryoshkaError: An adapter of another kind was merged on top of it. Nothing has been changed then.
    """
    merged = [module for module in layers if adapter in module.merged_adapters]
    for module in merged:
        for other in module.merged_adapters[module.merged_adapters.index(adapter) :]:
            if not isinstance(module.lora_variant.get(other), NestedVariant | None):
                raise MatryoshkaError(
                    f"adapter {other!r} is of another kind and was merged on top of {adapter!r}: take both out "
                    "with adapter.model.unmerge_adapter()"
                )
    for module in merged:
        others = [name for name in module.merged_adapters if name != adapter]
        module.merged_adapters = [adapter]
        module.unmerge()
        module.merged_adapters = others
