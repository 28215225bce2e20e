"""Load a base model and its tokenizer: the bundled one or any other."""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError

from matryoshka_lora.bundled_model import BUNDLED_MODEL, BUNDLED_MODEL_ID, resolve_model_path
from matryoshka_lora.errors import MatryoshkaError, optional_imports, wrap_errors
from matryoshka_lora.formats.hub import TOKENIZER_FILES, leads_out_of_folder
from matryoshka_lora.tensors import cpu_has_bf16
from matryoshka_lora.units import format_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from matryoshka_lora.lora.lora import Lora

logger = logging.getLogger(__name__)

_BITS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type")
"""Arguments of bitsandbytes' config."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def default_dtype() -> torch.dtype:
    """Return bfloat16 if the GPU or the CPU has instructions for it, else float32."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.accelerator.is_available():
        has_bf16 = True
    else:
        has_bf16 = cpu_has_bf16()
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
        name: A folder or a Hub id. Defaults to ``"smollm2-135m"``, the bundled model.
        dtype: The weights' dtype, or ``"bf16"``, ``"fp32"``, ``"fp16"``, ``"auto"``. Defaults to
            `default_dtype` (logged).
        revision: Branch, tag or commit of a model on the Hugging Face Hub.
        device: Defaults to this machine's accelerator, or else the CPU. A quantized model, or one
            with a ``device_map``, stays on the device that transformers chooses.
        options: Passed on to ``AutoModelForCausalLM.from_pretrained``, such as
            ``device_map="auto"``. ``load_in_4bit=True`` and ``load_in_8bit=True`` quantize the
            model with bitsandbytes.

    Raises:
        MatryoshkaError: The model cannot be found, downloaded or read, or it does not fit into the
            memory of the device.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    name = name or BUNDLED_MODEL
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if dtype is None:
        dtype = default_dtype()
        logger.info("Loading the model in %s on %s.", str(dtype).removeprefix("torch."), device)
    with _wrap_loading_errors("model", name):
        path = resolve_model_path(name, revision)
    bits = {key: value for key, value in options.items() if key in _BITS}
    if bits:
        options = {key: value for key, value in options.items() if key not in _BITS}
        with optional_imports(), _wrap_loading_errors("model", name):
            options["quantization_config"] = BitsAndBytesConfig(**bits)
    elif "device_map" not in options and "quantization_config" not in options:
        _check_memory(Path(path), dtype, torch.device(device))
    with _wrap_loading_errors("model", name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(str(dtype), dtype),
            revision=revision or "main",
            **{"trust_remote_code": False, **options},  # its default is to ask
        )
    # PEFT writes this name into an adapter's config, where other programs look for the model.
    hub_name = BUNDLED_MODEL_ID if name == BUNDLED_MODEL else name
    model.name_or_path = model.config.name_or_path = hub_name
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    if is_quantized or "device_map" in options:
        return model
    return model.to(device)


def check_model(name: str, revision: str | None = None) -> None:
    """Raise MatryoshkaError if the config of a model cannot be loaded. See `load_model`."""
    from transformers import AutoConfig

    with _wrap_loading_errors("config", name):
        AutoConfig.from_pretrained(
            resolve_model_path(name, revision), revision=revision or "main", trust_remote_code=False
        )


def _check_memory(folder: Path, dtype: torch.dtype | str, device: torch.device) -> None:
    """Raise MatryoshkaError if the weights of a model do not fit into the memory of a device.

    A model that is not in a folder of this machine is not checked.
    """
    files = [folder / "model.safetensors"]
    with suppress(OSError, ValueError, KeyError):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = [folder / name for name in {*index["weight_map"].values()}]
    size = sum(file.stat().st_size for file in files if file.is_file())
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            return
        stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        wanted = DTYPES.get(str(dtype), dtype)
        if isinstance(stored, torch.dtype) and isinstance(wanted, torch.dtype):
            size = size * wanted.itemsize // stored.itemsize
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if size > free:
        raise MatryoshkaError(
            f"The weights in {folder} take {format_size(size)}, and {device} has "
            f"{format_size(free)} of free memory. Load the model with device_map=auto, with "
            "load_in_4bit=True, or in another dtype."
        )


def load_tokenizer(name: str | None = None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a pad token.

    See `load_model` for arguments and errors.
    """
    from transformers import AutoTokenizer

    name = name or BUNDLED_MODEL
    path = resolve_model_path(name, revision)
    with _wrap_loading_errors("tokenizer", name):
        if Path(path).is_dir() and not any(
            file for pattern in TOKENIZER_FILES for file in Path(path).glob(pattern)
        ):
            # transformers 5.0 returns a tokenizer without a vocabulary.
            raise OSError("the folder has no tokenizer")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    tokenizer.name_or_path = BUNDLED_MODEL_ID if name == BUNDLED_MODEL else name
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_adapter_tokenizer(
    lora: Lora, base_model: str | None, base_revision: str | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a Trainer has saved with an adapter, or else the base model's.

    Do not save the adapter's: transformers may have read any file of this machine into it.
    """
    folder = adapter_tokenizer_folder(lora)
    if folder is not None:
        return load_tokenizer(str(folder))
    return load_tokenizer(base_model, base_revision)


def adapter_tokenizer_folder(lora: Lora) -> Path | None:
    """Return an adapter's folder if a Trainer has saved a tokenizer in it, or else None.

    A folder with a symbolic link to another folder is not used, with a warning.
    """
    if not lora.files:
        return None
    folder = lora.files[0].parent
    if not (folder / "tokenizer_config.json").is_file():
        return None
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if leads_out_of_folder(file, folder):
            warnings.warn(
                f"{file} is a symbolic link to another folder, so the base model's tokenizer is "
                "used instead of the adapter's. Replace the link by a copy, if you trust it.",
                stacklevel=2,
            )
            return None
    return folder


def _wrap_loading_errors(kind: str, name: str) -> AbstractContextManager[None]:
    return wrap_errors(
        f"Cannot load the {kind} of {name!r}",
        f"Pass a transformers folder, a Hub id, or {BUNDLED_MODEL!r}, which needs no network.",
        # transformers has no common error type
        (OSError, ValueError, TypeError, ImportError, KeyError, SafetensorError),
    )
