"""Layers of LoHa and LoKr in a single file, as LoRA layers whose factors are computed when read.

LoHa's update is the elementwise product of two LoRAs, ``(B_1 A_1) * (B_2 A_2)``, with the keys
``NAME.hada_w1_a`` (B_1), ``NAME.hada_w1_b`` (A_1) and so on. LoKr's is the Kronecker product of two
matrices, ``NAME.lokr_w1`` and ``NAME.lokr_w2``; each may be a product of factors instead, such as
``NAME.lokr_w2_a`` and ``NAME.lokr_w2_b``. With a core, such as ``NAME.hada_t1``, a product is the
Tucker decomposition of a convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError, short
from matryoshka_lora.linalg.arrays import Float64Array, common_dtype
from matryoshka_lora.linalg.factors import SVD, svd_of_product
from matryoshka_lora.linalg.kronecker import KroneckerSVD, elementwise_product
from matryoshka_lora.lora.keys import KOHYA_SUFFIXES, PEFT_PREFIX
from matryoshka_lora.lora.layer import Factors, Layer, LayerKeys, StoredTensor

_KEY = re.compile(r"(?P<name>.+)\.(?P<matrix>(hada|lokr)_(w[12](_[ab])?|t[12]))")

# The largest number of inputs or outputs. A small file may name a Kronecker product of any size.
_MAX_SIZE = 2**20


def read_lycoris_layers(
    tensors: Mapping[str, StoredTensor],
    read_scale: Callable[[str, int, str | None], float],
    file_name: str,
) -> tuple[list[Layer], set[str]]:
    """Return the layers of LoHa and LoKr as LoRA layers of their exact rank, and their keys.

    Layers that DoRA rescales, layers with a scale of 0, and layers whose scale is not known are not
    among them.

    Args:
        tensors: The tensors of the file by key.
        read_scale: Returns the scale of a layer, which may be negative, from its name, the rank
            that alpha is divided by, and the key of its alpha.
        file_name: The path of the file, for messages.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            modules.setdefault(match["name"], {})[match["matrix"]] = tensor.widened()
    layers: list[Layer] = []
    keys: set[str] = set()
    for name, matrices in sorted(modules.items()):
        if f"{name}.dora_scale" in tensors:
            continue
        product = _create_product(name, matrices, file_name)
        if product.alpha_rank is None and name.startswith(PEFT_PREFIX):
            continue  # PEFT multiplies it by alpha / r, and r is in the config only
        # LyCORIS and ComfyUI do not use the alpha of a layer without factors.
        scale = 1.0
        if product.alpha_rank is not None:
            key_alpha = f"{name}.alpha" if f"{name}.alpha" in tensors else None
            scale = read_scale(name, product.alpha_rank, key_alpha)
        if scale == 0:
            continue
        layers.append(_create_layer(name, product, scale, matrices, file_name))
        keys |= {f"{name}.{matrix}" for matrix in matrices} | {f"{name}.alpha"}
    return layers, keys


def _create_product(
    name: str, matrices: Mapping[str, StoredTensor], file_name: str
) -> _Loha | _Lokr:
    product: _Loha | _Lokr | None = None
    with suppress(KeyError):
        if "hada_w1_a" in matrices:
            product = _Loha(_product(matrices, "hada", 1), _product(matrices, "hada", 2))
        else:
            product = _Lokr(_matrix_or_product(matrices, 1), _matrix_or_product(matrices, 2))
    if (
        product is None
        or not product.is_valid
        or max(product.shape[0], math.prod(product.shape[1:])) > _MAX_SIZE
    ):
        shapes = ", ".join(f"{matrix} {list(t.shape)}" for matrix, t in sorted(matrices.items()))
        raise MatryoshkaError(
            f"{file_name}: the matrices of {short(name)} do not fit each other: {shapes}. Save "
            "the file again in fp32, bf16 or fp16."
        )
    return product


def _matrix_or_product(matrices: Mapping[str, StoredTensor], number: int) -> _Matrix | _Product:
    full = matrices.get(f"lokr_w{number}")
    return _product(matrices, "lokr", number) if full is None else _Matrix(full)


def _product(matrices: Mapping[str, StoredTensor], prefix: str, number: int) -> _Product:
    left = matrices[f"{prefix}_w{number}_a"]
    right = matrices[f"{prefix}_w{number}_b"]
    return _Product(left, right, matrices.get(f"{prefix}_t{number}"))


