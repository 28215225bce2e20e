"""Compare a model with its fine-tuned version, weight by weight.

For a LoRA of an image model, weights are named by the parts of its pipeline. The authors of a model
and diffusers name its modules differently, and checkpoints also hold the text encoders. A model is
recognised by its class in diffusers, or by the beginnings of its keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, optional_imports, short, wrap_errors
from matryoshka_lora.formats.safetensors_io import open_safetensors, read_json
from matryoshka_lora.linalg.arrays import BFLOAT16, Array, DType
from matryoshka_lora.lora.keys import split_part
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.tensors import to_torch, to_torch_dtype

# The weights of transformers and of diffusers, if they are in one file.
_WEIGHTS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# Names of embeddings and heads, for models whose class is not known.
_EMBEDDING_NAMES = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\bshared\b")

# The prefixes of the parts of a pipeline in a checkpoint, and in LoRA files.
_CHECKPOINT_PREFIXES = {
    "model.diffusion_model.": "diffusion_model.",
    "diffusion_model.": "diffusion_model.",
    "cond_stage_model.transformer.": "text_encoder.",  # Stable Diffusion 1
    "cond_stage_model.model.": "text_encoder.",  # Stable Diffusion 2
    "conditioner.embedders.0.transformer.": "text_encoder.",  # Stable Diffusion XL
    "conditioner.embedders.1.model.": "text_encoder_2.",
}
# The prefix of a model that is alone in a file, by a word in its class name in diffusers, or by the
# beginning of one of its keys.
_MODEL_PREFIXES = {
    "UNet": "unet.",
    "Transformer": "transformer.",
    "input_blocks.": "diffusion_model.",  # Stable Diffusion
    "joint_blocks.": "diffusion_model.",  # Stable Diffusion 3
    "double_blocks.": "diffusion_model.",  # Flux
    "blocks.0.": "diffusion_model.",  # Wan
    "noise_refiner.": "diffusion_model.",  # Z-Image
    "down_blocks.": "unet.",
    "transformer_blocks.": "transformer.",
}
# Maps OpenCLIP names to transformers names.
_OPEN_CLIP_BLOCK = r"^(text_encoder(?:_2)?\.)transformer\.resblocks\.(\d+)\."
_OPEN_CLIP_NAMES = {
    _OPEN_CLIP_BLOCK: r"\1text_model.encoder.layers.\2.",
    r"(?<=\d\.)attn\.(in_proj|out_proj\.)": r"self_attn.\1",
    r"(?<=\d\.)mlp\.c_fc\.": "mlp.fc1.",
    r"(?<=\d\.)mlp\.c_proj\.": "mlp.fc2.",
    r"(?<=\d\.)ln_([12])\.": r"layer_norm\1.",
}

# The beginnings of the names of modules that a LoRA file can name.
_PIPELINE_PREFIXES = (
    "diffusion_model.",
    "text_encoder.",
    "text_encoder_2.",
    "transformer.",
    "unet.",
)


# The scales of float8 weights by the program: ComfyUI, compressed-tensors and ComfyUI, DeepSeek.
_SCALE_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Further tensors of such files that are no weights.
_QUANTIZATION_NAMES = ("scale_input", "input_scale", "comfy_quant")


@dataclass(frozen=True)
class Float8Tensor(StoredTensor):
    """A float8 tensor of a model. It is read in float32, and written in bfloat16.

    Attributes:
        float8: The dtype of the numbers in the file.
        scale: The factor of these numbers.
    """

    float8: DType
    scale: float


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    Attributes:
        path: A folder or a file.
        files: Its safetensors files.
        tensors: Its tensors by key.
        config: Its config.json; empty if it has none.
        prefixes: The beginnings of the names of modules that may get a LoRA.
    """

    path: Path
    files: Sequence[Path]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    prefixes: tuple[str, ...] = ("",)


