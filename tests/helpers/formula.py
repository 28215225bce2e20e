"""Compare a nested layer in fp64, output and gradients, with the oracle."""

from __future__ import annotations

from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers import oracle
from helpers.models import NestedLayer, nested_layer
from matryoshka_lora import Nesting

ROWS = 5
KINDS = list(oracle.KINDS)

Form = Literal["paper", "trained", "reordered"]
FORMS: tuple[Form, ...] = ("paper", "trained", "reordered")
"""What eval mode computes: without P; with P, because nothing is reordered yet; reordered."""


@st.composite
def nestings(draw: st.DrawFn) -> Nesting:
    """Draw a nesting of ranks up to 12."""
    ranks = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=5)))
    scaling: Any = draw(st.sampled_from(["none", "rank", "sqrt"]))
    return Nesting(tuple(ranks), scaling, draw(st.floats(0.2, 4)))


def trained_p(nesting: Nesting) -> Tensor:
    """Return the paper's P."""
    return oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale)


def deployed_p(nesting: Nesting, rank: int, form: Form = "trained") -> Tensor:
    """Return the diagonal of a rank in eval mode, for an adapter of rule matryoshka."""
    if rank == 0:
        return torch.zeros(nesting.max_rank, dtype=torch.float64)
    if form == "paper":
        return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale)
    is_prefix = (torch.arange(nesting.max_rank) < rank).double()
    return is_prefix * (trained_p(nesting) if form == "trained" else nesting.scale)


def layer_in_form(kind: str, nesting: Nesting, form: Form, seed: int = 0) -> NestedLayer:
    """Return a layer of rule matryoshka, in train mode."""
    deploy = "paper" if form == "paper" else "reordered"
    nested = nested_layer(kind, nesting, "matryoshka", deploy, seed)
    if form == "reordered":
        nested.adapter.reorder()
    return nested


def random_input(nested: NestedLayer, rows: int = ROWS) -> Tensor:
    """Return an input that has a gradient, if it is not tokens."""
    x = nested.kind.batch(rows)
    return x.requires_grad_() if x.is_floating_point() else x


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal to 1e-12 of the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    error = float((actual.detach() - expected.detach()).abs().max())
    return error <= 1e-12 * max(1.0, float(expected.detach().abs().max()))


def output_and_gradients(output: Tensor, nested: NestedLayer, x: Tensor) -> list[Tensor]:
    """Return an output, and the gradients of a random linear function of it by A, B and x."""
    inputs = [*nested.factors]
    if x.requires_grad:
        inputs.append(x)
    torch.manual_seed(99)
    gradients = torch.autograd.grad(output, inputs, torch.randn_like(output))
    return [output.detach(), *gradients]


def matches(nested: NestedLayer, p: Tensor, x: Tensor) -> bool:
    """Return whether output and gradients of the model are those of the oracle for p."""
    actual = output_and_gradients(nested.adapter.model(x), nested, x)
    expected = output_and_gradients(nested.expected(p, x), nested, x)
    return all(map(is_close, actual, expected))


def perturbed(p: Tensor) -> Tensor:
    """Return a p that is slightly wrong in its first entry, for negative controls.

    In a layer narrower than R, reordering makes the last columns zero, so they would not show.
    """
    wrong_p = p.clone()
    wrong_p[..., 0] = wrong_p[..., 0] * (1 + 1e-5) + 1e-5
    return wrong_p
