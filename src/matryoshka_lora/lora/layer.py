"""A layer of a LoRA: its shapes and its factors, which are read when they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError, short
from matryoshka_lora.linalg.arrays import (
    BFLOAT16,
    FLOATS,
    FLOATS8,
    Array,
    DType,
    Float64Array,
    cast,
    common_dtype,
    is_finite,
)
from matryoshka_lora.linalg.factors import singular_values
from matryoshka_lora.linalg.kronecker import KroneckerSVD

LayerKind = Literal["LoRA", "LoHa", "LoKr"]
"""The parametrizations of a layer's update."""


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and the shape of a tensor. bfloat16 and float8 are the dtypes of ml_dtypes."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor that is read when it is used. ``read`` returns it as an array."""

    read: Callable[[], Array] = field(repr=False)

    @classmethod
    def from_array(cls, array: Array) -> StoredTensor:
        """Return a tensor that is in memory already."""
        return cls(array.dtype, array.shape, lambda: array)

    @property
    def is_float8(self) -> bool:
        """Whether the dtype is a float8."""
        return self.dtype in FLOATS8.values()

    def widened(self) -> StoredTensor:
        """Return a float8 tensor as bfloat16, which represents it exactly, and others unchanged.

        New factors are not rounded to float8: that adds an error of 4 to 7 %.
        """
        if not self.is_float8:
            return self
        return StoredTensor(BFLOAT16, self.shape, lambda: self.read().astype(BFLOAT16))

    def transposed(self) -> StoredTensor:
        """Return the transpose of a matrix."""
        return StoredTensor(self.dtype, self.shape[::-1], lambda: self.read().T)

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating one of at least 16 bits."""
        return self.dtype in FLOATS.values()

    @property
    def is_factor(self) -> bool:
        """Whether a LoRA factor may have this dtype and shape."""
        return self.is_float and len(self.shape) > 1 and 0 not in self.shape


def sum_tensors(key: str, terms: Sequence[tuple[float, StoredTensor]]) -> StoredTensor:
    """Return the weighted sum of tensors, which is computed when it is read.

    Args:
        key: The key of the sum, for messages.
        terms: The weight of each tensor, and the tensor.

    Raises:
        MatryoshkaError: The shapes differ.
    """
    shapes = {tensor.shape for _, tensor in terms}
    if len(shapes) > 1:
        raise MatryoshkaError(
            f"{short(key)} has the different shapes {sorted(map(list, shapes))}. Pass LoRAs of one "
            "base model."
        )
    shape = shapes.pop()
    dtype = common_dtype(tensor.dtype for _, tensor in terms)

    def read() -> Array:
        total = np.zeros(shape)
        for weight, tensor in terms:
            total += weight * tensor.read().astype(np.float64)
        result = cast(total, dtype)
        if not np.isfinite(result).all():
            raise NotFiniteError(f"{short(key)} of the output is NaN, or too large for {dtype}.")
        return result

    return StoredTensor(dtype, shape, read)


def are_factors(A: StoredTensor, B: StoredTensor) -> bool:
    """Return whether two tensors may be the factors of one linear layer or convolution."""
    return (
        A.is_factor
        and B.is_factor
        and len(A.shape) == len(B.shape)
        and A.shape[0] == B.shape[1]
        and all(size == 1 for size in B.shape[2:])
    )


class Factors(NamedTuple):
    """The factors of a layer as matrices. Leading dimensions are experts.

    Attributes:
        A: Shape (..., R, in). The kernel of a convolution is flattened.
        B: Shape (..., out, R).
        squared_errors: If the layer was truncated, the squared error of each rank from 0 to the
            rank before: shape (R + 1,), float64, summed over experts.
        singular_values: If the factors were reordered, the singular values of the update before,
            shape (..., R), float64, decreasing.
    """

    A: Array
    B: Array
    squared_errors: Float64Array | None = None
    singular_values: Float64Array | None = None

    def padded_errors(self, rank: int) -> Float64Array | None:
        """Return the squared errors after padding to a rank: a larger rank misses as much."""
        if self.squared_errors is None:
            return None
        padded: Float64Array = self.squared_errors[
            np.minimum(np.arange(rank + 1), self.A.shape[-2])
        ]
        return padded


class LayerKeys(NamedTuple):
    """The keys of a layer's tensors in its file: the factors, and the alpha if there is one."""

    A: str
    B: str
    alpha: str | None = None


