"""Compare a model with its fine-tuned version, weight by weight.

For a LoRA of an image model, weights are named by the parts of its pipeline. The authors of a model
and diffusers name its modules differently, and checkpoints hold the text encoders too. A model is
recognised by its class in diffusers, or by the beginnings of its keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, optional_imports, wrap_errors
from matryoshka_lora.formats.safetensors_io import open_safetensors, read_json
from matryoshka_lora.lora.keys import ORIGINAL_PART, split_part
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.peft.arrays import to_torch

# The weights of transformers and of diffusers, if they are in one file.
_WEIGHTS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# Names of embeddings and heads, for models whose class is not known.
_EMBEDDING_NAMES = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b")

# The part of a pipeline that a model is, by a word in its class name in diffusers.
_PARTS_BY_CLASS = {"UNet": "unet", "Transformer": "transformer"}
# The prefixes of the parts in a checkpoint.
_CHECKPOINT_PARTS = {
    "model.diffusion_model.": ORIGINAL_PART,
    "diffusion_model.": ORIGINAL_PART,
    "cond_stage_model.transformer.": "text_encoder",  # Stable Diffusion 1
    "cond_stage_model.model.": "text_encoder",  # Stable Diffusion 2
    "conditioner.embedders.0.transformer.": "text_encoder",  # Stable Diffusion XL
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# The part of a model that is alone in a file, by the beginning of one of its keys.
_PARTS_BY_KEY = {
    "input_blocks.": ORIGINAL_PART,  # Stable Diffusion
    "joint_blocks.": ORIGINAL_PART,  # Stable Diffusion 3
    "double_blocks.": ORIGINAL_PART,  # Flux
    "blocks.0.": ORIGINAL_PART,  # Wan
    "noise_refiner.": ORIGINAL_PART,  # Z-Image
    "down_blocks.": "unet",
    "transformer_blocks.": "transformer",
}
# The names of OpenCLIP in those of transformers.
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.*)")
_OPEN_CLIP_NAMES = {
    "attn.in_proj": "self_attn.in_proj",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
}

PIPELINE_PREFIXES = tuple(
    f"{part}." for part in sorted({*_CHECKPOINT_PARTS.values(), *_PARTS_BY_KEY.values()})
)
"""The beginnings of the names of modules that a LoRA file can name."""


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


def open_model(path: Path) -> ModelFiles:
    """Open a model: a folder, sharded or not, or a safetensors file.

    Raises:
        MatryoshkaError: There are no weights, or a file is damaged.
    """
    files = [path]
    if path.is_dir():
        files = [path / name for name in _WEIGHTS_NAMES if (path / name).is_file()][:1]
        if not files:
            shards: set[Path] = set()
            for index in path.glob("*.safetensors.index.json"):
                weight_map = read_json(index).get("weight_map")
                if isinstance(weight_map, dict):
                    # Only the name: an index must not lead out of the folder.
                    shards.update(path / Path(str(shard)).name for shard in weight_map.values())
            files = sorted(shards)
        if not files:
            raise MatryoshkaError(
                f"{path} has no {' or '.join(_WEIGHTS_NAMES)}. Pass one of its files."
            )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= open_safetensors(file)[0]
    config_file = path / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    return ModelFiles(path, tuple(files), tensors, config)


def rename_for_pipeline(base: ModelFiles, tuned: ModelFiles) -> tuple[ModelFiles, ModelFiles]:
    """Return both models with keys that begin with the part of the pipeline.

    OpenCLIP's fused projections become those of transformers, which are slices of their rows.

    Args:
        base: The model before fine-tuning.
        tuned: The model after. Its names may be those of another program.

    Raises:
        MatryoshkaError: The model is not recognised.
    """
    base_part = _find_part(base)
    if base_part is None:
        raise MatryoshkaError(
            f"{base.path} cannot be identified as a part of a pipeline. Pass a checkpoint, or the "
            "folder of a UNet or a transformer that diffusers has saved, or omit `key_format`."
        )
    models: list[ModelFiles] = []
    for model in (base, tuned):
        part = _find_part(model)
        if part is None:
            part = base_part
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in model.tensors.items():
            name = f"{part}.{key}" if part else _rename_checkpoint_key(key)
            module = name.removesuffix("in_proj_weight")
            if module.endswith(".self_attn."):
                for projection, rows in zip("qkv", _split_rows(tensor), strict=True):
                    tensors[f"{module}{projection}_proj.weight"] = rows
            else:
                tensors[name] = tensor
        models.append(replace(model, tensors=tensors))
    return models[0], models[1]


def _find_part(model: ModelFiles) -> str | None:
    """Return the part that a model is; "" if its keys name the parts; None if it is unknown."""
    if any(key.startswith(tuple(_CHECKPOINT_PARTS)) for key in model.tensors):
        return ""
    class_name = str(model.config.get("_class_name"))
    for word, part in _PARTS_BY_CLASS.items():
        if word in class_name:
            return part
    for prefix, part in _PARTS_BY_KEY.items():
        if any(key.startswith(prefix) for key in model.tensors):
            return part
    return None


def _rename_checkpoint_key(key: str) -> str:
    for prefix, part in _CHECKPOINT_PARTS.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            block = _OPEN_CLIP_BLOCK.match(name)
            if block and part.startswith("text_encoder"):
                index, name = block.groups()
                for open_clip_name, new_name in _OPEN_CLIP_NAMES.items():
                    if name.startswith(open_clip_name):
                        name = new_name + name.removeprefix(open_clip_name)
                name = f"text_model.encoder.layers.{index}.{name}"
            return f"{part}.{name}"
    return key


def _split_rows(tensor: StoredTensor) -> list[StoredTensor]:
    """Return the thirds of the rows of a weight: the weights of q, k and v."""
    num_rows = tensor.shape[0] // 3

    def rows_from(start: int) -> StoredTensor:
        shape = (num_rows, *tensor.shape[1:])
        return replace(tensor, shape=shape, read=lambda: tensor.read()[start : start + num_rows])

    return [rows_from(index * num_rows) for index in range(3)]


@dataclass(frozen=True)
class Architecture:
    """What transformers knows about a model; empty for other models.

    Attributes:
        modules: Its modules by name, on the meta device.
        head: Its output embeddings.
        tied_keys: The keys of tied weights: the key of one by the key of the other.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    head: nn.Module | None = None
    tied_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether transformers has the class of the model."""
        return bool(self.modules)

    def is_conv1d(self, module_name: str) -> bool:
        """Whether a module is GPT-2's Conv1D, a linear layer whose weight has shape (in, out)."""
        return type(self.modules.get(module_name)).__name__ == "Conv1D"

    def is_lora_layer(self, module_name: str, weight: StoredTensor) -> bool:
        """Whether LoRA can represent a change of a module's weight."""
        shape = weight.shape
        if not weight.is_factor or len(shape) not in (2, 3, 4) or 1 in shape[:2]:
            return False
        if not self.is_known:
            # The embeddings of image models, for example of the time, are linear layers.
            part, _ = split_part(module_name)
            is_image_model = part and not part.startswith("text_encoder")
            is_embedding = not is_image_model and _EMBEDDING_NAMES.search(module_name)
            return len(shape) != 3 and not is_embedding
        module = self.modules.get(module_name)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module.groups == 1
        if self.is_conv1d(module_name):
            return True
        return isinstance(module, nn.Linear) and module is not self.head


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
    head = skeleton.get_output_embeddings()
    return Architecture(dict(skeleton.named_modules()), head, skeleton.all_tied_weights_keys)


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
    saved_tensors: dict[str, StoredTensor]
    """The tensors of the modules that are saved as they are, after fine-tuning, by key."""
    unsaved_tensors: dict[str, StoredTensor]
    """All other tensors that changed, after fine-tuning, by key."""


