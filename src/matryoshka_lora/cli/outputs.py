"""What ``--out`` says, which several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.errors import MatryoshkaError


def output(text: str) -> Path:
    """What ``--out`` says; of an empty text, `Path` would make the current folder."""
    from matryoshka_lora.files import output_path

    try:
        return output_path(text)
    except MatryoshkaError as error:
        raise typer.BadParameter(str(error)) from error


Out = Annotated[
    Path,
    typer.Option("--out", "-o", parser=output, metavar="PATH", help="The folder or file to write.", show_default=False),
]
