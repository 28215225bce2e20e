"""``matryoshka train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Instead of what the file says.", show_default=False),
    ] = None,
) -> None:
    """Train one adapter for every rank.

    The file names the data, and may set any field of TRL's SFTConfig, any of PEFT's LoraConfig under lora:, and ranks,
    scaling and rule under nesting:. The same command goes on where a killed run stopped.

    Example: matryoshka train config.yaml lora.r=8 learning_rate=1e-3
    """
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.training import load_config
    from matryoshka_lora.training import train as run
    from matryoshka_lora.training.processes import leave

    checked = load_config(config, overrides or [])
    try:
        run(checked)
        leave()
    except KeyboardInterrupt as error:
        raise MatryoshkaError("stopped; the same command goes on from the newest checkpoint") from error
    if os.environ.get("RANK", "0") == "0":
        if "task" in checked.data:
            held_out = f"--task {checked.data['task']}"
        else:
            held_out = f"--data {checked.data.get('path') or checked.data['dataset']} (better: rows held out from it)"
        typer.echo(f"Next: matryoshka eval {checked.output_dir} {held_out}")
