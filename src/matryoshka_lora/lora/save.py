"""Write a LoRA in one of the formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from matryoshka_lora.atomic import PathLike, create_file, create_folder
from matryoshka_lora.errors import (
    MatryoshkaError,
    NotFiniteError,
    check_choice,
    printable,
    short,
)
from matryoshka_lora.linalg.arrays import Float64Array, cast, is_finite
from matryoshka_lora.linalg.factors import compose_errors, relative_error, relative_errors
from matryoshka_lora.lora.layer import Factors, Layer
from matryoshka_lora.lora.truncate import prefix_errors, with_small_errors
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.registry import FORMATS, Format, FormatName, Target
from matryoshka_lora.text import format_ranks
from matryoshka_lora.units import format_size

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora


@dataclass(frozen=True)
class Written:
    """The errors and singular values of the layers that a format has written.

    Attributes:
        ranks: The rank of each layer by its name.
        squared_errors: The squared error of each rank from 0 to R by layer, shape (R + 1,). A layer
            that was not truncated has the error 0.
        singular_values: The singular values of the update of each layer that was reordered, shape
            (..., R).
        error_ranks: The ranks whose errors are reported. Defaults to the ranks of the output.
    """

    ranks: Mapping[str, int]
    squared_errors: dict[str, Float64Array] = field(default_factory=dict)
    singular_values: dict[str, Float64Array] = field(default_factory=dict)
    error_ranks: tuple[int, ...] | None = None

    def relative_error(self, rank: int | None = None) -> float:
        """Return the relative error of a rank, or of the ranks of the output."""
        return relative_error(self.squared_errors, self.ranks if rank is None else rank)

    def relative_errors(self, ranks: Iterable[int]) -> dict[int, float]:
        """Return the relative error of each of several ranks."""
        return relative_errors(self.squared_errors, ranks)

    def with_small(self, small: Written) -> Written:
        """Return the result with the errors of the ranks that a small adapter has."""
        errors = {
            name: with_small_errors(errors, small.squared_errors[name])
            for name, errors in self.squared_errors.items()
        }
        return replace(self, squared_errors=errors)

    def original_error(self, lora: Lora) -> float:
        """Return the relative error of the output against the original of a LoRA.

        A rank that was trained is no truncation of the original, so its error says nothing.
        """
        if lora.order == "trained":
            return lora.original_error
        return compose_errors(lora.original_error, self.relative_error())

    def compute(self, lora: Lora) -> Iterator[tuple[Layer, Factors]]:
        """Yield each layer with its factors, in the dtype of the layer.

        Raises:
            NotFiniteError: A factor is NaN or infinite, or too large for the dtype.
        """
        with single_threaded():
            for layer in progress_bar(lora.layers, "computing"):
                factors = layer.read()
                A, B = cast(factors.A, layer.dtype), cast(factors.B, layer.dtype)
                if not (is_finite(A) and is_finite(B)):
                    raise NotFiniteError(
                        f"{lora.name}: the new factors of {layer.name} are too large for "
                        f"{layer.dtype}. Save it in fp32 first."
                    )
                squared_errors = factors.squared_errors
                if squared_errors is None and lora.nesting is not None:
                    squared_errors = prefix_errors(lora, layer, factors)
                if squared_errors is not None:
                    self.squared_errors[layer.name] = squared_errors
                if factors.singular_values is not None:
                    self.singular_values[layer.name] = factors.singular_values
                # The wider factors are not in memory while the next layer is read.
                factors = factors._replace(A=A, B=B)
                yield layer, factors


@dataclass(frozen=True)
class SaveResult:
    """The result of `save`.

    Attributes:
        path: The folder or file that was written.
        format: Its format.
        ranks: The rank of each layer by its name.
        size: The size of its weights in bytes.
        errors: The relative error of the output, by its largest rank: the norm of the difference
            over the norm of the update. A nested adapter or a ladder has one entry for each rank.
        written: The errors and singular values of each layer.
    """

    path: Path
    format: FormatName
    ranks: dict[str, int]
    size: int
    errors: dict[int, float]
    written: Written

    def __repr__(self) -> str:
        """Return the ranks, the size and the errors on one line."""
        ranks = format_ranks(self.ranks.values())
        errors = ", ".join(f"{rank}: {error:.1%}" for rank, error in self.errors.items())
        return printable(f"{self.path}: {ranks}, {format_size(self.size)}, relative error {errors}")


def save(
    lora: Lora,
    path: PathLike,
    format: FormatName | None = None,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    ranks: Iterable[int] | None = None,
    force: bool = False,
) -> SaveResult:
    """Write a LoRA. Its factors are computed now, one layer after the other.

    Args:
        lora: The LoRA.
        path: The folder or file to write.
        format: A name of `matryoshka_lora.registry.FORMATS`. Defaults to ``"gguf"`` for a path
            that ends in ``.gguf``, otherwise to the container of the LoRA.
        base_model: The base model, for the formats merged, gguf and mlx. Defaults to the one that
            the LoRA names.
        base_revision: Its revision on the Hub. Defaults to the one that the LoRA names.
        ranks: The ranks of a ladder. Defaults to the nested ones.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.

    Raises:
        MatryoshkaError: The format cannot represent the LoRA, or the output already exists or
            cannot be written.
        MissingDependencyError: The format needs an extra that is not installed.
        NotFiniteError: A factor is NaN or infinite.
    """
    output_format = choose_format(lora, path, format)
    for layer in lora.layers:
        if layer.kind != "LoRA":
            raise MatryoshkaError(
                f"{lora.name}: {short(layer.name)} is {layer.kind}, which truncation converts to "
                "LoRA. Pass `rank` or `error`."
            )
    if ranks is not None and output_format.name != "ladder":
        raise MatryoshkaError(
            f"`ranks` is for format 'ladder', got format {output_format.name!r}. Truncate instead."
        )
    target = Target(base_model, base_revision, None if ranks is None else lora.check_ranks(ranks))
    sources = [*lora.sources, *([base_model] if base_model else [])]
    create = create_file if output_format.suffix else create_folder
    with create(path, force, sources) as temporary:
        written = output_format.write(lora, temporary, target)
        if output_format.suffix:
            size = temporary.stat().st_size
        else:
            size = sum(file.stat().st_size for file in temporary.rglob("*.safetensors"))
    if written.error_ranks is None:
        errors = {max(written.ranks.values()): written.relative_error()}
    else:
        errors = written.relative_errors(written.error_ranks)
    return SaveResult(Path(path), output_format.name, dict(written.ranks), size, errors, written)


def choose_format(lora: Lora, path: PathLike, format: FormatName | None = None) -> Format:
    """Return the format of an output.

    Raises:
        MatryoshkaError: The LoRA, the format and the suffix of the path contradict each other.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".sft":  # ComfyUI's other name of the suffix would become a folder of PEFT
        raise MatryoshkaError(
            f"A safetensors file is written with the suffix .safetensors, got {path}. Pass "
            f"{Path(path).with_suffix('.safetensors')}."
        )
    formats = {name: spec for name, spec in FORMATS.items() if lora.container in spec.containers}
    kind = "single file" if lora.container == "single" else "PEFT folder"
    if format is None:
        with_suffix = [spec.name for spec in formats.values() if suffix and spec.suffix == suffix]
        format = with_suffix[0] if with_suffix else lora.container
    if format in FORMATS and format not in formats:
        hint = "Convert it to a PEFT folder first, with `key_format='peft'` or convert('peft')."
        if lora.container == "peft":
            hint = f"Pass one of {', '.join(formats)}."
        elif format == "ladder":
            hint = "Export each rank to a file of its own."
        raise MatryoshkaError(
            f"{lora.name} is a {kind}, which cannot be written in format {format!r}. {hint}"
        )
    check_choice("format", format, list(formats))
    spec = formats[format]
    if spec.suffix and suffix != spec.suffix:
        raise MatryoshkaError(
            f"The output of {lora.name} is a {kind}, which format {format!r} writes as a file, got "
            f"{path}. Pass {path}{spec.suffix}."
        )
    if suffix and not spec.suffix and suffix in [spec.suffix for spec in FORMATS.values()]:
        raise MatryoshkaError(
            f"The output of {lora.name} is a {kind}, which format {format!r} writes as a folder, "
            f"got {path}. Pass a path without {suffix}."
        )
    return spec
