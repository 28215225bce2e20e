"""Combine LoRAs: write one nested LoRA, the weighted sum of their updates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Literal

from matryoshka_lora.atomic import PathLike, check_output
from matryoshka_lora.errors import MatryoshkaError, check_list, short
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.lora.combine import combine as combine_loras
from matryoshka_lora.lora.combine import compatible, cosines
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import choose_format
from matryoshka_lora.nesting import Nesting, check_rank, is_valid_scale
from matryoshka_lora.progress import single_threaded
from matryoshka_lora.registry import ANSWERS_CAVEAT, PICTURES_CAVEAT
from matryoshka_lora.text import format_errors, format_percent, format_table, join_lines
from matryoshka_lora.units import format_size, pluralize


@dataclass(frozen=True)
class CombineResult:
    """The result of `combine`.

    Attributes:
        path: The folder or file that was written.
        names: The names of the sources.
        num_layers: The number of its layers.
        size: The size of its weights in bytes.
        rank: Its largest rank.
        exact_rank: The rank with which it would be the exact sum.
        errors: The relative error of each nested rank: the norm of what it misses over the norm of
            the sum.
        cosines: The cosine between the updates of each pair of sources, shape (sources, sources):
            0 if they change a model in unrelated ways, 1 if in the same way, negative if one undoes
            a part of the other. A source without any update has 0.
    """

    path: Path
    names: tuple[str, ...]
    num_layers: int
    size: int
    rank: int
    exact_rank: int
    errors: dict[int, float]
    cosines: Float64Array

    def __repr__(self) -> str:
        """Return the rank, errors and cosines, as `matryoshka combine` prints them."""
        error = self.errors[max(self.errors)]
        lines = [
            f"{self.path}: {pluralize(self.num_layers, 'layer')}, rank {self.rank}, "
            f"{format_size(self.size)}, relative error {format_percent(error)}"
        ]
        if self.rank < self.exact_rank and error > 1e-6:
            lines.append(f"The exact sum needs at most rank {self.exact_rank}: `rank='sum'`.")
        if self.path.is_dir():
            lines += ["", *format_errors(self.errors, "sum"), ANSWERS_CAVEAT]
        else:
            lines.append(PICTURES_CAVEAT)
        if len(self.names) > 1:
            rows = [["", *(str(number + 1) for number in range(len(self.names))), ""]]
            for number, name in enumerate(self.names):
                cosines = [f"{cosine:.2f}" for cosine in self.cosines[number]]
                rows.append([str(number + 1), *cosines, name])
            lines += ["", "Cosines of the updates: 0 unrelated, 1 the same, negative opposed"]
            lines += format_table(rows, left_aligned=1)
        return join_lines(lines)


def combine(
    sources: Iterable[Lora | PathLike],
    output: PathLike,
    weights: Iterable[float] | Literal["mean"] | None = None,
    rank: int | Literal["sum"] | None = None,
    *,
    force: bool = False,
) -> CombineResult:
    """Write the weighted sum of LoRAs, ``w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...``.

    The concatenated factors are the exact sum. They are reordered by SVD, so rank r of the
    output is the best approximation of the sum (Eckart-Young), for every r from 1 to R. A missing
    layer counts as zero. One layer is in memory at a time.

    Args:
        sources: PEFT folders, single ``.safetensors`` files or opened LoRAs, all for the same base
            model.
        output: The folder or file to write, of the same kind as the sources.
        weights: The weight of each source, which may be negative; or ``"mean"``, for 1 / n each.
            Defaults to 1 for all. A source of weight 0 is left out.
        rank: R, at most the sum of the ranks of the sources. ``"sum"`` is that rank, with which the
            output is the exact sum. Defaults to the largest rank of a source, or to 1 for a sum
            that is zero.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: A source cannot be read, the sources are not compatible, the rank is not
            available, or the output already exists.
        NotFiniteError: A factor is NaN or infinite.
    """
    sources = check_list("sources", sources)
    if not sources:
        raise MatryoshkaError("`sources` must not be empty.")
    source_weights = _check_weights(weights, len(sources))
    loras = [source if isinstance(source, Lora) else open_lora(source) for source in sources]
    inputs = [path for lora in loras for path in lora.sources]
    loras = compatible(loras)
    is_file = bool(choose_format(loras[0], output, loras[0].container).suffix)
    check_output(output, force, inputs, is_file=is_file)

    total = combine_loras(loras, source_weights)
    terms = [lora for lora, weight in zip(loras, source_weights, strict=True) if weight != 0]
    sum_of_ranks = sum(lora.max_rank for lora in terms)
    with single_threaded():
        is_zero = not any(layer.singular_values().any() for layer in total.layers)
    if is_zero:
        warnings.warn("The sum is zero: the weighted updates cancel.", stacklevel=2)
        rank = 1 if rank in (None, "sum") else rank
    if rank is None:
        # The rank of a LoKr layer may be as large as the layer.
        ranks = [layer.rank for lora in terms for layer in lora.layers if layer.kind == "LoRA"]
        if not ranks:
            raise MatryoshkaError("LoHa and LoKr are combined as LoRA of a rank. Pass `rank`.")
        rank = max(ranks)
    rank = sum_of_ranks if rank == "sum" else check_rank(rank, max_rank=sum_of_ranks)
    nesting = Nesting.powers_of_two(rank, scale=total.new_scale)
    if total.container == "peft":
        reduced = replace(total, nesting=nesting).nested()
    else:
        reduced = total.truncate(min(rank, total.max_rank))
    result = reduced.save(output, total.container, force=force)
    return CombineResult(
        result.path,
        names=tuple(lora.name for lora in loras),
        num_layers=len(total.layers),
        size=result.size,
        rank=reduced.max_rank,
        exact_rank=total.max_rank,
        errors=result.written.relative_errors(nesting.ranks),
        cosines=cosines(loras),
    )


def _check_weights(
    weights: Iterable[float] | Literal["mean"] | None, num_sources: int
) -> Sequence[float]:
    """Return the weight of each source."""
    if weights is None:
        return [1.0] * num_sources
    if isinstance(weights, str) and weights == "mean":
        return [1 / num_sources] * num_sources
    values = check_list("weights", weights)
    for weight in values:
        if not isinstance(weight, Real) or not (weight == 0 or is_valid_scale(abs(weight))):
            raise MatryoshkaError(
                f"`weights` must be numbers such as 0.5 or -1, got {short(weight)}."
            )
    if len(values) != num_sources:
        raise MatryoshkaError(
            f"Got {len(values)} weights for {num_sources} sources. Pass one weight per source, "
            "such as 1,0.5 for two."
        )
    return values
