"""Compare a model with its fine-tuned version, weight by weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, optional_imports, wrap_errors
from matryoshka_lora.formats.safetensors_io import open_safetensors, read_json
from matryoshka_lora.lora.keys import split_part
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.tensors import to_torch

# The weights of transformers and of diffusers, if they are in one file.
_WEIGHTS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# Names of embeddings and heads, for models whose class is not known.
_EMBEDDING_NAMES = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        path: A folder or a file.
        files: Its safetensors files.
        tensors: Its tensors by key.
        config: Its config.json; empty if it has none.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What transformers knows about a model; empty for other models.

    Attributes:
        modules: Its modules by name, on the meta device, without the output embeddings (the head).
        module_names: The names of all its modules.
        tied_keys: The keys of tied weights: the key of one by the key of the other.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    module_names: frozenset[str] = frozenset()
    tied_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether transformers has the class of the model."""
        return bool(self.module_names)

    def is_conv1d(self, module_name: str) -> bool:
        """Whether a module is GPT-2's Conv1D, a linear layer whose weight has shape (in, out)."""
        return type(self.modules.get(module_name)).__name__ == "Conv1D"

    def is_lora_layer(self, module_name: str, weight: StoredTensor) -> bool:
        """Whether LoRA can represent a change of a module's weight."""
        shape = weight.shape
        if not weight.is_factor or len(shape) not in (2, 3, 4) or 1 in shape[:2]:
            return False
        if not self.is_known:
            return len(shape) != 3 and not _is_embedding(module_name)
        module = self.modules.get(module_name)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.groups == 1
        return isinstance(module, nn.Linear) or self.is_conv1d(module_name)


def _is_embedding(module_name: str) -> bool:
    """Return whether the name of a module is that of an embedding of tokens, or of a head."""
    part, _ = split_part(module_name)
    if part and not part.startswith("text_encoder"):
        return False  # the embeddings of image models, for example of the time, are linear layers
    return _EMBEDDING_NAMES.search(module_name) is not None


