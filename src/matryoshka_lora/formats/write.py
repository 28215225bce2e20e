"""Write an adapter, whole or a rank of it, and see that what lies in the file is what was to be written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, TRAINED_NAME, adapter_files, output_files
from matryoshka_lora.formats.beside import Spectra, check_measured, write_spectra
from matryoshka_lora.formats.card import has_own_card, write_card
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import WEIGHTS_NAME, OpenedAdapter, Stored, open_adapter
from matryoshka_lora.formats.sidecar import Sidecar, write_sidecar
from matryoshka_lora.formats.streamed import file_size, write_stored
from matryoshka_lora.formats.weights_hash import hash_first, weights_hash

TOLERANCE = 1e-2
"""Of a layer's update, and of what the adapter does to the logits. Factors in half precision are rounded by 0.4 %."""

_METADATA = {"format": "pt"}
"""What transformers asks of a file before it reads it."""

Ranks = int | Mapping[str, int]
"""One rank for all layers, or one for each by its name in the base model; 0 leaves a layer out."""


def write_adapter(
    folder: Path,
    adapter: OpenedAdapter,
    spectra: Spectra | None = None,
    home: Path | None = None,
    keeps_files: bool = False,
    trained: OpenedAdapter | None = None,
) -> None:
    """Write an adapter into a folder, one layer in memory at a time.

    Args:
        folder: Where to write.
        adapter: What to write. With a nesting, it gets a sidecar.
        spectra: Its singular values, complete when its last layer was read.
        home: Where the folder will be: a card that somebody has written there stays.
        keeps_files: The recipe and the evaluation in ``home`` stay beside the adapter. Its card shows the recipe, and
            the evaluation if it is of this very adapter.
        trained: The factors as they are trained, which are written beside those that are deployed.
    """
    weights = write_weights(folder / WEIGHTS_NAME, adapter)
    beside = None if trained is None else write_weights(folder / TRAINED_NAME, trained)
    adapter.config.write(folder)
    if adapter.state is not None:
        write_sidecar(folder, Sidecar(adapter.state, weights, beside))
    if spectra is not None:
        write_spectra(folder, spectra, weights)
    if home is None or not has_own_card(home):
        kept = home if keeps_files else None
        write_card(folder, adapter.config, adapter.state, kept, kept is not None and _is_measured(folder, kept))


def _is_measured(folder: Path, home: Path) -> bool:
    """Whether the evaluation in ``home`` is of the adapter that was written into a folder."""
    file = home / EVALUATION_FOLDER / EVALUATION_NAME
    if not file.is_file():
        return False
    try:
        check_measured(file, open_adapter(folder))
    except MatryoshkaError:
        return False
    return True


