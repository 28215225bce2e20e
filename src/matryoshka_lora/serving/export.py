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
from matryoshka_lora.formats.directions import write_directions
from matryoshka_lora.adapter.reading import read_adapter
from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.adapter.slicing import Ranks
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.adapter.storage import check_apart, write_adapter, write_slice
from matryoshka_lora.serving.ladder import ladder_readme
from matryoshka_lora.formats.gguf import check_extension, read_gguf, write_gguf
from matryoshka_lora.serving.verify import Verified, check, nested_logits, probe_logits
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_directory, replace_file, write_text

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


def export_peft(what: Cut, path: str | os.PathLike[str], base: Base | None) -> Verified | None:
    """Write an ordinary LoRA adapter.

    Args:
        what: To be exported.
        path: The directory to write.
        base: For the check in float32, in which plain PEFT loads the new adapter; None leaves it out.

    Raises:
        MatryoshkaError: The path cannot be written, or the adapter computes something else. Nothing has been written
            then.
    """
    check_apart(what.source, path)
    with replace_directory(path) as folder:
        what.write(folder, Path(path))
        return None if base is None else _compare(what, folder, base)


def export_merged(
    what: Cut, path: str | os.PathLike[str], base: Base, tokenizer: Any = None, verify: bool = True
) -> Verified | None:
    """Write the base model with the adapter merged into its weights, in the base model's dtype, as safetensors.

    Args:
        what: To be exported.
        path: The directory to write.
        base: Loads the base model, not quantised.
        tokenizer: Is saved beside it.
        verify: Whether what was written is loaded again and compared.

    Raises:
        MatryoshkaError: As `export_peft`; or the base is quantised, or merging changed none of its weights.
    """
    check_apart(what.source, path)
    with replace_directory(path) as folder:
        with tempfile.TemporaryDirectory() as slice_folder:
            what.write(Path(slice_folder))
            model = base(None)
            if getattr(model, "is_quantized", False):
                raise MatryoshkaError("a quantised base model rounds what is merged into it: take one that is not")
            # With tied weights under all of their names: the adapter may leave them untied.
            named = model.named_parameters(remove_duplicate=False)
            before = {name: parameter.detach().clone() for name, parameter in named}
            adapted = PeftModel.from_pretrained(model, slice_folder)
            _untie(model)
            merged = adapted.merge_and_unload(safe_merge=True)
        changed = sum(not parameter.equal(before[name]) for name, parameter in merged.named_parameters())
        del before
        if not changed:
            raise MatryoshkaError(
                f"merging changed none of the weights: the adapter is zero, or too small for {merged.dtype}. Merge "
                "into a base model in fp32"
            )
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        kind, dtype = type(merged), merged.dtype
        del merged, model
        if not verify:
            return None
        # Computed in float32, so that what is left is the rounding of the merged weights alone.
        wanted, without = nested_logits(load(base(torch.float32), what.source), what.ranks)
        found = probe_logits(kind.from_pretrained(folder, dtype=torch.float32))
        return check(found, wanted, without, dtype, "the merged model")


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


def export_directions(what: Cut, path: str | os.PathLike[str]) -> None:
    """Write a file of which a device reads only the ranks that it needs: `matryoshka_lora.formats.directions`.

    Its first rows are compared with the adapter, bit by bit, before it is put into place.
    """
    check_apart(what.source, path)
    state, config, tensors = read_adapter(what.source, max_rank=what.rank)
    with replace_directory(path) as folder:
        write_directions(folder, tensors, what.rank)
        config.save_pretrained(folder)
        write_sidecar(folder, state)
        again = read_adapter(folder)[2]
        if tensors.keys() != again.keys() or not all(tensors[key].equal(again[key]) for key in tensors):
            raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")


def export_gguf(what: Cut, path: str | os.PathLike[str], base: Base | None, base_config: Any) -> Verified | None:
    """Write a LoRA adapter for llama.cpp.

    Args:
        what: To be exported.
        path: The file to write, named ``*.gguf``.
        base: For the check: the file is read back, its rows are put into transformers' order again, and plain PEFT
            loads that. None leaves it out.
        base_config: The transformers config of the base model.

    Raises:
        MatryoshkaError: As `export_peft`, or llama.cpp has no place for the architecture or a layer.
    """
    check_extension(Path(path))
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second, replace_file(path) as file:
        plain, again = Path(first), Path(second)
        what.write(plain)
        write_gguf(plain, file, base_config)
        if base is None:
            return None
        opened = open_adapter(plain)
        tensors, alpha = read_gguf(file, opened, base_config)
        config = copy.deepcopy(opened.config)
        config.lora_alpha, config.alpha_pattern = alpha, dict.fromkeys(config.rank_pattern, alpha)
        write_adapter(again, tensors, config)
        return _compare(what, again, base)


def export_ladder(
    what: Cut, ranks: Sequence[int], path: str | os.PathLike[str], base: Base | None
) -> dict[int, Verified | None]:
    """Write one ordinary adapter for each rank, and a README with the command that serves them all.

    Args:
        what: The adapter; its own rank is of no importance.
        ranks: To be written, as ``rank-1``, ``rank-2`` and so on.
        path: The directory to write.
        base: For the check of each; None leaves it out.

    Returns:
        The result of each check.

    Raises:
        MatryoshkaError: As `export_peft`.
    """
    check_apart(what.source, path)
    for rank in ranks:
        what.state.check_rank(rank)
    steps = [replace(what, ranks=rank) for rank in ranks]
    with replace_directory(path) as folder:
        folders = [folder / f"rank-{rank}" for rank in ranks]
        for step, own in zip(steps, folders, strict=True):
            own.mkdir()
            step.write(own)
        found = [None for _ in ranks] if base is None else _compare_all(steps, folders, base)
        write_text(folder / "README.md", ladder_readme(what.config, ranks))
    return dict(zip(ranks, found, strict=True))


def _compare(what: Cut, folder: Path, base: Base) -> Verified:
    return _compare_all([what], [folder], base)[0]


def _compare_all(cuts: Sequence[Cut], folders: Sequence[Path], base: Base) -> list[Verified]:
    """Plain PEFT with each folder, on one base model, against the nested adapter at that rank."""
    adapter = load(base(torch.float32), cuts[0].source)
    wanted = [nested_logits(adapter, what.ranks) for what in cuts]
    model, found = adapter.model.unload(), []
    for folder, (right, without) in zip(folders, wanted, strict=True):
        plain = PeftModel.from_pretrained(model, str(folder))
        found.append(check(probe_logits(plain), right, without, torch.float32, "the adapter"))
        model = plain.unload()
    return found