def _create_layer(
    name: str,
    product: _Loha | _Lokr,
    scale: float,
    matrices: Mapping[str, StoredTensor],
    file_name: str,
) -> Layer:
    sign = math.copysign(1.0, scale)  # the scale of a layer is positive

    def check() -> None:
        for matrix, tensor in matrices.items():
            if not np.isfinite(tensor.read()).all():
                raise NotFiniteError(
                    f"{file_name}: {name}.{matrix} is NaN or infinite. Train again with a lower "
                    "learning rate."
                )

    def read() -> Factors:
        check()
        A, B = product.factors()
        return Factors(A, sign * B)

    def read_svd() -> KroneckerSVD:
        check()
        assert isinstance(product, _Lokr)
        return product.svd().scaled(sign)

    return Layer(
        name,
        product.max_rank,
        abs(scale),
        in_shape=product.shape[1:],
        out_features=product.shape[0],
        dtype=common_dtype(tensor.dtype for tensor in matrices.values()),
        read=read,
        keys=LayerKeys(name + KOHYA_SUFFIXES.A, name + KOHYA_SUFFIXES.B, f"{name}.alpha"),
        kind="LoHa" if isinstance(product, _Loha) else "LoKr",
        read_svd=read_svd if isinstance(product, _Lokr) else None,
    )


def _is_matrix(tensor: StoredTensor) -> bool:
    return tensor.is_factor and len(tensor.shape) == 2


def _read(tensor: StoredTensor) -> Float64Array:
    return tensor.read().astype(np.float64)


@dataclass(frozen=True)
class _Matrix:
    """A matrix that is stored in full."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.tensor.shape

    @property
    def max_rank(self) -> int:
        return min(self.shape[0], math.prod(self.shape[1:]))

    def svd(self) -> SVD:
        matrix = _read(self.tensor).reshape(self.shape[0], -1)
        return SVD(*np.linalg.svd(matrix, full_matrices=False))


@dataclass(frozen=True)
class _Product:
    """A product of factors.

    Attributes:
        left: Shape (out, rank), or (rank, out) with a core.
        right: Shape (rank, in).
        core: Shape (rank, rank, *kernel), or None.
    """

    left: StoredTensor
    right: StoredTensor
    core: StoredTensor | None = None

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        if self.core is None:
            return self.left.shape[0], self.right.shape[1]
        return self.left.shape[1], self.right.shape[1], *self.core.shape[2:]

    @property
    def max_rank(self) -> int:
        return min(self.rank, self.shape[0], math.prod(self.shape[1:]))

    @property
    def is_valid(self) -> bool:
        """Whether the tensors are factors, and fit each other."""
        if not (_is_matrix(self.left) and _is_matrix(self.right)):
            return False
        if self.core is None:
            return self.left.shape[1] == self.rank
        return (
            self.core.is_factor
            and self.core.shape[:2] == (self.rank, self.rank)
            and self.left.shape[0] == self.rank
        )

    def factors(self) -> tuple[Float64Array, Float64Array]:
        """Return A (rank, in) and B (out, rank). The kernel of a convolution is flattened."""
        left, right = _read(self.left), _read(self.right)
        if self.core is None:
            return right, left
        A = np.einsum("ij...,jn->in...", _read(self.core), right)
        return A.reshape(self.rank, -1), left.T

    def svd(self) -> SVD:
        return svd_of_product(*self.factors())


@dataclass(frozen=True)
class _Loha:
    """The elementwise product of two products of factors."""

    first: _Product
    second: _Product

    @property
    def is_valid(self) -> bool:
        return (
            self.first.is_valid and self.second.is_valid and self.first.shape == self.second.shape
        )

    @property
    def alpha_rank(self) -> int:
        return self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def max_rank(self) -> int:
        product = self.first.rank * self.second.rank
        return min(product, self.shape[0], math.prod(self.shape[1:]))

    def factors(self) -> tuple[Float64Array, Float64Array]:
        A_1, B_1 = self.first.factors()
        A_2, B_2 = self.second.factors()
        return elementwise_product(B_1, A_1, B_2, A_2)


@dataclass(frozen=True)
class _Lokr:
    """The Kronecker product of two matrices."""

    first: _Matrix | _Product
    second: _Matrix | _Product

    @property
    def is_valid(self) -> bool:
        for matrix in (self.first, self.second):
            if isinstance(matrix, _Matrix):
                if not matrix.tensor.is_factor:
                    return False
            elif not matrix.is_valid:
                return False
        return len(self.first.shape) == 2

    @property
    def alpha_rank(self) -> int | None:
        """The rank that alpha is divided by. Without factors, LoKr ignores its alpha."""
        for matrix in (self.second, self.first):
            if isinstance(matrix, _Product):
                return matrix.rank
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        num_outputs, num_inputs, *kernel = self.second.shape
        return self.first.shape[0] * num_outputs, self.first.shape[1] * num_inputs, *kernel

    @property
    def max_rank(self) -> int:
        return self.first.max_rank * self.second.max_rank

    def svd(self) -> KroneckerSVD:
        return KroneckerSVD(self.first.svd(), self.second.svd())

    def factors(self) -> tuple[Float64Array, Float64Array]:
        return self.svd().factors(self.max_rank)
