"""A nested adapter in a model as `matryoshka_lora.reordering` sees it: factors, gradients, and what stands between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from matryoshka_lora.adapter.copies import nest_copies
from matryoshka_lora.adapter.factors import assign, get_factors, get_gradients, get_parameters, has_modules
from matryoshka_lora.adapter.gates import begin, checked_layers, draw, gated
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.layout import as_parameters
from matryoshka_lora.state import By, State


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

    def set_reordered(self, by: By) -> None:
        """Say that the factors have been reordered: from now on the scale of R stands between them."""
        state = self.state
        state.reordered, state.deploy = by, "reordered"
        begin(self.model, self.name)

    def draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Apply the rule's draw, to the copies that TRL keeps too; see `matryoshka_lora.NestedAdapter.draw`."""
        checked_layers(self.model, self.name)
        for name in (self.name, *nest_copies(self.model, self.name)):
            draw(self.model, name, step, rows, share)

    @contextmanager
    def standing(self, diagonal: Tensor, exact: bool = True) -> Iterator[None]:
        """A context in which this diagonal, (R,) or (rows, R), stands in every layer, in training and in eval mode."""
        if self.name not in self.model.active_adapters:
            raise MatryoshkaError(
                f"adapter {self.name!r} is not active, {', '.join(self.model.active_adapters)} is: call "
                f"adapter.model.set_adapter({self.name!r}) first"
            )
        gates = gated(self.model, self.name, diagonal, exact=exact)
        before = [variant.override for variant, _ in gates]
        for variant, gate in gates:
            variant.stand_before(gate)
        rows, differ = gates[0][0].rows, not gates[0][1].uniform
        rows.contexts += differ
        try:
            yield
        finally:
            rows.contexts -= differ
            for (variant, _), override in zip(gates, before, strict=True):
                variant.stand_before(override)