def open_model(path: Path) -> ModelFiles:
    """Open a model: a folder, sharded or not, or a safetensors file.

    A float8 weight is multiplied by its scale, if it has one.

    Raises:
        MatryoshkaError: There are no weights, a file is damaged, or a weight has several scales.
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
                f"{path} has no {' or '.join(_WEIGHTS_NAMES)}. Pass the folder or the safetensors "
                "file of a whole model."
            )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= open_safetensors(file)[0]
    config_file = path / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    return ModelFiles(path, files, _scale_float8(tensors, path), config)


def _scale_float8(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model with its float8 weights multiplied by their scales."""
    scaled: dict[str, StoredTensor] = {}
    no_weights = {key for key in tensors if key.endswith("scaled_fp8")}
    for key, tensor in tensors.items():
        scale_keys: list[str] = []
        if key.endswith(".weight") and (tensor.is_float8 or tensor.is_float):
            module = key.removesuffix(".weight")
            scale_keys = [f"{module}.{name}" for name in _SCALE_NAMES]
            scale_keys = [scale_key for scale_key in scale_keys if scale_key in tensors]
            no_weights |= {*scale_keys, *(f"{module}.{name}" for name in _QUANTIZATION_NAMES)}
        for scale_key in scale_keys:
            if tensor.is_float or math.prod(tensors[scale_key].shape) != 1:
                raise MatryoshkaError(
                    f"{path}: {short(scale_key)} of shape {list(tensors[scale_key].shape)} scales "
                    f"a weight in {tensor.dtype}. Only float8 weights with one scale each can be "
                    "read. Pass the model in bf16, fp16 or fp32."
                )
        if tensor.is_float8:
            scales = [float(tensors[scale_key].read().item()) for scale_key in scale_keys]
            tensor = _float8_tensor(tensor, math.prod(scales))
        scaled[key] = tensor
    return {key: tensor for key, tensor in scaled.items() if key not in no_weights}


def _float8_tensor(tensor: StoredTensor, scale: float) -> Float8Tensor:
    def read() -> Array:
        return tensor.read().astype(np.float32) * np.float32(scale)

    return Float8Tensor(BFLOAT16, tensor.shape, read, tensor.dtype, scale)


def rename_for_pipeline(base: ModelFiles, tuned: ModelFiles) -> tuple[ModelFiles, ModelFiles]:
    """Return both models with keys that begin with the part of the pipeline.

    OpenCLIP's fused projections are split into the query, key and value projections of
    transformers. The keys of the tuned model may follow another naming convention.
    """
    base_prefix = _find_prefix(base)
    if base_prefix is None:
        raise MatryoshkaError(
            f"{base.path} cannot be identified as a part of a pipeline. Pass a checkpoint, or the "
            "folder of a UNet or a transformer that diffusers has saved, or omit `key_format`."
        )
    models: list[ModelFiles] = []
    for model in (base, tuned):
        new_prefix = _find_prefix(model)
        if new_prefix is None:
            new_prefix = base_prefix
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in model.tensors.items():
            name = new_prefix + key
            for prefix, part_prefix in _CHECKPOINT_PREFIXES.items():
                if name.startswith(prefix):
                    name = part_prefix + name.removeprefix(prefix)
                    break
            if re.match(_OPEN_CLIP_BLOCK, name):
                for pattern, replacement in _OPEN_CLIP_NAMES.items():
                    name = re.sub(pattern, replacement, name, count=1)
            module = name.removesuffix("in_proj_weight")
            if module.endswith(".self_attn."):
                for index, projection in enumerate("qkv"):
                    third = _take_third(tensor, index)
                    tensors[f"{module}{projection}_proj.weight"] = third
            else:
                tensors[name] = tensor
        models.append(replace(model, tensors=tensors, prefixes=_PIPELINE_PREFIXES))
    return models[0], models[1]


def _find_prefix(model: ModelFiles) -> str | None:
    """Return the prefix that a model's keys lack, empty for a checkpoint; None if it is unknown."""
    if any(key.startswith(tuple(_CHECKPOINT_PREFIXES)) for key in model.tensors):
        return ""
    class_name = str(model.config.get("_class_name"))
    for text, prefix in _MODEL_PREFIXES.items():
        if text in class_name or any(key.startswith(text) for key in model.tensors):
            return prefix
    return None


def _take_third(tensor: StoredTensor, index: int) -> StoredTensor:
    """Return a third of the rows of a weight."""
    size = tensor.shape[0] // 3
    rows = slice(index * size, (index + 1) * size)
    return replace(tensor, shape=(size, *tensor.shape[1:]), read=lambda: tensor.read()[rows])


