"""Single-file LoRAs of image and video models, with the keys of kohya, diffusers and others.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, and the scale is
alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and the alpha,
if any, into the file's metadata. Without an alpha the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import pad_end, squared_tails
from matryoshka_lora.lora_file.alphas import ScaleReader, find_alpha_keys, module_names
from matryoshka_lora.lora_file.atomic import PathLike, create_file
from matryoshka_lora.lora_file.diffusers_metadata import (
    CONFIGS_KEY,
    can_describe,
    read_configs,
)
from matryoshka_lora.lora_file.keys.names import ALL_SUFFIXES
from matryoshka_lora.lora_file.lora import (
    Layer,
    LoraFile,
    OutputPlan,
    Ranks,
    TruncatedLayer,
    WrittenOutput,
)
from matryoshka_lora.lora_file.lycoris import read_lycoris_layers
from matryoshka_lora.lora_file.safetensors_io import StoredTensor, are_factors, open_safetensors
from matryoshka_lora.lora_file.single_file_metadata import updated_metadata
from matryoshka_lora.units import pluralize

# The extra tensors of a layer: a magnitude (DoRA), a mid matrix, a bias of A.
_EXTRA_TENSOR = re.compile(
    r"(?P<module>.+)\.(dora_scale|magnitude|lora_(mag\w+|mid|up|down|[AB])(\.[^.]+)*)"
    r"(?<!\.lora_B\.bias)(?<!\.lora_up\.bias)"
)
_BIAS = re.compile(r"(?P<module>.+)\.lora_(B|up)\.bias")
_OTHER_METHODS = re.compile(
    r"dora_scale|magnitude|hada_|lokr_|oft_|lora_mid|lora_(A|B|up|down)\.bias"
)


@dataclass(frozen=True)
class SingleFile(LoraFile):
    """A LoRA in one ``.safetensors`` file. Each layer keeps its own rank; it is never nested.

    Attributes:
        notes: What the user should know of an output, one sentence each.
    """

    notes: tuple[str, ...] = ()

    def plan(self, ranks: Ranks) -> OutputPlan:
        """Return what a single file at some ranks will hold.

        All layers with an alpha tensor get the same alpha, the largest rank times
        `LoraFile.output_scale`: diffusers supports only one if ranks differ. Without alpha tensors,
        the scale is stored in the metadata, if diffusers reads it there; otherwise it is 1.

        See `LoraFile.plan` for arguments and errors.
        """
        return self._plan(self.ranks_by_layer(ranks))

    def plan_unchanged(self) -> OutputPlan:
        """Return what a single file will hold whose factors are only rescaled.

        Raises:
            MatryoshkaError: A layer is not LoRA, so it has no factors of its own.
        """
        for layer in self.layers:
            if layer.kind != "LoRA":
                raise MatryoshkaError(
                    f"{self.name}: {layer.name[:200]} is {layer.kind}, which becomes LoRA at a "
                    "rank. Pass `rank` or `error` too."
                )
        return self._plan({layer.name: layer.rank for layer in self.layers}, keep_factors=True)

    def _plan(self, ranks_by_layer: Mapping[str, int], keep_factors: bool = False) -> OutputPlan:
        alpha = max(ranks_by_layer.values()) * self.output_scale
        metadata_store_scales = CONFIGS_KEY in self.metadata and can_describe(self.layers)

        layers: list[tuple[Layer, Layer]] = []
        other_tensors = dict(self.other_tensors)
        for layer in self.layers:
            rank = ranks_by_layer[layer.name]
            if layer.key_alpha:
                scale = alpha / rank
                array = np.array(alpha, dtype=np.float32)
                other_tensors[layer.key_alpha] = StoredTensor.from_array(array)
            elif metadata_store_scales:
                scale = layer.scale
            else:
                scale = 1.0
            layers.append((layer, layer.with_rank(rank, scale)))
        new_layers = [new for _, new in layers]
        metadata = updated_metadata(
            self.metadata,
            self.layers,
            new_layers,
            alpha,
            self.other_tensors,
            self.name,
            self.changes,
        )
        return OutputPlan(self, tuple(layers), other_tensors, metadata, keep_factors)

    def singular_values(self, layer: Layer) -> Float64Array:
        """Return the singular values of a layer's update, shape (R,), float64."""
        if layer.read_svd is None:
            return super().singular_values(layer)
        return layer.scale * layer.read_svd().values

    def truncate(self, layer: Layer, new: Layer, keep_factors: bool = False) -> TruncatedLayer:
        """Compute the factors of a layer at a rank; see `LoraFile.truncate`."""
        if layer.read_svd is None:
            return super().truncate(layer, new, keep_factors)
        svd = layer.read_svd()
        A, B = svd.factors(new.rank, new.scale / layer.scale)
        missing = new.rank - len(A)
        A, B = pad_end(A, missing, axis=-2), pad_end(B, missing, axis=-1)
        singular_values = layer.scale * svd.values
        return TruncatedLayer(new, A, B, squared_tails(singular_values), singular_values)

    def write_output(self, plan: OutputPlan, output: PathLike, force: bool) -> WrittenOutput:
        """Write a plan as a single file."""
        with create_file(output, force, self.sources) as temporary:
            return plan.write_weights(temporary)


