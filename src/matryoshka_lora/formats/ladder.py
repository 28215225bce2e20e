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
    of_all_ranks: Written | None = None
    own_ranks = lora.ranks
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        if lora.order is None and lora.deploy != "paper":
            of_all_ranks = peft_folder.write(lora.nested(), Path(cache), target)
            files = lora.files
            lora = replace(peft_folder.read(cache, lora.name), files=files)
        for rank in ranks:
            output = folder / f"{adapter_name}@{rank}"
            output.mkdir()
            ranks_by_layer = {name: min(rank, own) for name, own in own_ranks.items()}
            written = peft_folder.write(with_ranks(lora, ranks_by_layer), output, target)
    return replace(of_all_ranks or written, ranks=written.ranks, error_ranks=ranks)
