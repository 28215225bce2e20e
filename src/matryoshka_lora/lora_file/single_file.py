"""Single-file LoRAs of image and video models, with the keys of kohya, diffusers and others.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, and the scale is
alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and the alpha,
if any, into the file's metadata. Without an alpha the scale is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora_file.atomic import PathLike, create_file
from matryoshka_lora.lora_file.diffusers_metadata import (
    CONFIGS_KEY,
    Configs,
    can_describe,
    read_configs,
)
from matryoshka_lora.lora_file.key_names import ALL_SUFFIXES, PEFT_PREFIX, split_part
from matryoshka_lora.lora_file.lora import Layer, LoraFile, OutputPlan, Ranks, WrittenOutput
from matryoshka_lora.lora_file.peft_folder import rank_and_scale
from matryoshka_lora.lora_file.safetensors_io import StoredTensor, are_factors, open_safetensors
from matryoshka_lora.lora_file.single_file_metadata import updated_metadata
from matryoshka_lora.nesting import is_valid_scale

# The extra tensors of a layer: a magnitude (DoRA), a mid matrix, a bias.
_EXTRA_TENSOR = re.compile(
    r"(?P<module>.+)\.(dora_scale|magnitude|lora_(mag\w+|mid|up|down|[AB])(\.[^.]+)*)"
)
_OTHER_METHODS = re.compile(r"dora_scale|magnitude|hada_|lokr_|lora_mid|lora_[AB]\.bias")
# In older keys, such as NAME.lora.down.weight, the alpha and the magnitude follow NAME directly.
_OLD_SUFFIX = re.compile(r"[._]lora(_linear_layer)?$")


@dataclass(frozen=True)
class SingleFile(LoraFile):
    """A LoRA in one ``.safetensors`` file. Each layer keeps its own rank; it is never nested."""

    def plan(self, ranks: Ranks) -> OutputPlan:
        """Return what a single file at some ranks will hold.

        All layers with an alpha tensor get the same alpha, the largest rank times
        `LoraFile.output_scale`: diffusers supports only one if ranks differ. Without alpha tensors,
        the scale is stored in the metadata, if diffusers reads it there; otherwise it is 1.

        See `LoraFile.plan` for arguments and errors.
        """
        return self._plan(self.ranks_by_layer(ranks))

    def plan_unchanged(self) -> OutputPlan:
        """Return what a single file will hold whose factors are only rescaled."""
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
        metadata = updated_metadata(self.metadata, self.layers, new_layers, alpha, self.name)
        return OutputPlan(self, tuple(layers), other_tensors, metadata, keep_factors)

    def write_output(self, plan: OutputPlan, output: PathLike, force: bool) -> WrittenOutput:
        """Write a plan as a single file."""
        with create_file(output, force, self.sources) as temporary:
            return plan.write_weights(temporary)


class _FactorKeys(NamedTuple):
    A: str
    B: str


def open_single_file(file: Path) -> SingleFile:
    """Open a LoRA in one file. Its tensors are loaded lazily.

    Layers with extra tensors (DoRA magnitude, mid matrix, bias), and those with an alpha of 0, are
    kept unchanged, in `LoraFile.other_tensors`.

    Raises:
        MatryoshkaError: The file does not exist, is damaged, or has no layers with a rank.
    """
    if file.suffix.lower() != ".safetensors":
        if not file.exists():
            raise MatryoshkaError(f"File not found: {file}")
        raise MatryoshkaError(
            f"{file} is not a LoRA that can be read. Pass a folder that PEFT has saved, or a "
            ".safetensors file."
        )
    tensors, metadata = open_safetensors(file)
    factor_keys = _find_factor_keys(tensors, str(file))
    extended_modules = _find_extended_modules(tensors, factor_keys)
    configs = read_configs(metadata, str(file))
    layer_names = [
        name for name in sorted(factor_keys) if not extended_modules & {name, _module_of(name)}
    ]
    alpha_keys = _find_alpha_keys(tensors, layer_names, str(file))
    # An alpha of 0 switches a layer off. It stays off, as a tensor that is no factor.
    layer_names = [
        name
        for name in layer_names
        if name not in alpha_keys or _read_alpha(tensors[alpha_keys[name]]) != 0
    ]
    layers = [
        _create_layer(
            name, factor_keys[name], alpha_keys.get(name), tensors, configs, file_name=str(file)
        )
        for name in layer_names
    ]
    # diffusers would take the ranks in the metadata for those of the extended modules as well.
    if not layers or (extended_modules and can_describe(layers)):
        raise _no_layers_error(file, tensors)

    other_tensors = dict(sorted(tensors.items()))
    for layer in layers:
        for key in (layer.key_A, layer.key_B, layer.key_alpha):
            if key is not None:
                other_tensors.pop(key, None)
    return SingleFile(str(file), tuple(layers), other_tensors, metadata, files=(file,))


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


def _find_extended_modules(
    tensors: Mapping[str, StoredTensor], factor_keys: Mapping[str, _FactorKeys]
) -> set[str]:
    """Return the modules with extra tensors."""
    paired_keys = {key for keys in factor_keys.values() for key in keys}
    modules: set[str] = set()
    for key in tensors:
        match = _EXTRA_TENSOR.fullmatch(key)
        if match and key not in paired_keys:
            modules.add(match["module"])
    return modules


def _module_of(name: str) -> str:
    """Return the module that a layer belongs to, in older keys without the ``.lora`` at its end."""
    return _OLD_SUFFIX.sub("", name)


def _find_alpha_keys(
    tensors: Mapping[str, StoredTensor], layer_names: Sequence[str], file_name: str
) -> dict[str, str]:
    """Return the key of the alpha by the name of its layer.

    Raises:
        MatryoshkaError: An alpha may belong to several layers, or a layer has several alphas.
    """
    names_by_module: dict[str, list[str]] = {}
    for name in layer_names:
        names_by_module.setdefault(_module_of(name), []).append(name)
    alpha_keys: dict[str, str] = {}
    for key in sorted(tensors):
        owner = key.removesuffix(".alpha")
        if owner == key:
            continue
        names = [owner] if owner in layer_names else names_by_module.get(_module_of(owner), [])
        for name in names:
            if len(names) > 1 or name in alpha_keys:
                raise MatryoshkaError(
                    f"{file_name}: it is not clear which alpha belongs to which layer: {key!r:.80} "
                    f"is a second alpha of {name!r:.80}, or is for two layers. Remove all but one."
                )
            alpha_keys[name] = key
    return alpha_keys


def _create_layer(
    name: str,
    keys: _FactorKeys,
    key_alpha: str | None,
    tensors: Mapping[str, StoredTensor],
    configs: Configs,
    file_name: str,
) -> Layer:
    A, B = tensors[keys.A], tensors[keys.B]
    if not are_factors(A, B):
        raise MatryoshkaError(
            f"{file_name}: the factors of {name[:200]!r} do not fit each other: {A.dtype} "
            f"{list(A.shape)} and {B.dtype} {list(B.shape)}. Save the file again in fp32, bf16 or "
            "fp16."
        )
    rank = A.shape[0]
    part, module = split_part(name.removeprefix(PEFT_PREFIX))
    scale = 1.0
    if key_alpha is not None:
        scale = _read_alpha(tensors[key_alpha]) / rank
    elif part in configs:
        _, scale = rank_and_scale(configs[part], module, file_name)
    elif name.startswith(PEFT_PREFIX):
        raise MatryoshkaError(
            f"{file_name} is the weights file of a PEFT folder, and its scale is in the folder's "
            "adapter_config.json. Pass the folder that contains both."
        )
    if not is_valid_scale(scale):
        raise MatryoshkaError(
            f"{file_name}: the alpha of {name[:200]} gives the scale {scale!r:.80}, and scales are "
            "positive numbers. Save the file again."
        )
    return Layer(name, keys.A, keys.B, A, B, rank, scale, key_alpha=key_alpha)


def _read_alpha(tensor: StoredTensor) -> float:
    """Return an alpha, or NaN, which is rejected, if the tensor is not one number."""
    if math.prod(tensor.shape) != 1:
        return math.nan
    return float(tensor.read().astype(np.float64).item())


def _no_layers_error(file: Path, tensors: Mapping[str, StoredTensor]) -> MatryoshkaError:
    for key in sorted(tensors):
        if _OTHER_METHODS.search(key):
            return MatryoshkaError(
                f"{file} contains {key[:80]!r}. DoRA, LoHa, LoKr and layers with biases cannot be "
                "truncated. Use the file as it is."
            )
    first_key = min(tensors, default="")
    return MatryoshkaError(
        f"{file} contains no LoRA: keys must end in lora_A.weight, lora_down.weight or "
        f"down.weight, got {first_key!r:.80}."
    )
