"""Export: an ordinary adapter first, and every other format from it; each is checked before it is put into place."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.adapter import load
from matryoshka_lora.formats.card import CARD_NAME, has_own_card
from matryoshka_lora.formats.directions import write_directions
from matryoshka_lora.adapter.reading import read_adapter
from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.adapter.slicing import Ranks
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.adapter.storage import check_apart, write_adapter, write_config, write_slice
from matryoshka_lora.serving.ladder import ladder_readme
from matryoshka_lora.formats.gguf import check_extension, read_gguf, write_gguf
from matryoshka_lora.serving.verify import Verified, check, check_layers, check_rounding, nested_logits, probe_logits
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import output_directory, replace_file, write_text

Base = Callable[[torch.dtype | None], Any]
"""Loads the base model, a fresh one at each call, in a dtype; None is the one that it is stored in."""


@dataclass(frozen=True)
class Cut:
    """What to export: an adapter that was read, and a rank or ranks of it.

    Attributes:
        source: Its directory.
        ranks: One, or one for each layer.
        pad: Give all layers the largest of the ranks.
    """

    source: Path
    state: NestedState
    config: LoraConfig
    tensors: dict[str, Tensor]
    ranks: Ranks
    pad: bool = False

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return self.ranks if isinstance(self.ranks, int) else max(self.ranks.values())

    def write(self, folder: Path, home: Path | None = None) -> None:
        """Write it as an ordinary adapter."""
        write_slice(folder, self.tensors, self.config, self.state, self.ranks, self.pad, home)


def cut(source: str | os.PathLike[str], ranks: Ranks, pad: bool = False) -> Cut:
    """Read a nested adapter to export a rank of it.

    Raises:
        MatryoshkaError: It is damaged or not nested, a rank was not trained, or ranks differ and it is not reordered.
    """
    state, config, tensors = read_adapter(source)
    if isinstance(ranks, int):
        state.check_rank(ranks)
    else:
        if state.form != "reordered":
            raise MatryoshkaError(
                f"{source} is not reordered, so its layers need one rank: use `matryoshka reorder` first"
            )
        if config.target_parameters and not pad:
            raise MatryoshkaError(
                f"{source} has target_parameters, for which PEFT knows no ranks by layer: use --pad, or one --rank"
            )
    return Cut(Path(source), state, config, tensors, ranks, pad)


def export_peft(
    what: Cut, path: str | os.PathLike[str], base: Base | None, *, overwrite: bool = False
) -> Verified | None:
    """Write an ordinary LoRA adapter. What it does in each layer is compared with the nested adapter.

    Args:
        what: To be exported.
        path: The directory to write.
        base: For one more check in float32, in which plain PEFT loads the new adapter; None leaves it out.
        overwrite: Whether the directory may hold an adapter, a model or an evaluation, of which nothing is left then.

    Raises:
        MatryoshkaError: The path cannot be written or holds something that may not be overwritten, or the adapter
            computes something else. Nothing has been written then.
    """
    check_apart(what.source, path)
    with output_directory(path, overwrite) as folder:
        what.write(folder, Path(path))
        return _compare([what], [folder], base)[0]


def export_merged(
    what: Cut,
    path: str | os.PathLike[str],
    base: Base,
    tokenizer: Any = None,
    verify: bool = True,
    *,
    overwrite: bool = False,
) -> Verified | None:
    """Write the base model with the adapter merged into its weights, in the base model's dtype, as safetensors.

    They are merged in float32 and then rounded. Before, the model computes what the nested adapter does; the file is
    then compared with the rounded weights, number by number: what is left is the error that their dtype must have.

    Args:
        what: To be exported.
        path: The directory to write.
        base: Loads the base model, not quantised.
        tokenizer: Is saved beside it.
        verify: Whether it is compared.
        overwrite: As for `export_peft`.

    Returns:
        What rounding has changed.

    Raises:
        MatryoshkaError: As `export_peft`; or the base is quantised, or merging changed none of its weights, or rounding
            them takes too much of the adapter.
    """
    check_apart(what.source, path)
    with output_directory(path, overwrite) as folder:
        stored = base(None)
        if getattr(stored, "is_quantized", False):
            raise MatryoshkaError("a quantised base model rounds what is merged into it: take one that is not")
        wide = torch.promote_types(stored.dtype, torch.float32)
        wanted = nested_logits(load(base(wide), what.source), what.ranks) if verify else None
        merged = _merged(what, base(wide), verify)
        found = probe_logits(merged) if verify else None
        _round_as(stored, merged)
        if found is not None and wanted is not None:
            check(found, *wanted, "the merged model")
        del stored
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if wanted is None:
            return None
        written, kept = type(merged).from_pretrained(folder, dtype="auto").state_dict(), merged.state_dict()
        if written.keys() != kept.keys() or not all(_same(written[key], kept[key]) for key in kept):
            raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")
        del written
        dtype = merged.dtype
        return check_rounding(probe_logits(merged.float()), *wanted, dtype)


def _merged(what: Cut, model: Any, verify: bool) -> Any:
    """The base model with the adapter in its weights."""
    with tempfile.TemporaryDirectory() as folder:
        what.write(Path(folder))
        if verify:
            _compare([what], [Path(folder)], None)
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


def export_directions(what: Cut, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a file of which a device reads only the ranks that it needs: `matryoshka_lora.formats.directions`.

    Its first rows are compared with the adapter, bit by bit, before it is put into place. The arguments are those of
    `export_peft`.
    """
    check_apart(what.source, path)
    state, config, tensors = read_adapter(what.source, max_rank=what.rank)
    with output_directory(path, overwrite) as folder:
        write_directions(folder, tensors, what.rank)
        write_config(folder, config)
        write_sidecar(folder, state)
        again = read_adapter(folder)[2]
        if tensors.keys() != again.keys() or not all(tensors[key].equal(again[key]) for key in tensors):
            raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")