@dataclass(frozen=True)
class Layer:
    """A layer with the update ``scale B A``.

    Attributes:
        name: The name of the module in the base model, or of the pair of factors in a single file.
        rank: The rank of the factors.
        scale: The scale of the update.
        in_shape: The shape of an input: (in,), or (in, *kernel) of a convolution.
        out_features: The number of outputs.
        dtype: The dtype in which the factors are written. `read` may return a wider one.
        read: Returns the factors; raises NotFiniteError if they are NaN or infinite.
        keys: The keys in the file.
        num_experts: The number of stacked pairs.
        kind: LoRA, or the parametrization that `read` computes the factors from.
        read_svd: Returns the singular value decomposition of ``B A``, if that is known without the
            factors, as with LoKr.
        has_new_factors: Whether the factors were computed, so that a format may choose their scale.
        weighted_values: If the factors have the order ``"weighted"``, the weighted singular value
            of each component: shape (R,), float64, decreasing. Half of its square is about the
            Kullback-Leibler divergence of the outputs, in nats per token, without the component. In
            a pipeline, its square is about the squared change of the latents in a step.
    """

    name: str
    rank: int
    scale: float
    in_shape: tuple[int, ...]
    out_features: int
    dtype: DType
    read: Callable[[], Factors] = field(repr=False)
    keys: LayerKeys
    num_experts: int = 1
    kind: LayerKind = "LoRA"
    read_svd: Callable[[], KroneckerSVD] | None = field(default=None, repr=False)
    has_new_factors: bool = False
    weighted_values: Float64Array | None = None

    @classmethod
    def from_tensors(
        cls,
        name: str,
        A: StoredTensor,
        B: StoredTensor,
        scale: float,
        keys: LayerKeys,
        num_experts: int = 1,
        source: str = "",
    ) -> Layer:
        """Return a layer of two tensors of a file, which `are_factors` accepts.

        A has the shape (R, in, *kernel), and B (out, R, 1, ...). PEFT's stacks of experts have A
        (experts * R, in) and B (out, R * experts), with the expert index varying fastest.

        Args:
            name: The name of the layer.
            A: The tensor of A.
            B: The tensor of B.
            scale: The scale of the update.
            keys: The keys of the tensors.
            num_experts: The number of stacked pairs.
            source: The path of the file, for messages.
        """
        rank = A.shape[0] // num_experts

        def read() -> Factors:
            matrix_A, matrix_B = A.read(), B.read()
            matrix_B = matrix_B.reshape(len(matrix_B), -1)
            if num_experts == 1:
                matrix_A = matrix_A.reshape(rank, -1)
            else:
                matrix_A = matrix_A.reshape(num_experts, rank, -1)
                matrix_B = matrix_B.reshape(len(matrix_B), rank, num_experts).transpose(2, 0, 1)
            for matrix in (matrix_A, matrix_B):
                if not is_finite(matrix):
                    raise NotFiniteError(
                        f"{source}: the factors of {name} are NaN or infinite. If training "
                        "diverged, train again with a lower learning rate."
                    )
            return Factors(matrix_A, matrix_B)

        # A pair of different dtypes is written in one that represents both.
        dtype = common_dtype((A.dtype, B.dtype))
        return cls(name, rank, scale, A.shape[1:], B.shape[0], dtype, read, keys, num_experts)

    @property
    def shape_A(self) -> tuple[int, ...]:
        """The shape of A in a file."""
        return (self.rank * self.num_experts, *self.in_shape)

    @property
    def shape_B(self) -> tuple[int, ...]:
        """The shape of B in a file."""
        return (self.out_features, self.rank * self.num_experts, *[1] * (len(self.in_shape) - 1))

    @property
    def parameters_per_rank(self) -> int:
        """in + out, times the number of experts."""
        return (math.prod(self.in_shape) + self.out_features) * self.num_experts

    def to_tensors(self, factors: Factors) -> tuple[Array, Array]:
        """Return factors of this layer's rank with the shapes that they have in a file."""
        A, B = factors.A, factors.B
        if self.num_experts > 1:
            B = B.transpose(1, 2, 0)
        return A.reshape(self.shape_A), B.reshape(self.shape_B)

    def singular_values(self) -> Float64Array:
        """Return the singular values of the update, shape (..., R), float64, decreasing."""
        if self.read_svd is not None:
            return self.scale * self.read_svd().values
        factors = self.read()
        return self.scale * singular_values(factors.A, factors.B)

    def map(self, function: Callable[[Factors], Factors], **changes: object) -> Layer:
        """Return a layer whose factors are computed from the factors of this one.

        Args:
            function: Maps the factors.
            changes: Further fields of the new layer.
        """
        changes = {"read": lambda: function(self.read()), "read_svd": None, **changes}
        new: Layer = replace(self, **changes)  # type: ignore[arg-type]
        return new

    def with_scale(self, scale: float) -> Layer:
        """Return a layer with another scale and the same update.

        About half of the ratio of the scales is multiplied into A, so that fp16 can represent both
        factors. It is a power of two, so that A is exact.
        """
        if scale == self.scale:
            return self
        ratio = self.scale / scale
        ratio_A = 2.0 ** round(math.log2(ratio) / 2)

        def rescale(factors: Factors) -> Factors:
            return factors._replace(
                A=factors.A.astype(np.float64) * ratio_A,
                B=factors.B.astype(np.float64) * (ratio / ratio_A),
            )

        return self.map(rescale, scale=scale)
