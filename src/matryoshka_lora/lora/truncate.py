"""Reorder the components of a LoRA, and truncate it to smaller ranks.

Factors without an order are reordered by singular value decomposition, so that every prefix is the
best approximation of its rank (Eckart-Young). Ordered factors are only cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.allocation import (
    LayerSpectrum,
    rank_for_share,
    ranks_for_error,
    ranks_for_size,
)
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import (
    approximation_errors,
    pad_end,
    relative_error,
    reorder_factors,
    squared_tails,
    truncation_errors,
)
from matryoshka_lora.lora.layer import Factors, Layer
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.units import parse_share, parse_size

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora


def reorder(lora: Lora) -> Lora:
    """Return a nested LoRA: every prefix of its factors is the best one of its rank.

    The update of the largest rank stays the same. An existing order is ignored, and a small adapter
    is left out. In a PEFT folder each layer is padded to the largest rank; in a single file it
    keeps its own.
    """
    return nested(replace(lora, order=None, small=None, deploy="reordered", scores=()))


def nested(lora: Lora) -> Lora:
    """Return a nested LoRA. Factors without an order are reordered; others stay as they are."""
    if lora.container == "single":
        return with_ranks(lora, lora.ranks)
    nesting = lora.nesting or Nesting.powers_of_two(lora.max_rank, scale=lora.new_scale)
    ranks = dict.fromkeys(lora.ranks, nesting.max_rank)
    return replace(with_ranks(lora, ranks), nesting=nesting, small=lora.small, deploy=lora.deploy)


def with_small_errors(errors: Float64Array, small_errors: Float64Array) -> Float64Array:
    """Return the squared errors of the ranks of a LoRA with a small adapter.

    Args:
        errors: The squared error of each rank from 0 to R of the main adapter, shape (R + 1,).
        small_errors: The same of the small adapter up to k, shape (k + 1,).
    """
    return np.concatenate([small_errors, errors[len(small_errors) :]])


def with_small(lora: Lora, small: Lora) -> Lora:
    """Return a LoRA whose ranks up to the rank of a small adapter are that adapter's prefixes.

    Args:
        lora: A LoRA with an order.
        small: A LoRA with the same layer names. Its errors become relative to ``lora``.
    """

    def with_errors(layer: Layer, main: Layer) -> Layer:
        def read(factors: Factors) -> Factors:
            target = main.read()
            errors = approximation_errors(
                (target.A, target.B.astype(np.float64) * main.scale),
                factors.A,
                factors.B.astype(np.float64) * layer.scale,
            )
            return factors._replace(squared_errors=errors)

        return layer.map(read)

    pairs = zip(small.layers, lora.layers, strict=True)
    layers = tuple(with_errors(layer, main) for layer, main in pairs)
    small = replace(small, layers=layers, order="trained", original_error=lora.original_error)
    return replace(lora, small=small)


def truncate(
    lora: Lora,
    rank: int | None = None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
) -> Lora:
    """Return a LoRA of smaller ranks, which has no nesting.

    A rank of the small adapter is a prefix of it, if no other argument is passed.

    Args:
        lora: The LoRA.
        rank: The rank, where layers of a smaller rank keep theirs; with ``keep``, ``error`` or
            ``max_bytes``, an upper bound.
        keep: A share of the squared singular values, such as ``"95%"`` or ``0.95``. Each layer gets
            the smallest rank that keeps it.
        error: The maximum relative error over all layers, such as ``"10%"`` or ``0.1``, relative to
            this LoRA. The layers get the ranks that reach it with few parameters.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``, or ``"25%"`` of the
            weights that this LoRA was read from; of an adapter in memory, of the file that `save`
            would write. The layers get the ranks that keep most of the update.

    If examples have weighted the order, ``keep``, ``error`` and ``max_bytes`` use the weighted
    values in place of the singular values, and ``error`` is the weighted error.

    Raises:
        MatryoshkaError: The rank is not available, the arguments contradict each other, or the
            ranks depend on singular values and the factors are not ordered by any.
        NotFiniteError: The ranks depend on the factors, and a factor is NaN or infinite.
    """
    max_rank = lora.max_rank if rank is None else lora.check_rank(rank)
    ranks = {layer.name: min(max_rank, layer.rank) for layer in lora.layers}
    if keep is None and error is None and max_bytes is None:
        if lora.small is not None and max_rank <= lora.small_rank:
            small = replace(lora.small, name=lora.name, files=lora.files, scores=lora.scores)
            return truncate(small, max_rank)
        return with_ranks(lora, ranks)
    if keep is not None and error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    share = None if keep is None else parse_share(keep)
    max_error = None if error is None else parse_share(error)
    max_size = None if max_bytes is None else parse_size(max_bytes, lora.size or lora.file_size)
    if not lora.can_choose_ranks:
        raise MatryoshkaError(
            f"{lora.name}: `keep`, `error` and `max_bytes` need factors that are ordered by "
            "singular values, and these are not. Pass `rank`: info shows the error of each. Or "
            "reorder it first."
        )
    spectra = layer_spectra(lora, ranks)
    if max_error is not None:
        ranks = ranks_for_error(spectra, max_error)
    if share is not None:
        for name, spectrum in spectra.items():
            ranks[name] = min(ranks[name], rank_for_share(spectrum.singular_values, share))
    if max_size is not None:
        ranks = fit_size(lora, spectra, ranks, max_size)
    truncated = with_ranks(replace(lora, scores=()), ranks)
    if max_error is not None:
        errors = {name: squared_tails(value.singular_values) for name, value in spectra.items()}
        is_limited = relative_error(errors, ranks) > max_error * (1 + 1e-6)
    else:
        is_limited = share is not None and any(
            rank_for_share(value.singular_values, share) > ranks[name]
            for name, value in spectra.items()
        )
    if is_limited:
        limit = "rank" if max_size is None else "size"
        note = f"The requested {limit} limits the ranks, so the error is larger than requested."
        truncated = replace(truncated, notes=(*truncated.notes, note))
    return truncated


def layer_spectra(lora: Lora, max_ranks: Mapping[str, int]) -> dict[str, LayerSpectrum]:
    """Return the singular values of each layer, which is given at most a rank by its name.

    If examples have weighted the order, they are the weighted ones.
    """
    spectra: dict[str, LayerSpectrum] = {}
    with single_threaded():
        for layer in progress_bar(lora.layers, "singular values"):
            values = layer.weighted_values if lora.order == "weighted" else None
            if values is None:
                values = layer.singular_values()
            spectra[layer.name] = LayerSpectrum(
                values, layer.parameters_per_rank, max_ranks[layer.name]
            )
    return spectra


def fit_size(
    lora: Lora, spectra: Mapping[str, LayerSpectrum], max_ranks: Mapping[str, int], max_size: int
) -> dict[str, int]:
    """Return ranks, at most some maximum ones, of a file of at most a size in bytes."""
    bounded = {name: replace(value, max_rank=max_ranks[name]) for name, value in spectra.items()}
    return ranks_for_size(bounded, lambda ranks: with_ranks(lora, ranks).file_size, max_size)


def with_ranks(lora: Lora, ranks: Mapping[str, int]) -> Lora:
    """Return a LoRA whose layers have the given ranks, which may exceed their own.

    Factors without an order are reordered. The paper's deployment needs one rank for all layers.
    """
    layers = tuple(_with_rank(lora, layer, ranks[layer.name]) for layer in lora.layers)
    changes = lora.changes
    if any(new.rank != layer.rank for new, layer in zip(layers, lora.layers, strict=True)):
        low, high = min(ranks.values()), max(ranks.values())
        is_truncated = all(ranks[layer.name] <= layer.rank for layer in lora.layers)
        verb = "truncated" if is_truncated else "resized"
        new_ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        changes += (f"{verb} to {new_ranks}",)
    return replace(
        lora,
        layers=layers,
        nesting=None,
        order=None if lora.deploy == "paper" else lora.order or "svd",
        small=None,
        deploy="reordered",
        changes=changes,
    )


def _with_rank(lora: Lora, layer: Layer, rank: int) -> Layer:
    """Return a layer at a rank. Its factors come with the errors of the ranks below."""
    missing = rank - layer.rank
    if lora.order is not None or lora.deploy == "paper":
        scales = _scales(lora, layer)
        scales += [scales[-1]] * missing

        def cut(factors: Factors) -> Factors:
            A, B = pad_end(factors.A, missing, axis=-2), pad_end(factors.B, missing, axis=-1)
            errors = factors.padded_errors(layer.rank + max(missing, 0))  # of an earlier truncation
            if errors is None:
                errors = truncation_errors(A, B, scales)
            return Factors(A[..., :rank, :], B[..., :rank], errors)

        values = layer.weighted_values
        if values is not None:
            values = pad_end(values[:rank], missing, axis=0)
        return layer.map(cut, rank=rank, scale=scales[rank - 1], weighted_values=values)

    if layer.read_svd is not None:
        read_svd = layer.read_svd

        def read() -> Factors:
            svd = read_svd()
            A, B = svd.factors(rank)
            missing = rank - len(A)
            A, B = pad_end(A, missing, axis=-2), pad_end(B, missing, axis=-1)
            values = layer.scale * svd.values
            return Factors(A, B, squared_tails(values), values)  # LoKr was never truncated

        return replace(
            layer, rank=rank, kind="LoRA", has_new_factors=True, read=read, read_svd=None
        )

    def reorder_and_cut(factors: Factors) -> Factors:
        # float64, so that the result is rounded only once, when it is written.
        A = pad_end(factors.A, missing, axis=-2).astype(np.float64)
        B = pad_end(factors.B, missing, axis=-1).astype(np.float64)
        A, B, values = reorder_factors(A, B, rank=rank)
        values = layer.scale * values
        errors = squared_tails(values)
        if factors.squared_errors is not None:
            # An SVD is orthogonal to the components that an earlier truncation dropped.
            errors = errors + factors.squared_errors[layer.rank]
        return Factors(A, B, errors, values)

    return layer.map(reorder_and_cut, rank=rank, kind="LoRA", has_new_factors=True)


def squared_errors(lora: Lora, layer: Layer) -> Float64Array:
    """Return the squared error of each rank from 0 to R of a layer, shape (R + 1,)."""
    if lora.order is None and lora.deploy != "paper":
        return squared_tails(layer.singular_values())
    return prefix_errors(lora, layer, layer.read())


def prefix_errors(lora: Lora, layer: Layer, factors: Factors) -> Float64Array:
    """Return the squared error of each prefix from 0 to R of a layer's factors, shape (R + 1,)."""
    return truncation_errors(factors.A, factors.B, _scales(lora, layer))


def _scales(lora: Lora, layer: Layer) -> list[float]:
    """Return the scale of each rank from 1 to R of an ordered layer."""
    if lora.nesting is not None and lora.deploy == "paper":
        return [lora.nesting.scale_at(rank) for rank in range(1, layer.rank + 1)]
    return [layer.scale] * layer.rank
