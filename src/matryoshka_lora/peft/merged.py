"""Write a base model with an adapter merged into its weights."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from matryoshka_lora.errors import MatryoshkaError, wrap_errors
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.formats.hub import TOKENIZER_FILES, copy_companion_files
from matryoshka_lora.formats.mlx import missing_rope_fields
from matryoshka_lora.formats.safetensors_io import read_json
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import Written
from matryoshka_lora.peft.base_model import (
    adapter_tokenizer_folder,
    load_model,
    load_tokenizer,
)
from matryoshka_lora.peft.load import check_base_model, enlarge_vocabulary, load_with_peft
from matryoshka_lora.registry import Target


def write(lora: Lora, output_folder: Path, target: Target) -> Written:
    """Write a base model with an adapter in its weights, and the tokenizer if there is one.

    The weights keep the dtype of the base model. A model that bitsandbytes has quantized is
    dequantized.

    Raises:
        MatryoshkaError: The base model cannot be loaded, or the adapter does not fit it.
    """
    base_model, base_revision = peft_folder.base_model_of(
        lora, target.base_model, target.base_revision
    )
    _write_tokenizer(lora, output_folder, base_model, base_revision)
    model: Any = load_model(base_model, "auto", base_revision, "cpu")
    if getattr(model, "quantization_method", "") == "bitsandbytes":
        model = model.dequantize()  # bitsandbytes cannot save merged weights
    check_base_model(model, lora)
    enlarge_vocabulary(model, lora)
    with tempfile.TemporaryDirectory(dir=output_folder) as folder:
        written = peft_folder.write(replace(lora, nesting=None), Path(folder), target)
        peft_model = load_with_peft(model, replace(peft_folder.read(folder), name=lora.name))
    _untie_adapted_embeddings(model)
    if lora.config.get("layer_replication"):
        _copy_shared_weights(peft_model.get_base_model())
    merged = peft_model.merge_and_unload(safe_merge=True)
    head = merged.get_output_embeddings()
    if head.weight is not merged.get_input_embeddings().weight:
        # PEFT 0.18 does not set this for a head in `modules_to_save`.
        merged.config.tie_word_embeddings = False
    # transformers 5.0 cannot save a model that it has dequantized.
    with wrap_errors(
        f"Cannot save {base_model} after dequantizing it",
        "Upgrade transformers, or pass an unquantized model as `base_model`.",
        NotImplementedError,
    ):
        merged.save_pretrained(output_folder)
    # Older runtimes read fields that a config of transformers 5 lacks.
    config_file = output_folder / "config.json"
    config = read_json(config_file)
    config.update(missing_rope_fields(config))
    config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return written


def _write_tokenizer(
    lora: Lora, output_folder: Path, base_model: str, base_revision: str | None
) -> None:
    """Copy the tokenizer that a Trainer has saved with an adapter, or else save the base model's.

    The adapter's is not loaded and saved: its files may name any file of this machine, and
    transformers would read that file and write its lines to the output.
    """
    folder = adapter_tokenizer_folder(lora)
    if folder is not None:
        copy_companion_files(folder, output_folder, TOKENIZER_FILES)
        return
    try:
        tokenizer = load_tokenizer(base_model, base_revision)
    except MatryoshkaError as error:
        warnings.warn(f"The merged model will have no tokenizer. {error}", stacklevel=2)
        return
    tokenizer.save_pretrained(output_folder)


def _untie_adapted_embeddings(model: Any) -> None:
    """Untie the head from the embeddings if one of them is adapted.

    A shared weight would get the updates of both.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer) or isinstance(model.get_input_embeddings(), LoraLayer):
        layer = head.get_base_layer() if isinstance(head, LoraLayer) else head
        layer.weight = nn.Parameter(layer.weight.detach().clone())


def _copy_shared_weights(model: Any) -> None:
    """Copy the weights that replicated layers share, but leave a tied head tied.

    A shared weight would get the updates of all replicas, and could not be saved.
    """
    head = model.get_output_embeddings()
    parameters: set[nn.Parameter] = set()
    for module in model.modules():
        if module is head:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in parameters:
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, copy)
            parameters.add(parameter)
