"""``matryoshka export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="A folder that training has written.", show_default=False)],
    rank: Annotated[int, typer.Option(help="The rank to cut out.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
) -> None:
    """Write one rank as an ordinary LoRA adapter, for PEFT or any engine that serves PEFT's files.

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4
    """
    from matryoshka_lora.adapter import export_adapter

    export_adapter(adapter, out, rank)
    typer.echo(f'{out} is a plain LoRA adapter of rank {rank}. Next: PeftModel.from_pretrained(base_model, "{out}")')
