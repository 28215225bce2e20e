"""Name the weights of an image model by the parts of its pipeline, as LoRA files do.

The makers of a model and diffusers name its modules differently, and checkpoints hold the text
encoders too. A model is recognised by its class in diffusers, or by the beginnings of its keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.extraction.model_diff import ModelFiles
from matryoshka_lora.lora.keys import ORIGINAL_PART, find_models
from matryoshka_lora.lora.layer import StoredTensor

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
_OPEN_CLIP_BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.")
_OPEN_CLIP_NAMES = {
    "attn.in_proj": "self_attn.in_proj",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
}


def rename_for_pipeline(base: ModelFiles, tuned: ModelFiles) -> tuple[ModelFiles, ModelFiles]:
    """Return both models with keys that begin with the part of the pipeline.

    OpenCLIP's fused projections become those of transformers, which are slices of their rows.

    Args:
        base: The model before fine-tuning.
        tuned: The model after. Its names may be those of another program.

    Raises:
        MatryoshkaError: The model is not recognised.
    """
    part = _find_part(base)
    if part is None:
        raise MatryoshkaError(
            f"{base.path} cannot be identified as a part of a pipeline. Pass a checkpoint, or the "
            "folder of a UNet or a transformer that diffusers has saved, or omit `key_format`."
        )
    models: list[ModelFiles] = []
    for model in (base, tuned):
        model_part = _find_part(model)
        if model_part is None:
            model_part = part
        models.append(replace(model, tensors=_rename_tensors(model.tensors, model_part)))
    return models[0], models[1]


def pipeline_prefixes() -> tuple[str, ...]:
    """Return the beginnings of the names of modules that a LoRA file can name."""
    parts = {*_CHECKPOINT_PARTS.values(), *_PARTS_BY_KEY.values()}
    return tuple(f"{part}." for part in sorted(parts))


def check_kohya_names(layer_names: Iterable[str], base: ModelFiles) -> None:
    """Raise MatryoshkaError unless kohya's format has names for the layers of a transformer.

    Args:
        layer_names: The names of all layers, which begin with the part of the pipeline.
        base: The model before fine-tuning.
    """
    names = [name for name in layer_names if name.startswith("transformer.")]
    if names and not find_models(names):
        raise MatryoshkaError(
            f"The kohya format has no names for the layers of {base.path}. Pass "
            "`key_format='diffusers'`."
        )


def _find_part(model: ModelFiles) -> str | None:
    """Return the part that a model is; "" if its keys name the parts; None if it is unknown."""
    if _begins(model.tensors, _CHECKPOINT_PARTS):
        return ""
    class_name = str(model.config.get("_class_name"))
    for word, part in _PARTS_BY_CLASS.items():
        if word in class_name:
            return part
    for beginning, part in _PARTS_BY_KEY.items():
        if _begins(model.tensors, [beginning]):
            return part
    return None


def _begins(keys: Iterable[str], beginnings: Iterable[str]) -> bool:
    return any(key.startswith(tuple(beginnings)) for key in keys)


def _rename_tensors(tensors: Mapping[str, StoredTensor], part: str) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        new_key = f"{part}.{key}" if part else _rename_checkpoint_key(key)
        if new_key.endswith(".self_attn.in_proj_weight"):
            renamed.update(_split_projection(new_key, tensor))
        else:
            renamed[new_key] = tensor
    return renamed


def _rename_checkpoint_key(key: str) -> str:
    for prefix, part in _CHECKPOINT_PARTS.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if part.startswith("text_encoder"):
                name = _rename_open_clip(name)
            return f"{part}.{name}"
    return key


def _rename_open_clip(name: str) -> str:
    """Return the name that a tensor of OpenCLIP has in transformers; other names stay."""
    block = _OPEN_CLIP_BLOCK.match(name)
    if not block:
        return name
    name = name.removeprefix(block[0])
    for open_clip_name, new_name in _OPEN_CLIP_NAMES.items():
        if name.startswith(open_clip_name):
            name = name.replace(open_clip_name, new_name, 1)
            break
    return f"text_model.encoder.layers.{block[1]}.{name}"


def _split_projection(key: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """Return the weights of q, k and v, which are the thirds of the rows of one weight."""
    module = key.removesuffix("in_proj_weight")
    num_rows = tensor.shape[0] // 3
    tensors: dict[str, StoredTensor] = {}
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(index * num_rows, (index + 1) * num_rows)
        tensors[f"{module}{name}.weight"] = _take_rows(tensor, rows)
    return tensors


def _take_rows(tensor: StoredTensor, rows: slice) -> StoredTensor:
    num_rows = rows.stop - rows.start
    return replace(tensor, shape=(num_rows, *tensor.shape[1:]), read=lambda: tensor.read()[rows])
