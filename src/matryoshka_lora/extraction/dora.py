"""A base model with a DoRA adapter: a tuned model whose weights are computed when they are read.

DoRA gives each row of the new weight a norm of its own, the magnitude m::

    W' = m (W + s B A) / ||W + s B A||

The norms are of rows in PEFT, and of rows or columns in LyCORIS and OneTrainer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.extraction.model_diff import Architecture, ModelFiles
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME, find_layers
from matryoshka_lora.formats.safetensors_io import open_safetensors, read_json
from matryoshka_lora.formats.single_file import from_tensors
from matryoshka_lora.linalg.arrays import Array
from matryoshka_lora.lora.keys import (
    PEFT_PREFIX,
    Model,
    TargetModule,
    find_models,
    find_module,
    module_names,
)
from matryoshka_lora.lora.layer import Layer, StoredTensor
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.tensors import to_numpy, to_torch

_MAGNITUDE = re.compile(r"(?P<module>.+)\.(?P<kind>dora_scale|lora_magnitude_vector(\.weight)?)")


@dataclass(frozen=True)
class Dora:
    """A DoRA adapter.

    Attributes:
        lora: Its layers, without the magnitudes.
        magnitudes: The magnitudes by the name of the layer, of shape (out, ...) for rows or
            (1, in, ...) for columns. A layer without them is plain LoRA.
        files: Its files.
    """

    lora: Lora
    magnitudes: Mapping[str, StoredTensor]
    files: tuple[Path, ...]


def open_dora(path: Path) -> Dora | None:
    """Open a DoRA adapter, a PEFT folder or a single file; None if the path is no adapter.

    Raises:
        MatryoshkaError: It is an adapter without magnitudes, or one that is not supported.
    """
    is_folder = (path / CONFIG_NAME).is_file()
    if path.is_dir() and not is_folder:
        return None
    files = (path / WEIGHTS_NAME, path / CONFIG_NAME) if is_folder else (path,)
    tensors, metadata = open_safetensors(files[0])
    factors: dict[str, StoredTensor] = {}
    magnitudes: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        match = _MAGNITUDE.fullmatch(key)
        if match is None:
            factors[key] = tensor
        elif match["kind"] == "dora_scale":
            magnitudes[match["module"]] = tensor
        else:  # PEFT's is of shape (out,), or (1, out, 1, ...)
            magnitudes[match["module"].removeprefix(PEFT_PREFIX)] = _flatten(tensor)
    if is_folder:
        config = read_json(path / CONFIG_NAME)
        layers, other_tensors = find_layers(factors, {**config, "use_dora": False}, str(path))
        lora = Lora(str(path), layers, other_tensors, config=config)
        if not magnitudes:
            raise MatryoshkaError(
                f"{path} is not DoRA but plain LoRA. Use export, which needs no base model."
            )
    elif magnitudes:
        lora = from_tensors(factors, metadata, path)
        for key in lora.other_tensors:
            raise MatryoshkaError(
                f"{path}: {short(key.rpartition('.')[0])} has no DoRA, LoRA, LoHa or LoKr, but "
                "other tensors, such as a third matrix or an alpha of 0. Remove them from the file."
            )
    else:
        return None
    layer_magnitudes: dict[str, StoredTensor] = {}
    for layer in lora.layers:
        for name in module_names(layer.name) & magnitudes.keys():
            layer_magnitudes[layer.name] = magnitudes.pop(name)
    if magnitudes:
        raise MatryoshkaError(
            f"{path} has a magnitude but no factors of {short(min(magnitudes))}. Save it again."
        )
    return Dora(lora, layer_magnitudes, files)


def _flatten(tensor: StoredTensor) -> StoredTensor:
    shape = (math.prod(tensor.shape),)
    return replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape))


def apply_dora(base: ModelFiles, dora: Dora, architecture: Architecture) -> ModelFiles:
    """Return the base model with a DoRA adapter.

    For an adapter in a single file, the base model is from `rename_for_pipeline`.
    """
    lora = dora.lora
    if lora.config.get("fan_in_fan_out") and not architecture.modules:
        raise MatryoshkaError(
            f"{lora.name} is for transposed weights (fan_in_fan_out), and {base.path} does not say "
            "which. Pass the folder of the base model with its config.json."
        )
    keys = {layer.name: f"{layer.name}.weight" for layer in lora.layers}
    if lora.container == "single":
        keys = _find_weights(lora, base)
    tensors = dict(base.tensors)
    other_tensors = {
        key.removeprefix(PEFT_PREFIX): tensor for key, tensor in lora.other_tensors.items()
    }
    for layer in lora.layers:
        key = keys.get(layer.name, "")
        # PEFT saves the base weight of an embedding, too.
        weight = other_tensors.pop(f"{layer.name}.base_layer.weight", base.tensors.get(key))
        is_transposed = architecture.is_conv1d(layer.name) or "lora_embedding" in layer.keys.A
        size = (layer.out_features, math.prod(layer.in_shape))
        shape = weight.shape if weight else ()
        if is_transposed:
            shape = shape[::-1]
        if weight is None or (shape[0], math.prod(shape[1:])) != size:
            weight_of_base = f"a weight of {list(weight.shape)}" if weight else "no such weight"
            raise MatryoshkaError(
                f"{lora.name} has the layer {short(layer.name)} of {size[1]} inputs and {size[0]} "
                f"outputs, but {base.path} has {weight_of_base}. Pass the base model that it "
                "was trained on, as the program that trained it reads it."
            )
        magnitude = dora.magnitudes.get(layer.name)
        dim = 0  # of the norms, in the order (out, in)
        if magnitude is not None:
            dim = 0 if magnitude.shape[:1] == shape[:1] else 1
            if math.prod(magnitude.shape) != shape[dim]:
                raise MatryoshkaError(
                    f"{lora.name}: a magnitude of shape {list(magnitude.shape)} does not fit the "
                    f"layer {short(layer.name)} of shape {list(shape)}. Save it again."
                )
        tensors[key] = _tuned_weight(weight, layer, magnitude, dim, is_transposed)
    return replace(base, tensors={**tensors, **other_tensors})


def _tuned_weight(
    weight: StoredTensor,
    layer: Layer,
    magnitude: StoredTensor | None,
    dim: int,
    is_transposed: bool,
) -> StoredTensor:
    """Return the weight of a layer with its adapter, which is computed when it is read, in float32.

    Its dtype, in which the factors of its change are written, is the one of the adapter.
    """

    def read() -> Array:
        W = to_torch(weight.read()).float()
        A, B, *_ = layer.read()
        update = layer.scale * to_torch(B).float() @ to_torch(A).float()
        W = W + (update.T if is_transposed else update.reshape(W.shape))
        if magnitude is not None:
            other_dims = [*range(W.ndim)]
            other_dims.remove(1 - dim if is_transposed else dim)
            norms = torch.linalg.vector_norm(W, dim=other_dims, keepdim=True)
            W *= to_torch(magnitude.read()).float().reshape(norms.shape) / norms
        return to_numpy(W)

    return StoredTensor(layer.dtype, weight.shape, read)


def _find_weights(lora: Lora, base: ModelFiles) -> dict[str, str]:
    """Return the key of the weight of each layer of a single file, where the base model has it.

    The two may follow different naming conventions.
    """
    best: dict[str, str] = {}
    for model in find_models([*lora.ranks], lora.weight_shapes):
        weights = {
            _identify(key.removesuffix(".weight"), model): key
            for key in base.tensors
            if key.endswith(".weight")
        }
        weights.pop(None, None)
        keys: dict[str, str] = {}
        for name in lora.ranks:
            module = _identify(name, model)
            if module in weights:
                keys[name] = weights[module]
        best = max(best, keys, key=len)
    return best


def _identify(name: str, model: Model) -> TargetModule | None:
    """Return the module of a model that has a name, without how it is named."""
    target = find_module(name, model)
    if target is None or target.module.swapped_ratio:  # the names decide the order of its rows
        return target
    return target._replace(names=None, prefix="")