@dataclass(frozen=True)
class Architecture:
    """The modules of a transformers model; empty for other models.

    Attributes:
        modules: Its modules by name, on the meta device; empty if transformers does not have its
            class.
        head: Its output embeddings.
        tied_keys: The keys of tied weights: the key of one by the key of the other.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    head: nn.Module | None = None
    tied_keys: Mapping[str, str] = field(default_factory=dict)

    def is_conv1d(self, module_name: str) -> bool:
        """Whether a module is GPT-2's Conv1D, a linear layer whose weight has shape (in, out)."""
        return type(self.modules.get(module_name)).__name__ == "Conv1D"

    def is_lora_layer(self, module_name: str, weight: StoredTensor) -> bool:
        """Whether LoRA can represent a change of a module's weight."""
        shape = weight.shape
        if len(shape) not in (2, 3, 4) or 1 in shape[:2]:
            return False
        if not self.modules:
            # The embeddings of image models, for example of the time, are linear layers.
            part, _ = split_part(module_name)
            is_image_model = part and not part.startswith("text_encoder")
            is_embedding = not is_image_model and _EMBEDDING_NAMES.search(module_name)
            return len(shape) != 3 and not is_embedding
        if self.is_conv1d(module_name):
            return True
        module = self.modules.get(module_name)
        is_layer = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return is_layer and module is not self.head and getattr(module, "groups", 1) == 1


def read_architecture(model: ModelFiles) -> Architecture:
    """Return the architecture of a model, without loading its weights."""
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

    def is_unchanged(self) -> bool:
        """Return whether both are equal, or one is the other rounded to its dtype."""
        old, new = to_torch(self.old.read()), to_torch(self.new.read())
        if old.is_floating_point() != new.is_floating_point():
            return False
        return torch.equal(_round_as(self.new, old, new.dtype), new) or torch.equal(
            old, _round_as(self.old, new, old.dtype)
        )


def _round_as(tensor: StoredTensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in the precision in which a file has a tensor, as a tensor of a dtype."""
    if isinstance(tensor, Float8Tensor):
        numbers = (weight.float() / tensor.scale).to(to_torch_dtype(tensor.float8))
        return numbers.float() * tensor.scale
    return weight.to(dtype)


class ModelDiff(NamedTuple):
    """The tensors that fine-tuning changed."""

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
) -> ModelDiff:
    """Return the tensors that fine-tuning changed. Two tensors are in memory at a time.

    Weights that are tied to saved ones are saved too: PEFT would untie them.
    """
    if not base.tensors.keys() & tuned.tensors.keys():
        raise MatryoshkaError(
            f"The models have no weight in common: their keys are, e.g., "
            f"{short(min(base.tensors, default=''))} and {short(min(tuned.tensors, default=''))}. "
            "Pass a model and its fine-tuned version, both saved by the same program."
        )
    suffixes = tuple(modules_to_save)
    layers: dict[str, WeightPair] = {}
    others: dict[str, StoredTensor] = {}
    keys = sorted({*base.tensors, *tuned.tensors})
    for key in tqdm(keys, "comparing", leave=False, disable=None, delay=1):
        old, new = base.tensors.get(key), tuned.tensors.get(key)
        if old is new:  # a weight that a DoRA does not change
            continue
        name = _module_of(key)
        pair: WeightPair | None = None
        if old and new and old.shape == new.shape and old.is_factor == new.is_factor:
            pair = WeightPair(old, new, architecture.is_conv1d(name))
            if pair.is_unchanged():
                continue
        # A quantized weight is not a factor; its other version shows whether it is a layer.
        factors = [weight for weight in (new, old) if weight and weight.is_factor]
        may_be_layer = key.endswith(".weight") and name.startswith(base.prefixes)
        may_be_layer = may_be_layer and not name.endswith(suffixes)
        if may_be_layer and factors and architecture.is_lora_layer(name, factors[0]):
            if pair is None:
                before, after = (
                    f"{weight.dtype} {list(weight.shape)}" if weight else "missing"
                    for weight in (old, new)
                )
                raise MatryoshkaError(
                    f"{key} is {before} before fine-tuning and {after} after it. Pass two versions "
                    "of one model, neither of them quantized."
                )
            layers[name] = pair
        elif new is not None:
            others[key] = new

    changed_modules = {_module_of(key) for key in others}
    if not layers:
        key = min(others, default="")
        reason = "No linear layer and no convolution changed"
        if not others:
            reason += ". Pass a model and its tuned version."
        elif architecture.modules and not changed_modules & architecture.modules.keys():
            reason = (
                f"The class of the model has no module of {short(key)}, which changed. Load both "
                "models with transformers and save them again."
            )
        else:
            reason += f", but others did, such as {short(key)} in {others[key].dtype}."
        raise MatryoshkaError(reason)

    saved_modules = {name for name in changed_modules if name.endswith(suffixes)}
    if architecture.modules:  # PEFT knows the modules by the names that they have in the class
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
                f"`modules_to_save`: {short(suffix)} does not match a module that changed."
            )
    return ModelDiff(layers, saved, {key: others[key] for key in others if key not in saved})


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]
