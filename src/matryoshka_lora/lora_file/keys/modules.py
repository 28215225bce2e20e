"""The names of a module of an image or video model: those of its authors and of diffusers.

The names of the authors are those of the original checkpoints, which kohya's scripts and ComfyUI
use too. ``{}`` stands for the index of a block. A module of the authors may be several modules in
diffusers: the rows of its weight are then the rows of theirs, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Names = Literal["authors", "diffusers"]
"""Whose names of the modules."""


class Module(NamedTuple):
    """A module that a LoRA can target.

    Attributes:
        authors: Its name in the original checkpoint.
        diffusers: Its names in diffusers, in the order of the rows.
        sizes: The number of rows of each of several names, in multiples of the input width.
        swaps_halves: Whether the halves of a weight with 2 x input width rows, shift and scale, are
            in the other order in diffusers.
        num_blocks: The number of blocks in the largest version of the model.
    """

    authors: str
    diffusers: tuple[str, ...]
    sizes: tuple[int, ...] = (1,)
    swaps_halves: bool = False
    num_blocks: int = 1


@dataclass(frozen=True, eq=False)
class Model:
    """The names of one model.

    Attributes:
        name: Its name, for messages.
        part: What diffusers calls the denoiser, ``"unet"`` or ``"transformer"``.
        modules: The modules of the denoiser.
        text_encoders: The part of a diffusers pipeline by kohya's and ComfyUI's prefix.
        widths: Widths of inputs that only this model has, to distinguish models with common names.
        kohya_names: Whose names kohya's scripts use.
    """

    name: str
    part: str
    modules: tuple[Module, ...]
    text_encoders: Mapping[str, str]
    widths: frozenset[int]
    kohya_names: Names = "authors"


# What follows the name of an attention in the UNets and in Wan.
ATTENTION_PARTS = ("to_q", "to_k", "to_v", "to_out.0")


def rename(
    names: Mapping[str, str], authors: str = "", diffusers: str = "", num_blocks: int = 1
) -> tuple[Module, ...]:
    """Return modules from the names of the authors and of diffusers inside a block.

    Args:
        names: The name in diffusers by that of the authors.
        authors: The block's name for the authors.
        diffusers: The block's name in diffusers.
        num_blocks: The number of blocks.
    """
    return tuple(
        Module(f"{authors}{authors_name}", (f"{diffusers}{diffusers_name}",), num_blocks=num_blocks)
        for authors_name, diffusers_name in names.items()
    )


def same(*names: str, num_blocks: int = 1) -> tuple[Module, ...]:
    """Return modules that have one name everywhere."""
    return rename({name: name for name in names}, num_blocks=num_blocks)


def fused_qkv(authors: str, diffusers: str, parts: tuple[str, ...], num_blocks: int) -> Module:
    """Return a fused projection to queries, keys and values."""
    names = tuple(f"{diffusers}.{part}" for part in parts)
    return Module(authors, names, (1,) * len(parts), num_blocks=num_blocks)


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
