"""What reordering asks of an adapter in a model, and of the data that it learns from.

This room stands below the one that knows PEFT: `matryoshka_lora.NestedAdapter` is such an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from typing import Any, NamedTuple, Protocol, get_args

from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.state import By, State

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A of shape (R, in) and B of shape (out, R) by the layer's name, with a leading dimension for experts."""


class AdapterInModel(Protocol):
    """A nested adapter on its base model."""

    model: Any

    @property
    def state(self) -> State:
        """How it is trained and deployed."""

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows of a batch are still rows in every layer, so that each may have a rank of its own."""

    def factors(self) -> Factors:
        """Of all layers, as they are now."""

    def put_factors(self, factors: Factors) -> None:
        """Write factors of these shapes into the model."""

    def gradients(self) -> Factors:
        """Of the last loss, in the shapes of `factors`."""

    def parameters(self) -> list[Tensor]:
        """What PEFT trains."""

    def inner_modules(self) -> Mapping[str, nn.Module]:
        """The modules that compute ``A x``, by layer; layers without such a module are left out."""

    def set_reordered(self, by: By, spectra: Mapping[str, Tensor]) -> None:
        """Say that the factors have been reordered, and which singular values were found."""

    def standing(self, diagonal: Tensor, exact: bool = True) -> AbstractContextManager[None]:
        """A context in which this diagonal, (R,) or (rows, R), stands between the factors."""


class Part(NamedTuple):
    """A part of the rows of a step, as many as fit into memory together.

    Attributes:
        rows: How many.
        weight: Of its loss in that of the step: the number of its answers' tokens.
        mask: Which of its tokens are no padding, bool, shape (rows, tokens), or None.
        loss: Computes its mean loss, with the model in the mode that it has.
        shared: Whether the processes of torch.distributed share the parts of a step; else each computes all of them.
    """

    rows: int
    weight: float
    mask: Tensor | None
    loss: Callable[[], Tensor]
    shared: bool = False


class Data(Protocol):
    """Rows to learn from.

    Attributes:
        quiet: Whether no progress is shown.
        rate: The learning rate that the adapter was trained with, if that is known.
        seen: How many rows it was trained on, each as often as it came, if that is known.
        held_out: Rows that are kept for evaluation, if there are any: what was learned is judged on them.
    """

    quiet: bool
    rate: float | None
    seen: int | None

    @property
    def held_out(self) -> Data | None:
        """See above."""

    def __len__(self) -> int:
        """How many there are."""

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[Sequence[Part]]:
        """So many rows, ``at_once`` in a step; the last step has what is left.

        Their order is random and depends on the seed. A row comes again when all have come.
        """


def check_by(by: str, has_data: bool, rows: int | None = None) -> None:
    """Raises MatryoshkaError unless ``by`` is a way to reorder, and there are data where it needs some."""
    if rows is not None and (not isinstance(rows, Integral) or rows < 1):
        raise MatryoshkaError(f"rows is {rows!r}; take 1 or more")
    if by not in get_args(By):
        raise MatryoshkaError(f"by is {by!r}; write one of {', '.join(map(repr, get_args(By)))}")
    if by == "svd" and has_data:
        raise MatryoshkaError("data are for by='activations', 'loss', 'learned' and 'trained'; name one of them")
    if by != "svd" and not has_data:
        raise MatryoshkaError(f"by={by!r} needs data: rows with prompt and completion (--data), or a Trainer")
