"""A ladder: one PEFT folder for each rank, so that a server can offer all of them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from matryoshka_lora.formats import peft_folder
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import Written
from matryoshka_lora.lora.truncate import with_ranks
from matryoshka_lora.registry import Target


def write(lora: Lora, folder: Path, target: Target) -> Written:
    """Write a folder ``NAME@RANK`` for each rank. Factors without an order are reordered once."""
    ranks = lora.nested_ranks if target.ranks is None else target.ranks
    adapter_name = Path(lora.name).resolve().name
    ranks_before = lora.ranks
    written_nested: Written | None = None
    small: Written | None = None
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        if lora.order is None and lora.deploy != "paper":
            written_nested = peft_folder.write(lora.nested(), Path(cache), target)
            lora = replace(peft_folder.read(cache, lora.name), files=lora.files)
        for rank in ranks:
            output = folder / f"{adapter_name}@{rank}"
            output.mkdir()
            if rank <= lora.small_rank:
                written = small = peft_folder.write(lora.at_rank(rank), output, target)
            else:
                new_ranks = {name: min(rank, before) for name, before in ranks_before.items()}
                written = peft_folder.write(with_ranks(lora, new_ranks), output, target)
    errors = written_nested or written
    if small is not None:
        errors = errors.with_small(small)
    return replace(errors, ranks=written.ranks, error_ranks=ranks)