def export_gguf(
    what: Cut, path: str | os.PathLike[str], base: Base | None, base_config: Any, *, overwrite: bool = False
) -> Verified | None:
    """Write a LoRA adapter for llama.cpp.

    Args:
        what: To be exported.
        path: The file to write, named ``*.gguf``.
        base: For the check: the file is read back, its rows are put into transformers' order again, and plain PEFT
            loads that. None compares the layers only, without a model.
        base_config: The transformers config of the base model.
        overwrite: Whether the file may exist.

    Raises:
        MatryoshkaError: As `export_peft`, or llama.cpp has no place for the architecture or a layer.
    """
    check_extension(Path(path))
    with (
        tempfile.TemporaryDirectory() as first,
        tempfile.TemporaryDirectory() as second,
        replace_file(path, overwrite) as file,
    ):
        plain, again = Path(first), Path(second)
        what.write(plain)
        write_gguf(plain, file, base_config)
        opened = open_adapter(plain)
        tensors, alpha = read_gguf(file, opened, base_config)
        config = copy.deepcopy(opened.config)
        config.lora_alpha, config.alpha_pattern = alpha, dict.fromkeys(config.rank_pattern, alpha)
        write_adapter(again, tensors, config)
        return _compare([what], [again], base)[0]


def export_ladder(
    what: Cut, ranks: Sequence[int], path: str | os.PathLike[str], base: Base | None, *, overwrite: bool = False
) -> dict[int, Verified | None]:
    """Write one ordinary adapter for each rank, and a README with the command that serves them all.

    Args:
        what: The adapter; its own rank is of no importance.
        ranks: To be written, as ``rank-1``, ``rank-2`` and so on.
        path: The directory to write.
        base: For the check of each, as for `export_peft`.
        overwrite: As for `export_peft`.

    Returns:
        The result of each check.

    Raises:
        MatryoshkaError: As `export_peft`; or somebody has written a README there, where that of the ladder would be.
    """
    check_apart(what.source, path)
    for rank in ranks:
        what.state.check_rank(rank)
    if has_own_card(Path(path)):
        raise MatryoshkaError(
            f"{path} holds a {CARD_NAME} that somebody has written, and a ladder needs one: choose another folder"
        )
    steps = [replace(what, ranks=rank) for rank in ranks]
    with output_directory(path, overwrite) as folder:
        folders = [folder / f"rank-{rank}" for rank in ranks]
        for step, own in zip(steps, folders, strict=True):
            own.mkdir()
            step.write(own)
        found = _compare(steps, folders, base)
        write_text(folder / CARD_NAME, ladder_readme(what.config, ranks))
    return dict(zip(ranks, found, strict=True))


def _compare(cuts: Sequence[Cut], folders: Sequence[Path], base: Base | None) -> Sequence[Verified | None]:
    """Each folder against the nested adapter: its layers, and on a base model the logits, as plain PEFT reads it."""
    source = cuts[0].source
    state, _, tensors = read_adapter(source)
    for what, folder in zip(cuts, folders, strict=True):
        check_layers(open_adapter(folder), state, tensors, what.ranks, what.pad)
    if base is None:
        return [None for _ in cuts]
    adapter = load(base(torch.float32), source)
    wanted = [nested_logits(adapter, what.ranks) for what in cuts]
    model, found = adapter.model.unload(), []
    for folder, logits in zip(folders, wanted, strict=True):
        plain = PeftModel.from_pretrained(model, str(folder))
        found.append(check(probe_logits(plain), *logits, "the adapter"))
        model = plain.unload()
    return found