class _FactorKeys(NamedTuple):
    A: str
    B: str


def open_single_file(file: Path, alpha: float | None = None) -> SingleFile:
    """Open a LoRA in one file. Its tensors are loaded lazily.

    Layers of LoHa and LoKr are opened as LoRA layers of their exact rank. Layers with a DoRA
    magnitude or a mid matrix, and those with an alpha of 0, are kept unchanged, in
    `LoraFile.other_tensors`. So are layers with a bias, unless an output keeps their scale: then
    only the bias is.

    Args:
        file: The file.
        alpha: The alpha of each layer, for a file that does not contain it.

    Raises:
        MatryoshkaError: The file does not exist, is damaged, or has no layers with a rank; or it
            contains an alpha, and one is passed.
    """
    if file.suffix.lower() != ".safetensors":
        if not file.exists():
            raise MatryoshkaError(f"File not found: {file}")
        raise MatryoshkaError(
            f"{file} is not a LoRA that can be read. Pass a folder that PEFT has saved, or a "
            ".safetensors file."
        )
    tensors, metadata = open_safetensors(file)
    scales = ScaleReader(str(file), tensors, read_configs(metadata, str(file)), alpha)
    factor_keys = _find_factor_keys(tensors, str(file))
    extended_modules = _find_modules(_EXTRA_TENSOR, tensors, factor_keys)
    lora_layers = _read_lora_layers(tensors, factor_keys, extended_modules, scales)
    if not (CONFIGS_KEY in metadata and can_describe(lora_layers)):
        extended_modules |= _find_rescaled_biases(tensors, factor_keys, lora_layers)
        lora_layers = [
            layer for layer in lora_layers if not extended_modules & module_names(layer.name)
        ]
    lycoris = read_lycoris_layers(tensors, scales.read_lycoris, str(file))
    layers = sorted([*lora_layers, *lycoris.layers], key=lambda layer: layer.name)
    _check_names(layers, str(file))
    # diffusers would take the ranks in the metadata for those of the extended modules as well, and
    # an alpha that is passed is for all layers.
    if not layers or (extended_modules and (can_describe(layers) or alpha is not None)):
        raise _no_layers_error(file, tensors)

    read_keys = set(lycoris.keys)
    for layer in layers:
        read_keys |= {layer.key_A, layer.key_B, layer.key_alpha or ""}
    return SingleFile(
        str(file),
        tuple(layers),
        {key: tensor for key, tensor in sorted(tensors.items()) if key not in read_keys},
        metadata,
        files=(file,),
        notes=_describe_conversions(layers, tensors),
    )


def _find_rescaled_biases(
    tensors: Mapping[str, StoredTensor],
    factor_keys: Mapping[str, _FactorKeys],
    layers: Sequence[Layer],
) -> set[str]:
    """Return the modules with a bias whose scale an output would change.

    Biases are copied, and PEFT multiplies them by the scale; ComfyUI does not.
    """
    modules_with_bias = _find_modules(_BIAS, tensors, factor_keys)
    rescaled_modules: set[str] = set()
    for layer in layers:
        if layer.key_alpha is not None or layer.scale != 1:
            rescaled_modules |= modules_with_bias & module_names(layer.name)
    return rescaled_modules


def _check_names(layers: Sequence[Layer], file_name: str) -> None:
    for layer, next_layer in pairwise(layers):
        if layer.name == next_layer.name:
            raise MatryoshkaError(
                f"{file_name} has {layer.kind} and {next_layer.kind} for one module: "
                f"{layer.name[:200]!r}. Remove one of them."
            )


