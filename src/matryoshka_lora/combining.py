"""Add adapters up: `combine` writes one nested adapter whose update is a weighted sum of theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora.budget import error_lines
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Layer
from matryoshka_lora.files.output import PathLike, check_place
from matryoshka_lora.files.peft import open_adapter, write_nested, write_rank
from matryoshka_lora.files.tensors import Stored
from matryoshka_lora.nesting import Nesting

# What PEFT finds layers by; where these differ, the layers are named one by one.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# In what names of one layer may differ: kohya's words, and a part of CLIP's names.
_SPELLING = re.compile(r"^lora_(te1?_)?|^text_encoder_(?!\d)|text_model_")
# What a pair of factors means in the model.
_MEANINGS = ("base_model_name_or_path", "fan_in_fan_out", "target_parameters", "layer_replication")


@dataclass(frozen=True)
class Combined:
    """Report what `combine` wrote.

    Attributes:
        layers: How many it has.
        errors: By nested rank, the norm of what is left out of the sum over that of the sum.
    """

    path: Path
    layers: int
    errors: Mapping[int, float]

    def lines(self) -> list[str]:
        """Return what to tell a user."""
        return [f"{self.path}: {self.layers} layers", "", *error_lines(self.errors, "sum")]


def combine(
    sources: Sequence[PathLike],
    target: PathLike,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    force: bool = False,
) -> Combined:
    """Write the sum of some adapters, ``w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...``.

    The factors are laid side by side, which is the exact sum, and reordered by QR and SVD. So rank
    r of the output is the closest one to the sum (Eckart-Young), for every r from 1 to R. A layer
    that an adapter lacks counts as zero there. One layer is in memory at a time.

    Args:
        sources: PEFT folders, or single ``.safetensors`` files; of one base model.
        target: The folder or file to write.
        weights: A number for each source, which may be negative; None is 1 for all.
        rank: R; None is the largest rank of a source.
        force: Whether what is at the target is replaced.

    Raises:
        MatryoshkaError: A source cannot be read, they do not go together, there is no such rank,
            or the target is taken.
        NotFiniteError: A factor holds NaN or infinity.
    """
    files = [open_adapter(source) for source in sources]
    given = [1.0] * len(files) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(files) or not files:
        raise MatryoshkaError(f"{len(given)} weights for {len(files)} adapters: give one for each")
    place = check_place(target, force, [path for file in files for path in file.files])
    if (place.suffix.lower() == ".safetensors") != files[0].is_single:
        kind = "file such as sum.safetensors" if files[0].is_single else "folder"
        raise MatryoshkaError(f"{files[0].name} stays what it is: name a {kind}")
    whole = _sum(files, given)
    top = rank or max(file.max_rank for file in files)
    whole.check_rank(top)
    nesting = Nesting.powers_of_two(top)
    if whole.is_single:
        plan = write_rank(whole, place, top, force)
    else:
        plan = write_nested(replace(whole, nesting=nesting), place, force)
    errors = {r: plan.error(r) for r in nesting.ranks}
    return Combined(place, len(whole.layers), errors)


def _sum(files: Sequence[AdapterFile], weights: Sequence[float]) -> AdapterFile:
    """Return the sum as an adapter without an order, whose tensors are computed on use."""
    first, name = files[0], " + ".join(file.name for file in files)
    parts = dict[str, list[tuple[AdapterFile, Layer, float]]]()
    for file, weight in zip(files, weights, strict=True):
        if reason := _differs(first, file):
            raise MatryoshkaError(f"{file.name} and {first.name} {reason}")
        for layer in file.layers:
            parts.setdefault(layer.name, []).append((file, layer, weight))
    layers = tuple(_side_by_side(parts[key]) for key in sorted(parts))
    config, targets = first.config, [layer.name for layer in layers if layer.experts == 1]
    if config and any(x.config.get(key) != config.get(key) for x in files for key in _TARGETS):
        config = {**config, **dict.fromkeys(_TARGETS), "target_modules": targets}
    paths = tuple(path for file in files for path in file.files)
    return AdapterFile(name, layers, first.others, config, first.metadata, files=paths)


def _differs(one: AdapterFile, other: AdapterFile) -> str:
    """Return why two adapters cannot be added, or nothing."""
    if one.is_single != other.is_single:
        return "are a folder and a file: `matryoshka export FILE --style peft` makes a folder"
    layers = one.layers, other.layers
    a, b = ({_SPELLING.sub("", x.name.replace(".", "_")): x.name for x in each} for each in layers)
    unets = ("input_blocks", "down_blocks")  # two spellings of SDXL's
    both, mixed = a.keys() & b.keys(), all(any(word in x for x in (*a, *b)) for word in unets)
    if one.is_single and (not both or mixed or any(a[key] != b[key] for key in both)):
        return "are for two models, or spell their keys in two ways: `export --style` may help"
    for key in _MEANINGS:
        if one.config.get(key) != other.config.get(key):
            two = f"{one.config.get(key)!r:.80} and {other.config.get(key)!r:.80}"
            return f"differ in {key}, {two}: if it means the same, write it alike in both configs"
    for key in sorted({*one.others, *other.others}):
        x, y = one.others.get(key), other.others.get(key)
        same = x and y and x.shape == y.shape and torch.equal(x.read(), y.read())
        if one.is_single or not same:  # those of single files are changes to weights
            return f"hold {key}, which is no pair of factors and cannot be added"
    return ""


def _side_by_side(parts: Sequence[tuple[AdapterFile, Layer, float]]) -> Layer:
    """Return the layer whose update is the weighted sum of some layers' updates."""
    shapes = {(x.A.shape[1:], x.B.shape[:1], x.B.shape[2:], x.experts) for _, x, _ in parts}
    if len(shapes) > 1:
        found = ", ".join(f"{list(x.A.shape)} in {file.name}" for file, x, _ in parts)
        raise MatryoshkaError(f"the factors of {parts[0][1].name} do not fit each other: {found}")
    joined = parts[0][1].at(sum(layer.rank for _, layer, _ in parts), 1.0)
    alpha = next((x.key_alpha for _, x, _ in parts if x.key_alpha), None)

    def read() -> tuple[Tensor, Tensor]:
        pairs = [(*file.factors(layer), weight * layer.scale) for file, layer, weight in parts]
        A = torch.cat([A.double() for A, _, _ in pairs], -2)
        return joined.tensors(A, torch.cat([B.double() * scale for _, B, scale in pairs], -1))

    types: list[Any] = [each.dtype for _, layer, _ in parts for each in (layer.A, layer.B)]
    dtype = reduce(torch.promote_types, types)
    A = Stored(dtype, joined.A.shape, lambda: read()[0])
    B = Stored(dtype, joined.B.shape, lambda: read()[1])
    return replace(joined, A=A, B=B, key_alpha=alpha)
