"""Nodes for ComfyUI: shrink and combine LoRA files, and save the LoRAs on a model as one file."""

import sys
from importlib.util import find_spec

if find_spec("matryoshka_lora") is None:
    raise ImportError(
        "The nodes need the package matryoshka-lora, which is not on PyPI: do not install a "
        "package of that name from there. Install it from a clone of its repository: "
        f"{sys.executable} -m pip install PATH_OF_THE_CLONE"
    )

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
