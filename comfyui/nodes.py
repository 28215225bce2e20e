"""The four nodes. They call `matryoshka_lora`, whose plain install needs NumPy and no torch."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Literal

import comfy.sd
import folder_paths
import safetensors.torch

import matryoshka_lora as ml
from matryoshka_lora.units import format_size

from .files import (
    format_ranks,
    lora_names,
    modification_times,
    open_as_loaded,
    output_path,
    report_saved,
)
from .patches import collect_loras

CATEGORY = "matryoshka-lora"
MAX_RANK = 4096
EXACT = 1 - 1e-15
"""The share of the squared singular values that float32 can represent."""


def rank_input(default: int, minimum: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    options = {"default": default, "min": minimum, "max": MAX_RANK, "tooltip": tooltip}
    return ("INT", options)


def strength_input(tooltip: str) -> tuple[str, dict[str, Any]]:
    options = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": tooltip}
    return ("FLOAT", options)


def lora_input(tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return (lora_names(), {"tooltip": tooltip})


def save_inputs(filename: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "filename": (
            "STRING",
            {
                "default": filename,
                "tooltip": "The name of the new file in the folder of LoRAs. It may contain "
                "folders. Press R to see the file in the loaders.",
            },
        ),
        "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
    }


def ui_text(lines: list[str]) -> dict[str, list[str]]:
    """Return the text that ComfyUI shows on the node."""
    return {"text": ["\n".join(lines)]}


class MatryoshkaShrinkLora:
    """Truncate a LoRA file."""

    DESCRIPTION = (
        "Saves a smaller copy of a LoRA file, without the model. Every layer gets the closest "
        "factors of its rank."
    )
    CATEGORY = CATEGORY
    FUNCTION = "shrink"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": lora_input("The LoRA to shrink."),
                "by": (
                    ["error", "rank", "megabytes"],
                    {
                        "tooltip": "What limits the file. By error (recommended) or megabytes, "
                        "each layer gets its own rank. The other two numbers are ignored."
                    },
                ),
                "error_percent": (
                    "FLOAT",
                    {
                        "default": 10.0,
                        "min": 0.01,
                        "max": 99.0,
                        "step": 0.5,
                        "tooltip": "By error: how much of the LoRA may be lost, as the norm of "
                        "what is missing over the norm of its update. 10 is a good start.",
                    },
                ),
                "rank": rank_input(16, 1, "By rank: the rank of every layer."),
                "megabytes": (
                    "FLOAT",
                    {
                        "default": 50.0,
                        "min": 0.01,
                        "max": 100000.0,
                        "step": 1.0,
                        "tooltip": "By megabytes: the largest size of the file.",
                    },
                ),
                **save_inputs("small"),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_inputs: Any) -> Any:
        return modification_times([lora_name])

    def shrink(
        self,
        lora_name: str,
        by: str,
        error_percent: float,
        rank: int,
        megabytes: float,
        filename: str,
        overwrite: bool,
    ) -> dict[str, Any]:
        path = output_path(filename, overwrite)
        lora = open_as_loaded(lora_name)
        result = ml.export(
            lora,
            path,
            rank=rank if by == "rank" else None,
            error=error_percent / 100 if by == "error" else None,
            max_bytes=round(megabytes * 1e6) if by == "megabytes" else None,
            force=overwrite,
        )
        before = f"before: {format_ranks(lora.ranks)}, {format_size(lora.size)}"
        lines = report_saved(path, result.ranks, result.errors)
        return {"ui": ui_text([*lines, before, *result.notes])}


class MatryoshkaCombineLoras:
    """Add two LoRA files."""

    DESCRIPTION = (
        "Saves the weighted sum of two LoRA files as one file. The sum is exact at rank 0; at a "
        "rank it is the closest one."
    )
    CATEGORY = CATEGORY
    FUNCTION = "combine"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name_1": lora_input("The first LoRA."),
                "weight_1": strength_input("The strength of the first LoRA."),
                "lora_name_2": lora_input("The second LoRA, for the same model."),
                "weight_2": strength_input("The strength of the second LoRA."),
                "rank": rank_input(0, 0, "The rank of the sum. 0 keeps all of it."),
                **save_inputs("combined"),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name_1: str, lora_name_2: str, **_inputs: Any) -> Any:
        return modification_times([lora_name_1, lora_name_2])

    def combine(
        self,
        lora_name_1: str,
        weight_1: float,
        lora_name_2: str,
        weight_2: float,
        rank: int,
        filename: str,
        overwrite: bool,
    ) -> dict[str, Any]:
        sources = [open_as_loaded(lora_name_1), open_as_loaded(lora_name_2)]
        path = output_path(filename, overwrite)
        weights = [weight_1, weight_2]
        result = ml.combine(sources, path, weights, rank or "sum", force=overwrite)
        lines = report_saved(path, ml.open(path).ranks, result.errors)
        return {"ui": ui_text([*lines, f"cosine of the two: {result.cosines[0, 1]:.2f}"])}


class MatryoshkaSaveLoraStack:
    """Save all LoRAs that are applied to a model as one file."""

    DESCRIPTION = (
        "Saves all LoRAs that are applied to a model and its text encoders as one LoRA file, with "
        "their strengths. They may have any key format."
    )
    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model after the last LoRA loader."}),
                "rank": rank_input(0, 0, "The rank of the file. 0 keeps all of the sum."),
                "dtype": (
                    ["auto", "fp32", "bf16", "fp16"],
                    {
                        "tooltip": "The dtype of the factors. auto: the one of the LoRAs, and fp32 "
                        "if they differ."
                    },
                ),
                **save_inputs("stack"),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoders after the last LoRA loader."})
            },
        }

    def save(
        self,
        model: Any,
        rank: int,
        dtype: Literal["auto", "fp32", "bf16", "fp16"],
        filename: str,
        overwrite: bool,
        clip: Any = None,
    ) -> dict[str, Any]:
        path = output_path(filename, overwrite)
        lora = collect_loras(model, clip)
        if dtype != "auto":
            lora = lora.cast(dtype)
        max_rank = min(rank or lora.max_rank, lora.max_rank)
        result = lora.truncate(max_rank, keep=EXACT).save(path, force=overwrite)
        lines = report_saved(path, result.ranks, result.errors)
        return {"ui": ui_text([*lines, f"{len(result.ranks)} layers"])}


class MatryoshkaLoadLoraAtRank:
    """Load a LoRA at a rank, to see what the rank does before a file is saved."""

    DESCRIPTION = (
        "Loads a LoRA as if its file had been shrunk to a rank. No file is saved. A rank above "
        "that of the file is the whole LoRA."
    )
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "The text encoders with the LoRA.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the LoRA is for."}),
                "lora_name": lora_input("The LoRA to load."),
                "rank": rank_input(8, 1, "The rank of every layer."),
                "strength_model": strength_input("The strength of the LoRA on the model."),
                "strength_clip": strength_input("The strength of the LoRA on the text encoders."),
            },
            "optional": {"clip": ("CLIP", {"tooltip": "The text encoders that the LoRA is for."})},
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_inputs: Any) -> Any:
        return modification_times([lora_name])

    def load(
        self,
        model: Any,
        lora_name: str,
        rank: int,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
    ) -> dict[str, Any]:
        lora = open_as_loaded(lora_name)
        small = lora.at_rank(min(rank, lora.max_rank))
        parent = folder_paths.get_temp_directory()
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            result = small.save(os.path.join(folder, "lora.safetensors"))
            # Not a memory map: the file is deleted.
            tensors = safetensors.torch.load(result.path.read_bytes())
        loaded = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
        size = f"{format_size(result.size)}, whole: {format_size(lora.size)}"
        error = result.errors[max(result.errors)]
        lines = [f"{format_ranks(result.ranks)}, {size}", f"error {error:.2%}"]
        return {"ui": ui_text(lines), "result": loaded}


NODE_CLASS_MAPPINGS = {
    "MatryoshkaShrinkLora": MatryoshkaShrinkLora,
    "MatryoshkaCombineLoras": MatryoshkaCombineLoras,
    "MatryoshkaSaveLoraStack": MatryoshkaSaveLoraStack,
    "MatryoshkaLoadLoraAtRank": MatryoshkaLoadLoraAtRank,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MatryoshkaShrinkLora": "Shrink LoRA (Matryoshka)",
    "MatryoshkaCombineLoras": "Combine LoRAs (Matryoshka)",
    "MatryoshkaSaveLoraStack": "Save LoRA stack (Matryoshka)",
    "MatryoshkaLoadLoraAtRank": "Load LoRA at rank (Matryoshka)",
}
