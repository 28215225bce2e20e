"""Choose the rank of each layer of an output from what the caller wants to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats import OutputFormat
from matryoshka_lora.linalg.allocation import rank_for_share, ranks_for_error, ranks_for_size
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.operations.output_format import EXPORT_FORMATS
from matryoshka_lora.units import parse_share, parse_size


@dataclass(frozen=True)
class RankRequest:
    """What the caller wants to keep.

    Attributes:
        rank: The rank, or an upper bound if something else is requested too, or several ranks.
        share: The minimum share of the squared singular values kept per layer.
        error: The maximum relative error over all layers.
        max_size: The maximum size of the weights in bytes.
    """

    rank: int | Sequence[int] | None
    share: float | None
    error: float | None
    max_size: int | None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is requested."""
        return self == RankRequest(None, None, None, None)

    @property
    def needs_singular_values(self) -> bool:
        """Whether the rank of a layer depends on its singular values."""
        return self != RankRequest(self.rank, None, None, None)


def parse_request(
    rank: int | Sequence[int] | None,
    keep: float | str | None,
    error: float | str | None,
    max_bytes: int | str | None,
) -> RankRequest:
    """Return what the caller wants to keep, from the arguments of `export`."""
    if rank is not None and (isinstance(rank, str) or not isinstance(rank, Sequence)):
        check_rank(rank)
    return RankRequest(
        rank,
        share=None if keep is None else parse_share(keep),
        error=None if error is None else parse_share(error),
        max_size=None if max_bytes is None else parse_size(max_bytes),
    )


def check_request(
    request: RankRequest, output_format: OutputFormat, *, pad: bool, has_other_change: bool
) -> None:
    """Raise MatryoshkaError if what is requested contradicts itself or the format.

    Args:
        request: The requested ranks.
        output_format: The format of the output.
        pad: Whether smaller layers are padded to the requested rank.
        has_other_change: Whether something else than the ranks changes, such as the dtype.
    """
    if request.is_empty and not has_other_change and output_format in ("peft", "single"):
        raise MatryoshkaError(
            "Pass at least one of `rank`, `keep`, `error`, `max_bytes`, `dtype`, `drop`, `scale` "
            "or `key_format`."
        )
    if isinstance(request.rank, Sequence) and output_format != "ladder":
        raise MatryoshkaError(
            f"`rank` must be an integer in format {output_format!r}, got {request.rank!r:.80}. "
            "Only `format='ladder'` takes several."
        )
    if request.share is not None and request.error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    if pad:
        _check_pad(request, output_format)
    supported = EXPORT_FORMATS[output_format]
    for name, value in (("keep", request.share), ("error", request.error)):
        if value is not None and not supported.supports_keep:
            raise MatryoshkaError(
                f"`{name}` gives each layer its own rank, which format {output_format!r} does not "
                "support. Pass `rank`."
            )
    if request.max_size is not None and not supported.supports_max_bytes:
        alternatives = "`rank` or `keep`" if supported.supports_keep else "`rank`"
        raise MatryoshkaError(
            f"`max_bytes` is not supported for format {output_format!r}. Pass {alternatives}."
        )


def _check_pad(request: RankRequest, output_format: OutputFormat) -> None:
    if request.rank is None or request.needs_singular_values:
        raise MatryoshkaError(
            "`pad=True` gives every layer the requested rank. Pass `rank`, and none of `keep`, "
            "`error` and `max_bytes`."
        )
    if output_format not in ("peft", "single"):
        raise MatryoshkaError(
            "`pad=True` writes a LoRA to train on, a PEFT folder or a single file, got format "
            f"{output_format!r}. Omit `format`."
        )


def ladder_ranks(lora: LoraFile, rank: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the ranks of a ladder: the requested ones, or the nested ones."""
    if rank is None or isinstance(rank, Sequence):
        return lora.check_ranks(rank)
    return lora.check_ranks([rank])


def choose_ranks(
    lora: LoraFile, request: RankRequest, output_format: OutputFormat
) -> dict[str, int]:
    """Return the rank of each layer by its name."""
    max_rank = lora.max_rank if request.rank is None else request.rank
    assert not isinstance(max_rank, Sequence)  # `check_request` rejects several
    if max_rank > lora.max_rank and EXPORT_FORMATS[output_format].supports_max_bytes:
        raise MatryoshkaError(
            f"{lora.name}: `rank` must be from 1 to {lora.max_rank}, got {max_rank}. Pass "
            "`pad=True` for a LoRA of a larger rank to train on."
        )
    ranks = lora.ranks_by_layer(max_rank)
    if not EXPORT_FORMATS[output_format].supports_keep:  # one rank for all layers
        return dict.fromkeys(ranks, max_rank)
    if not request.needs_singular_values:
        return ranks
    if lora.order == "trained" or lora.deploy == "paper":
        raise MatryoshkaError(
            "`keep`, `error` and `max_bytes` need factors that are ordered by singular values, and "
            f"those of {lora.name} are not. Pass `rank`, or reorder it first."
        )
    spectra = lora.spectra(ranks)
    if request.error is not None:
        ranks = ranks_for_error(spectra, request.error)
    if request.share is not None:
        for name, layer in spectra.items():
            ranks[name] = min(ranks[name], rank_for_share(layer.singular_values, request.share))
    if request.max_size is not None:
        spectra = {name: replace(layer, max_rank=ranks[name]) for name, layer in spectra.items()}
        ranks = ranks_for_size(spectra, lambda ranks: lora.plan(ranks).file_size, request.max_size)
    return ranks
