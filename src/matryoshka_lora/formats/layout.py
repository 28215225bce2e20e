"""How PEFT lays the factors of a layer out: their names, and their tensors seen as matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Size, Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import AdapterConfig

_STRANGE = re.compile(r"[/\\]|^__")
_SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))

# Of the layers whose weights PEFT stores when a vocabulary has grown: its own list, and GPT-2's, NeoX's and Falcon's.
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}

_AGAIN = "The file is damaged or not ours: copy the adapter again"


@dataclass(frozen=True)
class Layer:
    """One pair of factors.

    Attributes:
        name: Its module's name in the base model.
        key_A: The key of A in PEFT's file.
        key_B: The key of B.
        shape_A: Of A in PEFT's file.
        shape_B: Of B.
        rank: Of this layer.
        scale: What PEFT multiplies ``B A`` with.
    """

    name: str
    key_A: str
    key_B: str
    shape_A: Size
    shape_B: Size
    rank: int
    scale: float

    @property
    def experts(self) -> int:
        """How many pairs are stacked in it."""
        return self.shape_A[0] // self.rank

    @property
    def width(self) -> int:
        """How many numbers one more rank adds: in + out, times the experts."""
        return (self.shape_A.numel() + self.shape_B.numel()) // self.rank

    def at(self, rank: int, scale: float) -> Layer:
        """The same layer with another rank and scale."""
        shape_A = Size((self.shape_A[0] // self.rank * rank, *self.shape_A[1:]))
        shape_B = Size((self.shape_B[0], self.shape_B[1] // self.rank * rank, *self.shape_B[2:]))
        return replace(self, shape_A=shape_A, shape_B=shape_B, rank=rank, scale=scale)

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """PEFT's tensors of this layer as matrices; see `as_matrices`."""
        return as_matrices(A, B, self.rank)

    def parameters(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices as PEFT's tensors of this layer."""
        return as_parameters(A, B, self.shape_A, self.shape_B)


def as_matrices(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """PEFT's parameters as A of shape (R, in) and B of shape (out, R), views where possible.

    Kernels of convolutions are flattened. Experts become a leading dimension: PEFT's A is (experts * R, in) then, and
    its B is (out, R * experts) with the expert running fastest.
    """
    experts = A.shape[0] // rank
    if experts > 1:
        return A.view(experts, rank, -1), B.view(B.shape[0], rank, experts).permute(2, 0, 1)
    return A.flatten(1), B.flatten(1)


def as_parameters(A: Tensor, B: Tensor, shape_A: Size, shape_B: Size) -> tuple[Tensor, Tensor]:
    """The inverse of `as_matrices`, for parameters of these shapes; the rank may be smaller than it was."""
    if A.ndim == 3:
        return A.reshape(-1, A.shape[-1]), B.permute(1, 2, 0).reshape(B.shape[1], -1)
    return A.reshape(-1, *shape_A[1:]), B.reshape(shape_B[0], -1, *shape_B[2:])


def factor_keys(keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """For each layer of a PEFT state dict: its module's name as PEFT writes it, the key of A and the key of B."""
    for key in keys:
        for suffix_A, suffix_B in _SUFFIXES:
            if key.endswith(suffix_A):
                module = key.removesuffix(suffix_A)
                yield module, key, module + suffix_B


def layer_name(module: str) -> str:
    """The name in the base model of a module as PEFT writes it."""
    return module.removeprefix("base_model.model.")


def find_layers(shapes: Mapping[str, Sequence[int]], config: AdapterConfig, where: str) -> tuple[Layer, ...]:
    """The layers of an adapter, in the order of their names.

    Args:
        shapes: Of all its tensors, by key.
        config: Its config.
        where: What is looked at, for messages.

    Raises:
        MatryoshkaError: A factor is missing or has another rank than its config says, or a tensor belongs to nothing.
    """
    found = []
    for module, key_A, key_B in factor_keys(shapes):
        check_name(module, where)
        if key_B not in shapes:
            raise MatryoshkaError(f"{where} lacks tensor {key_B}. {_AGAIN}")
        shape_A, shape_B = Size(shapes[key_A]), Size(shapes[key_B])
        name = layer_name(module)
        rank = config.rank_of(name)
        rows, columns = (shape[place] if len(shape) > 1 else 0 for shape, place in ((shape_A, 0), (shape_B, 1)))
        # One expert has R of both; a stack of them has the same multiple of R.
        whole = rows % rank == 0 if config.target_parameters else rows == rank
        if not (whole and rows and columns == rows and all(shape_A) and all(shape_B)):
            raise MatryoshkaError(
                f"{where}: A and B of layer {module} have shapes {list(shape_A)} and {list(shape_B)}, which are not "
                f"of rank {rank}. {_AGAIN}"
            )
        found.append(Layer(name, key_A, key_B, shape_A, shape_B, rank, config.scale_of(name)))
    if not found:
        raise MatryoshkaError(f"{where} holds no factors. {_AGAIN}")
    factors = {key for layer in found for key in (layer.key_A, layer.key_B)}
    for key in sorted(shapes.keys() - factors):
        if ".lora_" in key or not (config.trained_besides or key.endswith(".base_layer.weight")):
            raise foreign(key, where)
    return tuple(sorted(found, key=lambda layer: layer.name))


def foreign(key: str, where: str) -> MatryoshkaError:
    """The error for a tensor that is no part of the adapter."""
    if ".lora_" not in key and not _EMBEDDINGS.isdisjoint(key.split(".")):
        return MatryoshkaError(
            f"{where} holds {key}, a whole embedding, which a nested adapter does not carry: PEFT stores it where "
            "tokens were added to the model, or where it is a target and not the base model's. Load this adapter with "
            "PEFT, save it with save_embedding_layers=False, and its base model (unload()) beside it; or train one on "
            "the enlarged model, saved first, with the new tokens in LoraConfig's trainable_token_indices, which are "
            "carried"
        )
    return MatryoshkaError(f"{where} holds tensor {key}, which belongs to no part of the adapter. {_AGAIN}")


def check_name(module: str, where: str) -> None:
    """Refuse a name that no module of a model has, such as a path."""
    parts = module.split(".")
    if len(module) > 500 or not module.isprintable() or not all(parts) or any(_STRANGE.search(part) for part in parts):
        raise MatryoshkaError(f"{where} has factors for {module[:80]!r}, which is no layer. Copy the adapter again")