def compare_models(
    base: ModelFiles,
    tuned: ModelFiles,
    architecture: Architecture,
    modules_to_save: Sequence[str] = (),
    prefixes: tuple[str, ...] = ("",),
) -> ModelDiff:
    """Return what fine-tuning changed. Two tensors are in memory at a time.

    Weights that are tied to saved ones are saved too: PEFT would untie them.

    Args:
        base: The model before.
        tuned: The model after.
        architecture: The architecture of the base model.
        modules_to_save: Name suffixes of modules that are saved as they are.
        prefixes: The beginnings of the names of modules that may get a LoRA.

    Raises:
        MatryoshkaError: The models are not versions of one model, no layer changed, or a name of
            ``modules_to_save`` matches no module that changed.
    """
    if not base.tensors.keys() & tuned.tensors.keys():
        raise MatryoshkaError(
            f"The models have no weight in common: their keys are, e.g., "
            f"{min(base.tensors, default='')[:80]!r} and {min(tuned.tensors, default='')[:80]!r}. "
            "Pass a model and its fine-tuned version, both saved by the same program."
        )
    suffixes = tuple(modules_to_save)
    layers: dict[str, WeightPair] = {}
    others: dict[str, StoredTensor] = {}
    keys = sorted({*base.tensors, *tuned.tensors})
    for key in tqdm(keys, "comparing", leave=False, disable=None, delay=1):
        old, new = base.tensors.get(key), tuned.tensors.get(key)
        if old is not None and new is not None and _are_equal(old, new):
            continue
        name = _module_of(key)
        may_be_layer = key.endswith(".weight") and name.startswith(prefixes)
        # A quantized weight is not a factor; its other version shows whether it is a layer.
        factor = next((weight for weight in (new, old) if weight and weight.is_factor), None)
        if (
            may_be_layer
            and factor is not None
            and not name.endswith(suffixes)
            and architecture.is_lora_layer(name, factor)
        ):
            if old is None or new is None or not _have_same_form(old, new):
                before, after = (
                    f"{weight.dtype} {list(weight.shape)}" if weight else "missing"
                    for weight in (old, new)
                )
                raise MatryoshkaError(
                    f"{key} is {before} before fine-tuning and {after} after it. Pass two versions "
                    "of one model, neither of them quantized."
                )
            layers[name] = WeightPair(old, new, architecture.is_conv1d(name))
        elif new is not None:
            others[key] = new

    changed_modules = {_module_of(key) for key in others}
    if not layers:
        key = min(others, default="")
        if not others:
            reason = "No linear layer and no convolution changed."
        elif architecture.is_known and not changed_modules & architecture.modules.keys():
            reason = (
                "The class of the model has no module of the weights that changed, e.g. "
                f"{key[:200]}. Load both models with transformers and save them again. If that "
                "keeps the names of the weights, the class is not supported."
            )
        elif others[key].dtype.itemsize == 1:
            reason = f"{key[:200]} is {others[key].dtype}. Pass both models in fp32, bf16 or fp16."
        else:
            reason = f"Only non-LoRA weights changed, e.g. {key}."
        raise MatryoshkaError(reason)

    saved_modules = {name for name in changed_modules if name.endswith(suffixes)}
    if architecture.is_known:  # PEFT knows the modules by the names that they have in the class
        saved_modules &= architecture.modules.keys()
    saved = {key: value for key, value in tuned.tensors.items() if _module_of(key) in saved_modules}
    for key, tied_key in architecture.tied_keys.items():
        if tied_key in saved:
            saved[key] = tuned.tensors.get(key, saved[tied_key])
        if key in saved:
            saved[tied_key] = tuned.tensors.get(tied_key, saved[key])
    for suffix in suffixes:
        if not any(_module_of(key).endswith(suffix) for key in saved):
            raise MatryoshkaError(
                f"`modules_to_save`: {suffix!r:.80} does not match a module that changed."
            )
    return ModelDiff(layers, saved, {key: others[key] for key in others if key not in saved})


def _are_equal(old: StoredTensor, new: StoredTensor) -> bool:
    """Return whether two tensors are equal, or one is the other rounded to its dtype."""
    if not _have_same_form(old, new):
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


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]
