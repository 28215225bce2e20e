"""Whether the factors of an adapter are still ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.nesting import Order
from matryoshka_lora.peft.lora_layers import factor_parameters
from matryoshka_lora.sharding import gather_parameter, is_sharded, reshard
from matryoshka_lora.tensors import to_numpy

_SAMPLE_SIZE = 32


class FactorOrder:
    """The order of an adapter's factors, which ends when a factor changes.

    A checksum decides. It reads all factors, so it is compared when the adapter is saved, and
    otherwise only after a sign of a change:

    * A forward in train mode with gradients, which sets `may_have_changed`: an optimizer step may
      have followed, and a fused optimizer increments no version.
    * Another version of a factor. PyTorch counts the in-place operations on each tensor.
    * Another value in a sample of the factors. Operations on ``tensor.data``, such as PEFT's
      hotswap, increment no version.

    A cast to another dtype does not end the order. Sharded factors are compared by all processes.

    Attributes:
        kind: How the factors were ordered last, or None. They may have changed since.
        may_have_changed: Whether the next check must compare the checksum.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> None:
        self.adapter = adapter
        self.kind: Order | None = None
        self.may_have_changed = False
        self._model = model
        self._layers = layers
        self._is_sharded = False
        self._checksums: frozenset[str] = frozenset()
        # At the last comparison of the checksum:
        self._is_valid = False
        self._versions: list[int] = []
        self._first_sample = self._sample = b""
        self._cached_parameters: list[Tensor] = []

    def mark(self, kind: Order) -> None:
        """Record that the factors are ordered now."""
        reshard(self._model)
        # Computed first, so that an interrupt leaves the order as it is.
        checksums = frozenset(map(self._checksum, (None, torch.bfloat16, torch.float16)))
        self._record_fingerprint()
        self.kind, self._checksums, self._is_valid = kind, checksums, True

    def current(self, quick: bool = False) -> Order | None:
        """Return how the factors are ordered; None if they never were, or have changed since.

        Args:
            quick: Whether to sample only the first B, which is fast enough for every forward.
                Sharded factors may have changed after a forward in train mode.
        """
        if self.kind is None:
            return None
        if quick and self._is_sharded:
            # FSDP has gathered some of them for the forward.
            return self.kind if self._is_valid and not self.may_have_changed else None
        parameters = self._parameters()
        is_suspicious = (
            self.may_have_changed
            or self._versions != _versions(parameters)
            or self._first_sample != _sample(parameters[1:2])
            or (not quick and self._sample != _sample(parameters))
        )
        if is_suspicious:
            return self.verify()
        return self.kind if self._is_valid else None

    def verify(self) -> Order | None:
        """Return the same as `current`, but always compare the checksum."""
        if self.kind is None:
            return None
        reshard(self._model)
        self._is_valid = self._checksum() in self._checksums
        self._record_fingerprint()
        return self.kind if self._is_valid else None

    def _record_fingerprint(self) -> None:
        parameters = self._parameters()
        self._is_sharded = is_sharded(parameters[0])
        self._versions = _versions(parameters)
        self._first_sample = _sample(parameters[1:2])
        self._sample = _sample(parameters)
        self.may_have_changed = False

    def _parameters(self) -> list[Tensor]:
        """Return A and B of each layer, cached because the lookup is slow."""
        first_A, _ = factor_parameters(next(iter(self._layers.values())), self.adapter)
        # Sharding replaces the parameters.
        if not self._cached_parameters or self._cached_parameters[0] is not first_A:
            pairs = [factor_parameters(layer, self.adapter) for layer in self._layers.values()]
            self._cached_parameters = [parameter for pair in pairs for parameter in pair]
        return self._cached_parameters

    def _checksum(self, cast_to: torch.dtype | None = None) -> str:
        """Return the checksum of the factors after a cast, in float32."""
        checksum = Checksum()
        for _, layer in sorted(self._layers.items()):
            A, B = map(gather_parameter, factor_parameters(layer, self.adapter))
            checksum.update(to_numpy(A.to(cast_to).float()), to_numpy(B.to(cast_to).float()))
        return checksum.hexdigest()


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    # Tensors that were created in inference mode have no version.
    return [0 if parameter.is_inference() else parameter._version for parameter in parameters]


def _sample(parameters: Sequence[Tensor]) -> bytes:
    """Return evenly spaced values of each factor, with one transfer from each device.

    Sharded factors are left out: the processes have different values, but must agree.
    """
    samples: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if is_sharded(parameter):
            continue
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // _SAMPLE_SIZE)]
        samples.setdefault(parameter.device, []).append(values)
    return b"".join(to_numpy(torch.cat(tensors)).tobytes() for tensors in samples.values())
