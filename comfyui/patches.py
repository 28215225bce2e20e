"""All LoRAs that are applied to a model of ComfyUI, as one LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import matryoshka_lora as ml
from matryoshka_lora.lora.combine import sum_layers
from matryoshka_lora.lora.layer import LayerKeys, StoredTensor, sum_tensors

from .adapters import SOURCE, read_adapter, store_tensor


class Patch(NamedTuple):
    """A change of a weight, an entry of a list in ``ModelPatcher.patches``.

    Attributes:
        strength: The factor of the change.
        change: A ``comfy.weight_adapter.WeightAdapterBase``, or the kind of another change and its
            tensors.
        strength_model: The factor of the weight, 1 for LoRAs.
        offset: The dimension, start and length of the part of a fused weight, or None.
        function: Reorders the rows of the change, or is None.
    """

    strength: float
    change: Any
    strength_model: float
    offset: tuple[int, int, int] | None
    function: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def is_dense(self) -> bool:
        """Whether the change has the shape of the weight."""
        return isinstance(self.change, (tuple, list))


def collect_loras(model: Any, clip: Any = None) -> ml.Lora:
    """Return the sum of all LoRAs on a model, and on its text encoders.

    The rank of a layer is the sum of the ranks. ComfyUI reads the keys for every architecture.

    Args:
        model: A ``ModelPatcher``.
        clip: A ``CLIP``, or None.

    Raises:
        MatryoshkaError: Nothing is applied to the model, or something that is not a LoRA.
    """
    layers: list[ml.Layer] = []
    other_tensors: dict[str, StoredTensor] = {}
    parts = [(model, "")]
    if clip is not None:
        parts.append((clip.patcher, "text_encoders."))
    for patcher, prefix in parts:
        weights = patcher.model_state_dict()
        for key in patcher.patches:
            patches = [Patch(*patch) for patch in patcher.patches[key] if patch[0] != 0]
            if any(patch.strength_model != 1 for patch in patches):
                raise ml.MatryoshkaError(
                    f"{key} belongs to a merge of models, not only to LoRAs. Connect the model "
                    "before the merge."
                )
            name = prefix + key.removesuffix(".weight")
            if any(patch.is_dense for patch in patches):
                # The keys that ComfyUI reads for the change of a weight and of a bias.
                is_bias = name.endswith(".bias")
                dense_key = f"{name.removesuffix('.bias')}.diff{'_b' if is_bias else ''}"
                terms = [(patch.strength, _read_dense(key, patch)) for patch in patches]
                other_tensors[dense_key] = sum_tensors(dense_key, terms)
            else:
                layers += _read_layers(key, name, patches, tuple(weights[key].shape))
    if not layers:
        raise ml.MatryoshkaError(
            "No LoRA is applied to the model. Connect the MODEL output of a LoRA loader, with a "
            "LoRA that is for this model."
        )
    layers.sort(key=lambda layer: layer.name)
    return ml.Lora(SOURCE, tuple(layers), other_tensors, {"format": "pt"}, container="single")


def _read_dense(key: str, patch: Patch) -> StoredTensor:
    """Return a dense change of a weight, such as a bias or the scale of a norm."""
    kind = patch.change[0] if patch.is_dense else getattr(patch.change, "name", "unknown")
    if kind == "diff" and patch.is_dense and patch.offset is None and patch.function is None:
        tensor, *options = patch.change[1]
        if not options:
            return store_tensor(tensor)
    raise ml.MatryoshkaError(
        f"The change of {key} has the kind {str(kind)!r:.40}, which cannot be added to the others. "
        "Remove its loader from the graph."
    )


def _read_layers(
    key: str, name: str, patches: Sequence[Patch], shape: tuple[int, ...]
) -> list[ml.Layer]:
    """Return the sum of the adapters of one weight as a layer, or nothing if all alphas are 0."""
    layers: list[ml.Layer] = []
    strengths: list[float] = []
    for patch in patches:
        layer = read_adapter(key, name, patch.change)
        if layer is not None:
            layers.append(_on_whole_weight(key, layer, patch, shape))
            strengths.append(patch.strength)
    if not layers:
        return []
    # Loaders that expect one alpha for all layers would compute other strengths without the alpha.
    keys = LayerKeys(f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha")
    return [replace(sum_layers(layers, strengths), keys=keys)]


def _on_whole_weight(key: str, layer: ml.Layer, patch: Patch, shape: tuple[int, ...]) -> ml.Layer:
    """Return the layer of a patch with the rows and columns of the weight."""
    function = patch.function
    if function is not None:
        layer = layer.map(lambda factors: _reorder_rows(key, function, factors))
    sizes = [layer.out_features, math.prod(layer.in_shape)]
    if patch.offset is not None:
        dim, start, length = patch.offset
        if dim > 1 or sizes[dim] != length:
            raise ml.MatryoshkaError(
                f"The LoRA on a part of {key} has another shape than this part. Use LoRAs of this "
                "model only."
            )
        sizes[dim] = shape[dim]
        widths = (start, shape[dim] - start - length)

        def pad(factors: ml.Factors) -> ml.Factors:
            if dim == 0:
                return factors._replace(B=np.pad(factors.B, [widths, (0, 0)]))
            return factors._replace(A=np.pad(factors.A, [(0, 0), widths]))

        layer = layer.map(pad)
    out_features, num_inputs = sizes
    # A LoRA for a 1 x 1 convolution may have the shapes of a linear layer.
    has_kernel = len(shape) > 2 and math.prod(shape[1:]) == num_inputs
    return replace(
        layer, out_features=out_features, in_shape=shape[1:] if has_kernel else (num_inputs,)
    )


def _reorder_rows(
    key: str, function: Callable[[torch.Tensor], torch.Tensor], factors: ml.Factors
) -> ml.Factors:
    """Return factors after a function of the change ``B A``, which is a function of its rows."""
    A, B = factors.A.astype(np.float64), factors.B.astype(np.float64)
    new_B = function(torch.from_numpy(B)).numpy()
    change = function(torch.from_numpy(B @ A)).numpy()
    if not np.allclose(new_B @ A, change, rtol=1e-9, atol=1e-9 * np.abs(change).max()):
        raise ml.MatryoshkaError(
            f"ComfyUI transforms the LoRA on {key} in a way that cannot be saved. Remove its "
            "loader from the graph."
        )
    return ml.Factors(A, new_B)
