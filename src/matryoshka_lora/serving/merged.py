"""The base model with a rank of an adapter in its weights, as safetensors."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.adapter.loading import load_opened
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.write import Ranks, cut, write_adapter
from matryoshka_lora.serving.compare import check_layers
from matryoshka_lora.serving.verify import Base, Verified, check, check_rounding, nested_logits, probe_logits


def write_merged(
    folder: Path, source: OpenedAdapter, ranks: Ranks, pad: bool, base: Base, tokenizer: Any, verify: bool
) -> Verified | None:
    """Write the base model with the adapter merged into its weights, in the base model's dtype.

    The update of each layer is compared with the adapter's. It is merged in float32 and then rounded. Before, the model
    computes what the nested adapter does; the file is then compared with the rounded weights, number by number: what is
    left is the error that their dtype must have.

    Args:
        folder: Where to write.
        source: The nested adapter.
        ranks: One, or one for each layer.
        pad: See `matryoshka_lora.formats.write.cut`; the merged weights are the same.
        base: Loads the base model, not quantised.
        tokenizer: Is saved beside it.
        verify: Whether logits are compared too, and the file with the model that was written.

    Returns:
        What rounding has changed.

    Raises:
        MatryoshkaError: The base is quantised, merging changed none of its weights, or rounding them takes too much of
            the adapter; or the model computes something else.
    """
    stored = base(None)
    if getattr(stored, "is_quantized", False):
        raise MatryoshkaError("a quantised base model rounds what is merged into it: take one that is not")
    wide = torch.promote_types(stored.dtype, torch.float32)
    wanted = nested_logits(load_opened(base(wide), source), ranks) if verify else None
    merged = _merged(source, ranks, pad, base(wide))
    found = probe_logits(merged) if verify else None
    _round_as(stored, merged)
    if found is not None and wanted is not None:
        check(found, *wanted, "the merged model")
    del stored
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if wanted is None:
        return None
    written, kept = type(merged).from_pretrained(folder, dtype="auto").state_dict(), merged.state_dict()
    if written.keys() != kept.keys() or not all(_same(written[key], kept[key]) for key in kept):
        raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")
    del written
    dtype = merged.dtype
    return check_rounding(probe_logits(merged.float()), *wanted, dtype)


def _merged(source: OpenedAdapter, ranks: Ranks, pad: bool, model: Any) -> Any:
    """The base model with the adapter in its weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), cut(source, ranks, pad))
        check_layers(open_adapter(folder), source, ranks, pad)
        adapted = PeftModel.from_pretrained(model, folder)
    _untie(model)
    return adapted.merge_and_unload(safe_merge=True)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.equal(other)


def _round_as(stored: Any, merged: Any) -> None:
    """Give each weight of a merged model the dtype that it had in the base model as it is stored."""
    before, changed = stored.state_dict(), 0
    for name, tensor in merged.state_dict(keep_vars=True).items():
        old = before.get(name)
        rounded = tensor.data.to(stored.dtype if old is None else old.dtype)
        if tensor.isfinite().all() and not rounded.isfinite().all():
            raise MatryoshkaError(
                f"the merged {name} is too large for {rounded.dtype}: take a base model in bf16 or fp32"
            )
        tensor.data = rounded
        changed += int(old is None or not rounded.equal(old))
    if not changed:
        raise MatryoshkaError(
            f"merging changed none of the weights: the adapter is zero, or too small for {stored.dtype}. Merge "
            "into a base model in fp32"
        )


def _untie(model: Any) -> None:
    """Give the output layer a weight of its own if it shares the embedding's and LoRA is on either of them.

    Merged into the shared weight, the change of one would be in both. PEFT itself unties those of ``modules_to_save``.
    """
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = inside.weight is getattr(outside, "weight", None)
    if not is_tied or not any(isinstance(layer, LoraLayer) for layer in (inside, outside)):
        return
    outside = outside.get_base_layer() if isinstance(outside, LoraLayer) else outside
    outside.weight = nn.Parameter(outside.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