def _describe_conversions(
    layers: Sequence[Layer], tensors: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """Return a sentence for each kind of layer that an output holds in another form."""
    notes: list[str] = []
    for kind in ("LoHa", "LoKr"):
        count = sum(layer.kind == kind for layer in layers)
        if count:
            notes.append(f"{pluralize(count, f'{kind} layer')} became LoRA.")
    keys = {key for layer in layers for key in (layer.key_A, layer.key_B)}
    if any(key in keys and tensors[key].is_float8 for key in tensors):
        notes.append(
            "The float8 factors became bf16: rounding the new ones to float8 again would add an "
            "error of 4 to 7 %."
        )
    return tuple(notes)


def _read_lora_layers(
    tensors: Mapping[str, StoredTensor],
    factor_keys: Mapping[str, _FactorKeys],
    extended_modules: Set[str],
    scales: ScaleReader,
) -> list[Layer]:
    """Return the layers of LoRA that can be truncated."""
    layer_names = [
        name for name in sorted(factor_keys) if not extended_modules & module_names(name)
    ]
    alpha_keys = find_alpha_keys(tensors, layer_names, scales.file_name)
    layers: list[Layer] = []
    for name in layer_names:
        layer = _create_layer(name, factor_keys[name], alpha_keys.get(name), tensors, scales)
        if layer is not None:
            layers.append(layer)
    return layers


def _find_factor_keys(
    tensors: Mapping[str, StoredTensor], file_name: str
) -> dict[str, _FactorKeys]:
    """Return the keys of both factors by the name of their layer.

    Raises:
        MatryoshkaError: Two pairs have one name, so that they share its alpha.
    """
    factor_keys: dict[str, _FactorKeys] = {}
    for key_A in sorted(tensors):
        for suffixes in ALL_SUFFIXES:
            name = key_A.removesuffix(suffixes.A)
            key_B = name + suffixes.B
            if name != key_A and key_B in tensors:
                if name in factor_keys:
                    raise MatryoshkaError(
                        f"{file_name} has two pairs of factors for one module: "
                        f"{factor_keys[name].A[:80]!r} and {key_A[:80]!r}. Remove one pair."
                    )
                factor_keys[name] = _FactorKeys(key_A, key_B)
    return factor_keys


def _find_modules(
    pattern: re.Pattern[str],
    tensors: Mapping[str, StoredTensor],
    factor_keys: Mapping[str, _FactorKeys],
) -> set[str]:
    """Return the modules with tensors that are not factors and whose keys match a pattern."""
    paired_keys = {key for keys in factor_keys.values() for key in keys}
    modules: set[str] = set()
    for key in tensors:
        match = pattern.fullmatch(key)
        if match and key not in paired_keys:
            modules.add(match["module"])
    return modules


def _create_layer(
    name: str,
    keys: _FactorKeys,
    key_alpha: str | None,
    tensors: Mapping[str, StoredTensor],
    scales: ScaleReader,
) -> Layer | None:
    """Return a layer, or None if its alpha is 0: that switches it off, and it stays off."""
    A, B = tensors[keys.A].widened(), tensors[keys.B].widened()
    if not are_factors(A, B):
        raise MatryoshkaError(
            f"{scales.file_name}: the factors of {name[:200]!r} do not fit each other: {A.dtype} "
            f"{list(A.shape)} and {B.dtype} {list(B.shape)}. Save the file again in fp32, bf16 or "
            "fp16."
        )
    rank = A.shape[0]
    scale = scales.read(name, rank, key_alpha)
    if scale == 0:
        return None
    if scale < 0:
        B = B.negated()
    return Layer(name, keys.A, keys.B, A, B, rank, abs(scale), key_alpha=key_alpha)


def _no_layers_error(file: Path, tensors: Mapping[str, StoredTensor]) -> MatryoshkaError:
    for key in sorted(tensors):
        if _OTHER_METHODS.search(key):
            return MatryoshkaError(
                f"{file} contains {key[:80]!r}. DoRA, OFT, and layers with a mid matrix or with an "
                "alpha and a bias cannot be truncated. Use the file as it is."
            )
    first_key = min(tensors, default="")
    return MatryoshkaError(
        f"{file} contains no LoRA: keys must end in lora_A.weight, lora_down.weight or "
        f"down.weight, got {first_key!r:.80}."
    )
