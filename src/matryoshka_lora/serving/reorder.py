"""Any LoRA adapter, file to file, into a nested one whose every prefix is the best of its rank.

Best in one of four senses, for a layer with factors B A, inputs x and loss L:

* ``frobenius``: the prefix D' with the smallest ``|B A - D'|``. Needs no data and no base model.
* ``activations``: the smallest ``E |(B A - D') x|^2``: the output of the layer changes least.
* ``loss``: the smallest ``|G^1/2 (B A - D') C^1/2|`` with the second moments C of x and G of ``dL/dy``, each token
  weighted by the other's size: to second order, and as far as a Kronecker product can say it, the loss changes least.
* ``learned``: the prefixes' own losses on data, descended step by step over all orders that keep ``B A`` as it is.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Size, Tensor

from matryoshka_lora.adapter.attach import check_config
from matryoshka_lora.formats.card import has_own_card, write_card
from matryoshka_lora.adapter.factors import as_parameters
from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.formats.opened import Layer, LoraFiles, open_adapter
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.adapter.storage import check_apart, write_adapter
from matryoshka_lora.formats.spectra import Metric, Spectra, write_spectra
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import output_directory
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.factors import reorder_factors, reweigh_factors
from matryoshka_lora.rules import get_rule

Progress = Callable[[], object]


@dataclass(frozen=True)
class Moments:
    """What calibration data does to one layer of a reordered adapter.

    Attributes:
        inner: The second moment of ``A x``, shape (R, R), float64.
        outer: The second moment of ``B^T g``, shape (R, R), float64; None for the metric ``activations``.
    """

    inner: Tensor
    outer: Tensor | None = None


def reorder_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    on_layer: Progress | None = None,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Spectra:
    """Reorder by ``frobenius``. One layer is in memory at a time.

    Args:
        source: The directory of a LoRA adapter that PEFT has written: nested or not, in any of its scalings, with
            ranks per layer, in one file or in shards.
        target: The directory to write: a nested adapter of the largest rank that a layer has. Plain PEFT reads it as
            the function that the source is; of one that was saved as it was trained, as that of training, P and all.
        on_layer: Called after each layer.
        dtype: Of the result; None keeps the source's.
        overwrite: Whether the target may hold an adapter, a model or an evaluation, of which nothing is left then.

    Returns:
        The singular values of each layer's ``s B A``.

    Raises:
        MatryoshkaError: The source is damaged or no LoRA adapter, or the target cannot be written or holds something
            that may not be overwritten. Nothing has been written then.
    """
    opened = open_adapter(source)
    state, config = _reordered(opened)

    def reorder(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        A, B = opened.factors(layer)
        if opened.state is not None:
            p, scale = opened.state.trained_diagonal(), state.nesting.scale(config.r)
        else:
            p, scale = torch.full((config.r,), layer.scale, dtype=torch.float64), 1.0
        missing = config.r - layer.rank
        A = torch.nn.functional.pad(A, (0, 0, 0, missing))
        B = torch.nn.functional.pad(B, (0, missing))
        return reorder_factors(A, B, p, scale)

    return _rewrite(opened, Path(target), state, config, "frobenius", reorder, on_layer, dtype, overwrite)


def reweigh_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    metric: Metric,
    moments: Mapping[str, Moments],
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Spectra:
    """Reorder what `reorder_adapter` has written once more, by ``activations`` or ``loss``.

    Args:
        source: The directory that `reorder_adapter` has written, in float32.
        target: The directory to write.
        metric: The name of the metric that the moments make.
        moments: By layer, from `matryoshka_lora.serving.calibrate.measure_moments` of the source. A layer without
            moments stays as it is.
        dtype: Of the result; None keeps the source's.
        overwrite: As for `reorder_adapter`.

    Returns:
        The singular values of each layer in the metric; of layers without moments, those of ``frobenius``.
    """
    opened = open_adapter(source)
    if opened.state is None or opened.state.form != "reordered":
        raise MatryoshkaError(f"{source} is not reordered: call reorder_adapter first")
    state, config = _reordered(opened)
    # The scale belongs to the function that the loss sees; one factor for all layers changes no order within one.
    scale = state.nesting.scale(config.r)

    def reweigh(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        A, B = opened.factors(layer)
        found = moments.get(layer.name)
        if found is None:
            return A, B, A.double().norm(dim=-1) * B.double().norm(dim=-2) * scale
        A, B, s = reweigh_factors(A, B, found.inner, found.outer)
        return A, B, s * scale

    return _rewrite(opened, Path(target), state, config, metric, reweigh, None, dtype, overwrite)


def rewrite_learned(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    spectra: Spectra,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Spectra:
    """Write what `matryoshka_lora.adapter.order` has ordered, which has no singular values of its own.

    Args:
        source: The directory of the ordered adapter.
        target: The directory to write.
        spectra: The singular values of its updates, which say how much rank each layer needs.
        dtype: Of the result; None keeps the source's.
        overwrite: As for `reorder_adapter`.

    Returns:
        The spectra, under the name ``learned``.
    """
    opened = open_adapter(source)
    state, config = _reordered(opened)

    def keep(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        return *opened.factors(layer), spectra.values[layer.name]

    return _rewrite(opened, Path(target), state, config, "learned", keep, None, dtype, overwrite)


def _reordered(opened: LoraFiles) -> tuple[NestedState, LoraConfig]:
    """State and config of the result."""
    config = copy.deepcopy(opened.config)
    if opened.state is not None:
        state = replace(opened.state, form="reordered")
    else:
        nesting = Nesting.powers_of_two(opened.rank)
        state = NestedState(nesting, get_rule("lora"), form="reordered")
        config.r, config.lora_alpha = nesting.max_rank, nesting.max_rank
        config.use_rslora = False
        config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights = True
    config.inference_mode = True
    check_config(config, state)
    return state, config


def _rewrite(
    opened: LoraFiles,
    target: Path,
    state: NestedState,
    config: LoraConfig,
    metric: Metric,
    change: Callable[[Layer], tuple[Tensor, Tensor, Tensor]],
    on_layer: Progress | None,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> Spectra:
    check_apart(opened.folder, target)
    spectra = {}
    with output_directory(target, overwrite) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        tensors = {key: opened.tensor(key) for key in opened.others}
        for layer in opened.layers:
            A, B, spectra[layer.name] = change(layer)
            new = as_parameters(A, B, layer.shape_A, layer.shape_B)
            for key, tensor in zip((layer.key_A, layer.key_B), new, strict=True):
                kept = _on_disk(Path(scratch), tensor.shape, dtype or tensor.dtype)
                tensors[key] = kept.copy_(tensor)
            if on_layer is not None:
                on_layer()
        write_adapter(folder, tensors, config)
        found = Spectra(metric, spectra)
        write_spectra(folder, found)
        write_sidecar(folder, state)
        if not has_own_card(target):
            write_card(folder, config, state)
        tensors.clear()
    return found


def _on_disk(folder: Path, shape: Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor in a file, which the system writes out when memory is short."""
    path = folder / str(len(os.listdir(folder)))
    with open(path, "xb") as file:
        # Reserved, since a disk that is full at the first write to mapped memory kills the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, shape.numel() * dtype.itemsize)
        else:
            file.truncate(shape.numel() * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)