class WeightPair(NamedTuple):
    """The weight of a layer before and after fine-tuning."""

    old: StoredTensor
    new: StoredTensor
    is_transposed: bool
    """Whether the shape is (in, out), as in GPT-2's Conv1D."""

    @property
    def full_rank(self) -> int:
        """The largest rank that a change may have."""
        num_rows = self.new.shape[0]
        return min(num_rows, math.prod(self.new.shape) // num_rows)


class ModelDiff(NamedTuple):
    """What fine-tuning changed."""

    layers: dict[str, WeightPair]
    """The changed weights of the layers that LoRA can represent, by the module's name."""
    other_tensors: dict[str, StoredTensor]
    """All other tensors that changed, after fine-tuning, by key."""


def open_model(path: Path) -> ModelFiles:
    """Open a model: a folder, sharded or not, or a safetensors file.

    Raises:
        MatryoshkaError: There are no weights, or a file is damaged.
    """
    files = _weights_files(path) if path.is_dir() else [path]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        file_tensors, _ = open_safetensors(file)
        tensors.update(file_tensors)
    config_file = path / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    return ModelFiles(path, tuple(files), tensors, config)


def _weights_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS_NAMES:
        if (folder / name).is_file():
            return [folder / name]
    shards: set[Path] = set()
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_json(index).get("weight_map")
        if isinstance(weight_map, dict):
            # Only the name: an index must not lead out of the folder.
            shards.update(folder / Path(str(shard)).name for shard in weight_map.values())
    if not shards:
        raise MatryoshkaError(
            f"{folder} has no {' or '.join(_WEIGHTS_NAMES)}. Pass one of its files."
        )
    return sorted(shards)


def read_architecture(model: ModelFiles) -> Architecture:
    """Return what transformers knows about a model, without loading its weights."""
    if "model_type" not in model.config:
        return Architecture()
    with optional_imports():
        import transformers
        from transformers import PreTrainedModel

    class_names = model.config.get("architectures")
    class_name = class_names[0] if class_names and isinstance(class_names, list) else ""
    model_class = getattr(transformers, str(class_name), None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return Architecture()
    # A damaged config may fail with any exception, for example a division by zero.
    with wrap_errors(f"Cannot use the config of {model.path}", "Copy it again."):
        config = transformers.AutoConfig.from_pretrained(model.path, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = model_class(config)
    modules = dict(skeleton.named_modules())
    names = frozenset(modules)
    head = skeleton.get_output_embeddings()
    modules = {name: module for name, module in modules.items() if module is not head}
    return Architecture(modules, names, skeleton.all_tied_weights_keys)


def compare_models(
    base: ModelFiles,
    tuned: ModelFiles,
    architecture: Architecture,
    modules_to_save: Sequence[str],
    prefixes: tuple[str, ...] = ("",),
) -> ModelDiff:
    """Return what fine-tuning changed. Two tensors are in memory at a time.

    Args:
        base: The model before.
        tuned: The model after.
        architecture: That of the base model.
        modules_to_save: Name suffixes of modules that are saved as they are.
        prefixes: The beginnings of the names of modules that may get a LoRA.

    Raises:
        MatryoshkaError: The models are not versions of one model, or no layer changed.
    """
    if not base.tensors.keys() & tuned.tensors.keys():
        raise MatryoshkaError(
            f"The models have no weight in common: their keys are, e.g., "
            f"{min(base.tensors, default='')[:80]!r} and {min(tuned.tensors, default='')[:80]!r}. "
            "Pass a model and its fine-tuned version, both saved by the same program."
        )
    layers: dict[str, WeightPair] = {}
    other_tensors: dict[str, StoredTensor] = {}
    keys = sorted({*base.tensors, *tuned.tensors})
    for key in tqdm(keys, "comparing", leave=False, disable=None, delay=1):
        old, new = base.tensors.get(key), tuned.tensors.get(key)
        if _is_unchanged(old, new):
            continue
        module_name = key.removesuffix(".weight")
        may_be_layer = module_name != key and module_name.startswith(prefixes)
        may_be_layer = may_be_layer and not module_name.endswith(tuple(modules_to_save))
        if may_be_layer and _is_layer(architecture, module_name, old, new):
            layers[module_name] = _weight_pair(key, old, new, architecture.is_conv1d(module_name))
        elif new is not None:
            other_tensors[key] = new
    if not layers:
        raise _no_layers_error(other_tensors, architecture)
    return ModelDiff(layers, other_tensors)


def _no_layers_error(
    other_tensors: Mapping[str, StoredTensor], architecture: Architecture
) -> MatryoshkaError:
    if not other_tensors:
        return MatryoshkaError("No linear layer and no convolution changed.")
    key = min(other_tensors)
    changed_modules = {_module_of(key) for key in other_tensors}
    if architecture.is_known and not changed_modules & architecture.module_names:
        return MatryoshkaError(
            f"The class of the model has no module of the weights that changed, e.g. {key[:200]}. "
            "Load both models with transformers and save them again. If that keeps the names of "
            "the weights, the class is not supported."
        )
    if other_tensors[key].dtype.itemsize == 1:
        return MatryoshkaError(
            f"{key[:200]} is {other_tensors[key].dtype}. Pass both models in fp32, bf16 or fp16."
        )
    return MatryoshkaError(f"Only non-LoRA weights changed, e.g. {key}.")


def _is_unchanged(old: StoredTensor | None, new: StoredTensor | None) -> bool:
    """Return whether two tensors are equal, or one is the other rounded to its dtype."""
    if old is None or new is None or not _have_same_form(old, new):
        return False
    old_values, new_values = to_torch(old.read()), to_torch(new.read())
    if old_values.is_floating_point() != new_values.is_floating_point():
        return False
    if not old_values.is_floating_point():
        return torch.equal(old_values, new_values)
    return torch.equal(old_values.to(new_values.dtype), new_values) or torch.equal(
        old_values, new_values.to(old_values.dtype)
    )


def _have_same_form(old: StoredTensor, new: StoredTensor) -> bool:
    return old.shape == new.shape and old.is_factor == new.is_factor


def _is_layer(
    architecture: Architecture,
    module_name: str,
    old: StoredTensor | None,
    new: StoredTensor | None,
) -> bool:
    """Return whether a weight belongs to a layer that LoRA can represent."""
    for weight in (new, old):
        # A quantized weight is not a factor; its other version shows whether it is a layer.
        if weight is not None and weight.is_factor:
            return architecture.is_lora_layer(module_name, weight)
    return False


def _weight_pair(
    key: str, old: StoredTensor | None, new: StoredTensor | None, is_transposed: bool
) -> WeightPair:
    if old is None or new is None or not _have_same_form(old, new):
        raise MatryoshkaError(
            f"{key} is {_describe(old)} before fine-tuning and {_describe(new)} after it. Pass "
            "two versions of one model, neither of them quantized."
        )
    return WeightPair(old, new, is_transposed)


def _describe(tensor: StoredTensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tensor.dtype} {list(tensor.shape)}"


def saved_tensors(
    diff: ModelDiff, tuned: ModelFiles, architecture: Architecture, modules_to_save: Sequence[str]
) -> dict[str, StoredTensor]:
    """Return the tensors of the changed modules that are saved as they are, by key.

    Weights that are tied to them are saved too: PEFT would untie them.

    Args:
        diff: From `compare_models`.
        tuned: The model after fine-tuning.
        architecture: That of the base model.
        modules_to_save: Name suffixes of modules.

    Raises:
        MatryoshkaError: A name of ``modules_to_save`` matches no module that changed.
    """
    saved_modules = _changed_modules(diff.other_tensors, modules_to_save)
    if architecture.is_known:  # PEFT knows the modules by the names that they have in the class
        saved_modules &= architecture.module_names
    saved: dict[str, StoredTensor] = {}
    for key, tensor in tuned.tensors.items():
        if _module_of(key) in saved_modules:
            saved[key] = tensor
    for key, tied_key in architecture.tied_keys.items():
        if tied_key in saved:
            saved[key] = tuned.tensors.get(key, saved[tied_key])
        if key in saved:
            saved[tied_key] = tuned.tensors.get(tied_key, saved[key])
    for name in modules_to_save:
        if not any(_module_of(key).endswith(name) for key in saved):
            raise MatryoshkaError(
                f"`modules_to_save`: {name!r:.80} does not match a module that changed."
            )
    return saved


def _changed_modules(keys: Iterable[str], modules_to_save: Sequence[str]) -> set[str]:
    modules = {_module_of(key) for key in keys}
    return {name for name in modules if name.endswith(tuple(modules_to_save))}


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]
