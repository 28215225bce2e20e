"""What an export does on its base model: compare logits, and merge a rank into the weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.adapter.gate import Gate
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.in_model import nested_layers
from matryoshka_lora.adapter.loading import load_opened
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.write import TOLERANCE, Ranks, check_layers, cut, write_adapter, wrong

Base = Callable[[torch.dtype | None], Any]
"""Loads the base model, a fresh one at each call, in a dtype; None is the one that it is stored in."""

_MOST_ROUNDING = 0.5
"""What the rounding of merged weights may take of what the adapter does."""


@dataclass(frozen=True)
class Verified:
    """How far the logits of an export are from those of the nested adapter.

    Attributes:
        difference: The largest absolute difference of a logit.
        share: The norm of the difference over the norm of what the adapter does to the logits.
        largest: The largest absolute logit.
    """

    difference: float
    share: float
    largest: float

    def __str__(self) -> str:
        return (
            f"the largest difference of a logit from the adapter at the same rank is {self.difference:.2g} (the "
            f"largest logit is {self.largest:.3g}; {100 * self.share:.2g} % of what the adapter changes)"
        )


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """The logits of 2 x 24 fixed random tokens, shape (2, 24, vocabulary), float32."""
    size = model.get_input_embeddings().weight.shape[0]  # PEFT's layer around an embedding has no num_embeddings
    ids = torch.randint(size, (2, 24), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits: Tensor = model.eval()(input_ids=ids).logits.float().cpu()
    return logits


def _nested_logits(adapter: NestedAdapter, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The logits with the adapter at a rank, or at ranks by layer, and without it."""
    use_ranks(adapter, ranks)
    wanted = probe_logits(adapter.model)
    with adapter.model.disable_adapter():
        return wanted, probe_logits(adapter.model)


def use_ranks(adapter: NestedAdapter, ranks: Ranks) -> None:
    """As `NestedAdapter.set_rank`, with 0 for layers that are left out; until the adapter is gone."""
    if isinstance(ranks, int):
        adapter.set_rank(ranks)
        return
    for name, _, variant in nested_layers(adapter.model, adapter.name):
        variant.stand_before(Gate.on(variant.device, adapter.state.diagonal(ranks[name])))


def compare_all(source: OpenedAdapter, ranks: Sequence[Ranks], folders: Sequence[Path], base: Base) -> list[Verified]:
    """Each folder as plain PEFT reads it, on one base model in float32, against the nested adapter at its rank.

    Raises:
        MatryoshkaError: One computes something else.
    """
    adapter = load_opened(base(torch.float32), source)
    wanted = [_nested_logits(adapter, each) for each in ranks]
    model, found = adapter.model.unload(), []
    for folder, logits in zip(folders, wanted, strict=True):
        plain = PeftModel.from_pretrained(model, str(folder))
        found.append(_check(probe_logits(plain), *logits, "the adapter"))
        model = plain.unload()
    return found


def _check(found: Tensor, wanted: Tensor, without: Tensor, what: str) -> Verified:
    """Compare logits.

    Args:
        found: Of the export.
        wanted: Of the nested adapter at its rank.
        without: Of the base model.
        what: Is compared, for the message.

    Raises:
        MatryoshkaError: The export computes something else.
    """
    result = _measure(found, wanted, without)
    if not result.share <= TOLERANCE:
        raise wrong(f"{result}. Check that the base model is the one that the adapter was trained on", what)
    return result


def _check_rounding(found: Tensor, wanted: Tensor, without: Tensor, dtype: torch.dtype) -> Verified:
    """As `_check`, for a model that is known to be what it should be, rounded to a dtype.

    Raises:
        MatryoshkaError: Too little is left of the adapter.
    """
    result = _measure(found, wanted, without)
    if not result.share <= _MOST_ROUNDING:
        raise MatryoshkaError(
            f"the merged model was made and then thrown away, because rounding its weights to {dtype} takes too much "
            f"of the adapter: {result}. Use a base model in a finer dtype"
        )
    return result


def _measure(found: Tensor, wanted: Tensor, without: Tensor) -> Verified:
    """How far logits are from those that are wanted; the arguments are those of `_check`."""
    effect = (wanted - without).norm()
    share = float((found - wanted).norm() / effect) if effect > 0 else float((found - wanted).norm() > 0)
    return Verified(float((found - wanted).abs().max()), share, float(wanted.abs().max()))


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
    wanted = _nested_logits(load_opened(base(wide), source), ranks) if verify else None
    merged = _merged(source, ranks, pad, base(wide))
    found = probe_logits(merged) if verify else None
    _round_as(stored, merged)
    if found is not None and wanted is not None:
        _check(found, *wanted, "the merged model")
    del stored
    merged.save_pretrained(folder)
    _name_rope(folder / "config.json")
    tokenizer.save_pretrained(folder)
    if wanted is None:
        return None
    written, kept = type(merged).from_pretrained(folder, dtype="auto").state_dict(), merged.state_dict()
    if written.keys() != kept.keys() or not all(_same(written[key], kept[key]) for key in kept):
        raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")
    del written
    dtype = merged.dtype
    return _check_rounding(probe_logits(merged.float()), *wanted, dtype)


def _name_rope(file: Path) -> None:
    """Write base and kind of the rotary embedding where programs of before transformers 5 look for them.

    transformers 5 has them in ``rope_parameters``, by kind of layer in some models. mlx-lm takes 10000 and no scaling
    where it finds none. Where kinds of layers differ, no single one is right, and none is written.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    if any(kind != kinds[0] for kind in kinds) or kinds[0].get("rope_theta") is None:
        return
    named = {"rope_theta": kinds[0]["rope_theta"]}
    if kinds[0].get("rope_type", "default") != "default":
        named["rope_scaling"] = kinds[0]
    file.write_text(json.dumps({**named, **config}, indent=2, sort_keys=True), encoding="utf-8")


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
