"""``matryoshka serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.cli.verbs import Model, Revision


def serve(
    source: Annotated[Path, typer.Argument(help="A nested adapter, or a folder of them.", show_default=False)],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Options of vLLM's server, after --.", show_default=False),
    ] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the command and start nothing.")] = False,
    model: Model = None,
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="Where the server listens: 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the server.")] = 8000,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="How many ranks may be in one batch.", show_default="the nested ranks, at most 8"),
    ] = None,
) -> None:
    """Serve every rank of an adapter with vLLM: a request for the model NAME@4 is answered by rank 4 of NAME.

    NAME is the name of the adapter's folder, and NAME@auto the rank that `matryoshka select --save` chose. A rank is
    cut when it is first asked for. GET /v1/ranks lists names and ranks.

    Example: matryoshka serve runs/family -- --max-model-len 2048
    """
    from matryoshka_lora.serving.serve import serve as prepare

    served = prepare(source, model, revision, host=host, port=port, at_once=at_once, more=more or ())
    typer.echo(served.command())
    if only_print:
        return
    typer.echo(f"Serves {', '.join(served.names)} and other ranks at http://{host}:{port}/v1", err=True)
    sys.stdout.flush()
    served.run()
