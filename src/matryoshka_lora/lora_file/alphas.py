"""The scales of the layers in a single file: from alpha tensors, from metadata, or given."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora_file.diffusers_metadata import Configs
from matryoshka_lora.lora_file.keys.names import PEFT_PREFIX, split_part
from matryoshka_lora.lora_file.peft_folder import rank_and_scale
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from matryoshka_lora.nesting import is_valid_scale

# In older keys, such as NAME.lora.down.weight, the alpha and the magnitude follow NAME directly.
_OLD_SUFFIX = re.compile(r"[._]lora(_linear_layer)?$")


@dataclass(frozen=True)
class ScaleReader:
    """Reads the scales of the layers in a file.

    Attributes:
        file_name: The path of the file, for messages.
        tensors: The tensors of the file by key.
        configs: The configs in diffusers' metadata.
        alpha: The alpha of all layers, for a file without any.
    """

    file_name: str
    tensors: Mapping[str, StoredTensor]
    configs: Configs
    alpha: float | None

    def read(self, name: str, rank: int, key_alpha: str | None) -> float:
        """Return the scale of a layer; it may be negative, or 0.

        Raises:
            MatryoshkaError: The scale is not known, or is no number.
        """
        part, module = split_part(name.removeprefix(PEFT_PREFIX))
        if self.alpha is not None and (key_alpha is not None or part in self.configs):
            raise MatryoshkaError(
                f"{self.file_name} contains the alpha of {name[:200]!r}. Omit `alpha`."
            )
        scale = 1.0
        if key_alpha is not None:
            scale = _read_alpha(self.tensors[key_alpha]) / rank
        elif part in self.configs:
            _, scale = rank_and_scale(self.configs[part], module, self.file_name)
        elif self.alpha is not None:
            scale = self.alpha / rank
        elif name.startswith(PEFT_PREFIX):
            raise MatryoshkaError(
                f"{self.file_name} is the weights file of a PEFT folder, and its scale is in the "
                "folder's adapter_config.json. Pass the folder that contains both, or export the "
                "file with the lora_alpha of that config as `alpha`."
            )
        if not (scale == 0 or is_valid_scale(abs(scale))):
            raise MatryoshkaError(
                f"{self.file_name}: the alpha of {name[:200]} gives the scale {scale!r:.80}, which "
                "is not a number that can be used. Save the file again."
            )
        return scale

    def read_lycoris(self, name: str, rank: int) -> float:
        """Return the scale of a layer of LoHa or LoKr; see `read`."""
        key_alpha = f"{name}.alpha"
        return self.read(name, rank, key_alpha if key_alpha in self.tensors else None)


def _module_of(name: str) -> str:
    """Return the module that a layer belongs to, in older keys without the ``.lora`` at its end."""
    return _OLD_SUFFIX.sub("", name)


def module_names(layer_name: str) -> set[str]:
    """Return the names of a layer's module: its own, and in older keys that without ``.lora``."""
    return {layer_name, _module_of(layer_name)}


def find_alpha_keys(
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


def _read_alpha(tensor: StoredTensor) -> float:
    """Return an alpha, or NaN, which is rejected, if the tensor is not one number."""
    if math.prod(tensor.shape) != 1:
        return math.nan
    return float(tensor.read().astype(np.float64).item())
