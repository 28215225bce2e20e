"""The five nodes. They call `matryoshka_lora`, whose plain install needs NumPy and no torch."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import comfy.sd
import folder_paths
import numpy as np
import safetensors.torch

import matryoshka_lora as ml
from matryoshka_lora.units import format_size

from .files import (
    format_ranks,
    lora_names,
    messages_in_page,
    modification_times,
    open_as_loaded,
    output_path,
    report_saved,
    source_path,
)
from .patches import collect_loras
from .progress import with_progress

Dtype = Literal["auto", "fp32", "bf16", "fp16"]

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


def dtype_input(tooltip: str) -> tuple[list[str], dict[str, Any]]:
    return (list(get_args(Dtype)), {"tooltip": f"The dtype of the factors. auto: {tooltip}"})


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
            },
            "optional": {"dtype": dtype_input("the one of the file.")},
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
        dtype: Dtype = "auto",
    ) -> dict[str, Any]:
        path = output_path(filename, overwrite)
        with messages_in_page() as notes:
            # Error and size need the singular values of all layers first.
            [lora] = with_progress([open_as_loaded(lora_name)], passes=1 if by == "rank" else 2)
            if by == "rank" and rank > lora.max_rank:
                raise ml.MatryoshkaError(
                    f"{lora_name} has rank {lora.max_rank}. Enter a rank from 1 to {lora.max_rank}."
                )
            result = ml.export(
                lora,
                path,
                rank=rank if by == "rank" else None,
                error=error_percent / 100 if by == "error" else None,
                max_bytes=round(megabytes * 1e6) if by == "megabytes" else None,
                dtype=None if dtype == "auto" else dtype,
                force=overwrite,
            )
        before = f"before: {format_ranks(lora.ranks)}, {format_size(lora.size)}"
        lines = report_saved(path, result.ranks, result.errors)
        return {"ui": ui_text([*lines, before, *result.notes, *notes])}


class MatryoshkaCombineLoras:
    """Add two LoRA files."""

    DESCRIPTION = (
        "Saves the weighted sum of two LoRA files as one file. The sum is exact at rank 0; at a "
        "rank it is the closest one. For more files, combine the saved sum with the next one, "
        "which stays exact at rank 0 and dtype fp32; or use Save LoRA stack."
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
            },
            "optional": {"dtype": dtype_input("the one of the files, and fp32 if they differ.")},
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
        dtype: Dtype = "auto",
    ) -> dict[str, Any]:
        path = output_path(filename, overwrite)
        with messages_in_page() as notes:
            # The second pass computes the cosine.
            sources = with_progress([open_as_loaded(lora_name_1), open_as_loaded(lora_name_2)], 2)
            if dtype != "auto":
                sources = [source.cast(dtype) for source in sources]
            weights = [weight_1, weight_2]
            result = ml.combine(sources, path, weights, rank or "sum", force=overwrite)
        lines = report_saved(path, ml.open(path).ranks, result.errors)
        cosine = f"cosine of the two: {result.cosines[0, 1]:.2f}"
        return {"ui": ui_text([*lines, cosine, *notes])}


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
                "dtype": dtype_input("the one of the LoRAs, and fp32 if they differ."),
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
        dtype: Dtype,
        filename: str,
        overwrite: bool,
        clip: Any = None,
    ) -> dict[str, Any]:
        path = output_path(filename, overwrite)
        # The first pass finds the ranks.
        [lora] = with_progress([collect_loras(model, clip)], passes=2)
        if dtype != "auto":
            lora = lora.cast(dtype)
        max_rank = min(rank or lora.max_rank, lora.max_rank)
        result = lora.truncate(max_rank, keep=EXACT).save(path, force=overwrite)
        lines = report_saved(path, result.ranks, result.errors)
        return {"ui": ui_text([*lines, f"{len(result.ranks)} layers"])}


def keep_factors(lora: ml.Lora) -> ml.Lora:
    """Return a LoRA that keeps the factors of each layer in memory, in float32, once read."""

    def to_float32(factors: ml.Factors) -> ml.Factors:
        return factors._replace(A=factors.A.astype(np.float32), B=factors.B.astype(np.float32))

    layers = [layer.map(to_float32) for layer in lora.layers]
    return replace(lora, layers=tuple(replace(layer, read=cache(layer.read)) for layer in layers))


def num_patches(model: Any, clip: Any) -> int:
    """Return the number of changes that LoRAs make to weights."""
    patchers = [model, *([] if clip is None else [clip.patcher])]
    return sum(len(changes) for patcher in patchers for changes in patcher.patches.values())


class MatryoshkaLoadLoraAtRank:
    """Load a LoRA at a rank, to see what the rank does before a file is saved."""

    DESCRIPTION = (
        "Loads a LoRA as if its file had been shrunk to a rank. No file is saved. A rank above "
        "that of the file is the whole LoRA. Another rank of the same file needs no new "
        "decomposition."
    )
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "The text encoders with the LoRA.")

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], ml.Lora] | None = None

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

    def _open(self, lora_name: str) -> ml.Lora:
        """Return a LoRA, whose decomposition is kept until another file is chosen."""
        path = source_path(lora_name)
        stat = path.stat()
        version = (path, stat.st_mtime_ns, stat.st_size)
        if self._kept is None or self._kept[0] != version:
            self._kept = None  # its memory is free before the next one is read
            lora = open_as_loaded(lora_name)
            # The factors of LoHa and LoKr may be as large as the model.
            if all(layer.kind == "LoRA" for layer in lora.layers):
                lora = keep_factors(lora.nested())
            self._kept = (version, lora)
        return self._kept[1]

    def load(
        self,
        model: Any,
        lora_name: str,
        rank: int,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
    ) -> dict[str, Any]:
        with messages_in_page() as notes:
            [lora] = with_progress([self._open(lora_name)], passes=1)
            small = lora.at_rank(min(rank, lora.max_rank))
        parent = folder_paths.get_temp_directory()
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            result = small.save(os.path.join(folder, "lora.safetensors"))
            # Not a memory map: the file is deleted.
            tensors = safetensors.torch.load(result.path.read_bytes())
        loaded = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
        if num_patches(*loaded) == num_patches(model, clip):  # ComfyUI only logs it
            raise ml.MatryoshkaError(
                f"No layer of {lora_name} fits the model. Choose a LoRA that is for this model."
            )
        size = f"{format_size(result.size)} of {format_size(lora.size)}"
        error = result.errors[max(result.errors)]
        line = f"{format_ranks(result.ranks)}: {size}, error {error:.2%}"
        return {"ui": ui_text([line, *notes]), "result": loaded}


class MatryoshkaLoraRanks:
    """List ranks, so that one run of the graph makes a picture at each."""

    DESCRIPTION = (
        "Lists ranks of a LoRA. Connect it to the rank of Load LoRA at rank: one run then makes a "
        "picture at each rank, in this order. Image Grid puts them on one sheet."
    )
    CATEGORY = CATEGORY
    FUNCTION = "list_ranks"
    RETURN_TYPES = ("INT",)
    RETURN_NAMES = ("ranks",)
    OUTPUT_IS_LIST = (True,)
    OUTPUT_TOOLTIPS = ("The ranks, one after the other.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": lora_input("The same LoRA as in Load LoRA at rank."),
                "ranks": (
                    "STRING",
                    {
                        "default": "1, 2, 4, 8, 16, 32, 64, 128, 256",
                        "tooltip": "The ranks. Those above the rank of the file are listed once, "
                        "as its rank: the whole LoRA.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora_name: str, **_inputs: Any) -> Any:
        return modification_times([lora_name])

    def list_ranks(self, lora_name: str, ranks: str) -> dict[str, Any]:
        with messages_in_page():
            max_rank = ml.open(source_path(lora_name)).max_rank
        try:
            values = [int(rank) for rank in ranks.split(",")]
        except ValueError:
            values = []
        if not values or min(values) < 1:
            raise ml.MatryoshkaError(f"{ranks!r:.80} is not a list of ranks, such as 1, 4, 16.")
        values = list(dict.fromkeys(min(value, max_rank) for value in values))
        text = f"{', '.join(map(str, values))} of {max_rank}"
        return {"ui": ui_text([text]), "result": (values,)}


NODE_CLASS_MAPPINGS = {
    "MatryoshkaShrinkLora": MatryoshkaShrinkLora,
    "MatryoshkaCombineLoras": MatryoshkaCombineLoras,
    "MatryoshkaSaveLoraStack": MatryoshkaSaveLoraStack,
    "MatryoshkaLoadLoraAtRank": MatryoshkaLoadLoraAtRank,
    "MatryoshkaLoraRanks": MatryoshkaLoraRanks,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MatryoshkaShrinkLora": "Shrink LoRA (Matryoshka)",
    "MatryoshkaCombineLoras": "Combine LoRAs (Matryoshka)",
    "MatryoshkaSaveLoraStack": "Save LoRA stack (Matryoshka)",
    "MatryoshkaLoadLoraAtRank": "Load LoRA at rank (Matryoshka)",
    "MatryoshkaLoraRanks": "LoRA ranks (Matryoshka)",
}
