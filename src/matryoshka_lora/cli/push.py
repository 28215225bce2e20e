"""``matryoshka push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    adapter: Annotated[Path, typer.Argument(help="A folder with a LoRA adapter.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.", show_default=False)],
    base_model: Annotated[
        str | None,
        typer.Option(
            help="owner/name of the base model, for an adapter that names a folder.",
            show_default="what the adapter names",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository that is made.")] = False,
) -> None:
    """Upload an adapter with its model card and evaluation to the Hugging Face hub.

    Checkpoints and logs beside it are not sent, and nothing is sent while a file holds what looks like a token or an
    absolute path.

    Example: matryoshka push runs/demo/adapter me/family-any-rank
    """
    from matryoshka_lora.serving.push import push as send

    address = send(adapter, repository, private=not public, base_model=base_model)
    typer.echo(f"Uploaded: {address}")