def check_apart(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Raises MatryoshkaError if writing to ``path`` would replace the adapter that is read, or a file of it."""
    target, read = Path(path), Path(source)
    gone = _places(target, output_files) & _places(read, adapter_files)
    if gone:
        what = "is" if target.resolve() in gone else "holds"
        raise MatryoshkaError(f"{path} {what} the adapter itself, which would be lost: choose another place")


def _places(path: Path, files: Callable[[Path], Iterator[Path]]) -> set[Path]:
    """Where a path and some files in it really are."""
    return {place.resolve() for place in (path, *(path / file for file in files(path)))}


def _stored_ranks(ranks: Mapping[str, int], pad: bool) -> dict[str, int]:
    """How many columns each layer has in the file; 0 leaves it out.

    With ``pad`` all have the largest rank. Without, a layer has its own; but one that is left out, and whose name ends
    like that of another, has a column of zeros, since PEFT would make factors for both and miss those of one.
    """
    if pad:
        return dict.fromkeys(ranks, max(ranks.values()))
    kept = {name for name, rank in ranks.items() if rank > 0}
    return {name: rank or int(not kept.isdisjoint(_ends(name))) for name, rank in ranks.items()}


def _ends(name: str) -> Iterator[str]:
    """The parts of a dotted name that begin after one of its dots."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def write_weights(file: Path, adapter: OpenedAdapter) -> str:
    """Write an adapter's tensors as safetensors, each as it is read, so that one layer is in memory at a time.

    Returns:
        The `weights_hash` of what was written.
    """
    layers = {key: layer for layer in adapter.layers for key in (layer.key_A, layer.key_B)}
    first: dict[str, str] = {}

    def read(key: str) -> Tensor:
        tensor = adapter.tensor(key)
        if key in layers:
            first[key] = hash_first(layers[key], key, tensor)
        return tensor

    write_stored(file, _weights(adapter), _METADATA, read)
    return weights_hash(adapter.layers, first)


def weights_size(adapter: OpenedAdapter) -> int:
    """How many bytes `write_weights` writes."""
    return file_size(_weights(adapter), _METADATA)


def _weights(adapter: OpenedAdapter) -> dict[str, Stored]:
    keys = [key for layer in adapter.layers for key in (layer.key_A, layer.key_B)] + list(adapter.others)
    for key in keys:
        if adapter.stored[key].dtype is None:
            adapter.tensor(key)  # raises the reason
    return {key: adapter.stored[key] for key in keys}


def cut(adapter: OpenedAdapter, ranks: Ranks, pad: bool = False) -> OpenedAdapter:
    """A rank of an adapter that is as it is deployed, as an ordinary LoRA adapter.

    Args:
        adapter: A nested one.
        ranks: One, or one for each layer of a reordered adapter.
        pad: Fill all layers up to the largest of the ranks, with zeros in B.

    Raises:
        MatryoshkaError: A rank cannot be had, or layers cannot have ranks of their own.
    """
    state = adapter.nested
    if not state.deployed:
        raise MatryoshkaError(f"{adapter.name} is as it was trained: reorder it first")
    differ = isinstance(ranks, Mapping)
    if differ and not state.reordered:
        raise MatryoshkaError(f"{adapter.name} is not reordered, so its layers need one rank: reorder it first")
    own = dict(ranks) if isinstance(ranks, Mapping) else {layer.name: ranks for layer in adapter.layers}
    for rank in own.values():
        if rank or not differ:
            state.check_rank(rank)
    own = {name: int(rank) for name, rank in own.items()}  # NumPy's integers are not JSON
    top = max(own.values())
    scale = float(state.diagonal(top)[0])
    config = adapter.config.at(top, scale)
    widths = _stored_ranks(own, pad) if differ else own
    if differ:
        config = _with_own_ranks(adapter, config, widths, scale, pad)
    whole = {layer.name: layer for layer in adapter.layers}
    layers = [layer.at(widths[layer.name], scale) for layer in adapter.layers if widths[layer.name]]

    def factors(layer: Layer) -> tuple[Tensor, Tensor]:
        A, B = adapter.factors(whole[layer.name])
        A, B = A[..., : layer.rank, :], B[..., : layer.rank]
        return A, torch.where(torch.arange(layer.rank, device=B.device) < own[layer.name], B, 0)

    return adapter.with_factors(factors, layers, config)


def _with_own_ranks(
    adapter: OpenedAdapter, config: AdapterConfig, widths: Mapping[str, int], scale: float, pad: bool
) -> AdapterConfig:
    """With a rank for each layer. The scale is one, so an engine that ignores the patterns scales rightly."""
    if adapter.config.target_parameters and not pad:
        raise MatryoshkaError(
            f"{adapter.name} has target_parameters, for which PEFT knows no ranks by layer: use --pad, or one --rank"
        )
    kept = {name: rank for name, rank in widths.items() if rank}
    # PEFT takes these as regular expressions for the end of a name: `fc` would stand for `sub.fc` too.
    own = {f"^{re.escape(name)}": rank for name, rank in kept.items() if rank != config.r}
    changes: dict[str, object] = {
        "rank_pattern": own,
        "alpha_pattern": {name: scale * rank for name, rank in own.items()},
    }
    if len(kept) < len(widths):
        changes |= {"target_modules": sorted(kept), "layers_to_transform": None, "layers_pattern": None}
    return config.changed(**changes)


def check_layers(found: OpenedAdapter, source: OpenedAdapter, ranks: Ranks, pad: bool = False) -> None:
    """Compare every layer.

    Args:
        found: The export.
        source: The nested adapter.
        ranks: That were exported, see `matryoshka_lora.formats.write.cut`.
        pad: As there.

    Raises:
        MatryoshkaError: A layer is missing, has another rank or another update, or another tensor is not the same.
    """
    state = source.nested
    widths = {} if isinstance(ranks, int) else _stored_ranks(ranks, pad)
    left = {layer.name: layer for layer in found.layers}
    for layer in source.layers:
        own = ranks if isinstance(ranks, int) else ranks[layer.name]
        wanted_rank, other = widths.get(layer.name, own), left.pop(layer.name, None)
        if (other.rank if other else 0) != wanted_rank:
            raise wrong(f"layer {layer.name} has rank {other.rank if other else 0} and not {wanted_rank}")
        if other is not None:
            A, B = source.factors(layer)
            other_A, other_B = (factor.double() for factor in found.factors(other))
            share = _distance((B.double() * state.diagonal(own), A.double()), (other_B * other.scale, other_A))
            if not share <= TOLERANCE:
                raise wrong(f"the update of layer {layer.name} differs by {100 * share:.2g} % of it")
    if left or set(source.others) != set(found.others):
        raise wrong(f"it holds {sorted((*left, *set(source.others) ^ set(found.others)))[0]} or lacks it")
    for key in source.others:
        if not found.tensor(key).equal(source.tensor(key)):
            raise wrong(f"{key} has other values")


def wrong(how: str, what: str = "the adapter") -> MatryoshkaError:
    """The error for an export that is not what it should be."""
    return MatryoshkaError(f"{what} was made and then thrown away, because it computes something else: {how}")


def _distance(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> float:
    """The norm of the difference of two products ``B A``, over that of the first. Neither is formed."""
    B, A = torch.cat([wanted[0], -found[0]], dim=-1), torch.cat([wanted[1], found[1]], dim=-2)
    size, difference = (float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)) for b, a in (wanted, (B, A)))
    return (difference / size) ** 0.5 if size > 0 else float(difference > 0)
