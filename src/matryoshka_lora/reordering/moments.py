"""What data do to the directions of a reordered adapter (``by="activations"`` and ``by="loss"``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.reordering.factors import reweigh_factors
from matryoshka_lora.reordering.model import AdapterInModel, Data

ROWS = 128
"""How many are looked at, unless told otherwise."""

BATCH_ROWS = 8


class Moments(NamedTuple):
    """What data do to one layer.

    Attributes:
        inner: The second moment of ``A x``, shape (R, R), float64.
        outer: The second moment of ``B^T g``, shape (R, R), float64; None where gradients were not asked for.
    """

    inner: Tensor
    outer: Tensor | None = None


def reweigh(
    adapter: AdapterInModel,
    data: Data,
    gradients: bool,
    rows: int = ROWS,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda rows: None,
) -> dict[str, Tensor]:
    """Reorder a reordered adapter once more, by what its directions do to data; see `reweigh_factors`.

    Args:
        adapter: A reordered one.
        data: Rows of the training data, or of data like it.
        gradients: Whether the change of the loss is made small, or that of each layer's outputs.
        rows: How many are looked at.
        seed: Of which rows are taken.
        on_step: Called with the number of rows of each batch, after it.

    Returns:
        The singular values in this sense, by layer, float64. A layer that no token reached keeps its order; its values
        are those of its update.

    Raises:
        MatryoshkaError: A moment is not finite. The adapter is unchanged then.
    """
    moments = measure_moments(adapter, data, gradients, rows, seed, on_step)
    scale = adapter.state.nesting.scale  # the same for all layers, so that it changes no order within one
    spectra, new = {}, {}
    for name, (A, B) in adapter.factors().items():
        if name in moments:
            new_A, new_B, values = reweigh_factors(A, B, *moments[name])
            new[name], spectra[name] = (new_A, new_B), values * scale
        else:
            spectra[name] = A.double().norm(dim=-1) * B.double().norm(dim=-2) * scale
    adapter.put_factors(new)
    return spectra


def measure_moments(
    adapter: AdapterInModel,
    data: Data,
    gradients: bool,
    rows: int = ROWS,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda rows: None,
) -> dict[str, Moments]:
    """The second moments at each layer's factors, over the tokens of some rows, at full rank.

    Without gradients, those of ``A x`` over all tokens. With them, those of ``A x`` and of ``B^T dL/dy``, each token
    weighted by the squared size of the other. That is one step of the power iteration to the nearest Kronecker product
    of the Fisher matrix, where K-FAC would take them for independent; a token without gradient then counts for nothing.

    Args:
        adapter: A reordered one.
        data: Rows of the training data, or of data like it.
        gradients: Whether the loss is differentiated.
        rows: How many are looked at.
        seed: Of which rows are taken.
        on_step: Called with the number of rows of each batch, after it.

    Returns:
        By layer. Layers that have no factor modules (embeddings, stacks of experts) are left out, as are those that no
        token reached.

    Raises:
        MatryoshkaError: A moment is not finite.
    """
    training = adapter.model.training
    frozen = [parameter for parameter in adapter.parameters() if not parameter.requires_grad]
    probes = {name: _Probe(module, gradients) for name, module in adapter.inner_modules().items()}
    top = adapter.state.diagonal(adapter.state.nesting.max_rank)
    adapter.model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(gradients)
        with ExitStack() as hooks, torch.set_grad_enabled(gradients), adapter.standing(top):
            for probe in probes.values():
                hooks.enter_context(probe)
            for parts in data.steps(rows, BATCH_ROWS, seed):
                for part in parts:
                    for probe in probes.values():
                        probe.mask = part.mask
                    loss = part.loss() * part.weight
                    if gradients:
                        loss.backward()  # type: ignore[no-untyped-call]
                    adapter.model.zero_grad(set_to_none=True)
                on_step(sum(part.rows for part in parts))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        adapter.model.train(training)
    found = {name: Moments(probe.inner, probe.outer) for name, probe in probes.items() if probe.tokens}
    for name, moments in found.items():
        if not all(bool(moment.isfinite().all()) for moment in moments if moment is not None):
            raise NotFiniteError(
                f"layer {name} computes NaN or infinity on the data: take a base model in bf16 or fp32"
            )
    return found


class _Probe:
    """Adds up the moments of one layer while it is entered."""

    def __init__(self, module: Any, gradients: bool) -> None:
        self.module = module
        rank = module.weight.shape[0]
        self.inner = torch.zeros(rank, rank, dtype=torch.float64)
        self.outer = torch.zeros(rank, rank, dtype=torch.float64) if gradients else None
        self.tokens = 0
        self.mask: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> None:
        self._hook = self.module.register_forward_hook(self._forward)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _forward(self, module: nn.Module, inputs: Any, hidden: Tensor) -> None:
        if self.outer is None:
            self._add(self._kept(hidden), None)
        else:
            hidden.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(self._kept(hidden), self._kept(gradient))
            )

    def _kept(self, hidden: Tensor) -> Tensor:
        """One row per token, shape (tokens, R), without padding where the layer still has the batch's rows."""
        hidden = hidden.detach()
        if self.mask is not None and hidden.shape[:-1] == self.mask.shape:
            return hidden[self.mask].float()
        if hidden.ndim > 3:  # convolutions: the rank is the second dimension
            hidden = hidden.movedim(1, -1)
        return hidden.reshape(-1, hidden.shape[-1]).float()

    def _add(self, hidden: Tensor, gradient: Tensor | None) -> None:
        self.tokens += len(hidden)
        if gradient is None or self.outer is None:
            self.inner += (hidden.T @ hidden).cpu().double()
            return
        # Scaled before they are squared: a gradient of one token among many is small.
        weight_in, weight_out = gradient.norm(dim=1, keepdim=True), hidden.norm(dim=1, keepdim=True)
        left, right = hidden * weight_in, gradient * weight_out
        self.inner += (left.T @ left).cpu().double()
        self.outer += (right.T @ right).cpu().double()
