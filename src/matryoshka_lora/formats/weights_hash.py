"""Which weights a sidecar was written for: a hash of so few numbers that opening an adapter stays cheap.

Of each layer they are the first row of A and the first number of B. They begin their tensors, so that nothing else is
read; a file of directions has them in its first row; every rank of an adapter has the same; and training changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

from torch import Tensor

from matryoshka_lora.formats.layout import Layer


def hash_first(layer: Layer, key: str, tensor: Tensor) -> str:
    """The hash of a factor's first numbers, as float64: the same numbers in a wider dtype have the same.

    Args:
        layer: That the factor is of.
        key: Which of the two it is.
        tensor: The factor in PEFT's layout, or its first row.
    """
    numbers = tensor[:1].flatten()
    numbers = numbers if key == layer.key_A else numbers[:1]
    return sha256(numbers.detach().cpu().double().numpy().tobytes()).hexdigest()


def weights_hash(layers: Iterable[Layer], first: Mapping[str, str]) -> str:
    """The hash of an adapter's weights.

    Args:
        layers: Of the adapter.
        first: `hash_first` of their factors, by key.
    """
    found = sorted((layer.name, first[layer.key_A], first[layer.key_B]) for layer in layers)
    return sha256(json.dumps(found).encode()).hexdigest()


def hash_of_tensors(layers: Sequence[Layer], tensors: Mapping[str, Tensor]) -> str:
    """The `weights_hash` of tensors in memory, in PEFT's layout."""
    keys = [(layer, key) for layer in layers for key in (layer.key_A, layer.key_B)]
    return weights_hash(layers, {key: hash_first(layer, key, tensors[key]) for layer, key in keys})
