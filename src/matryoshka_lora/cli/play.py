"""``matryoshka play``."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.cli.verbs import Dtype, Model, Revision
from matryoshka_lora.errors import MatryoshkaError


def play(
    adapter: Annotated[Path, typer.Argument(help="The folder of a nested adapter.", show_default=False)],
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "--task",
            help="Ask questions of these tasks now, instead of showing evaluation.json; names as for eval.",
            show_default="what evaluation.json holds",
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="The most questions of each of these tasks.")] = 20,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    host: Annotated[
        str, typer.Option(help="Where the page is served: 0.0.0.0 lets other machines use it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port of the page; 0 is any free one.")] = 7860,
) -> None:
    """Open a page on this machine where an adapter answers at two ranks side by side.

    The page shows the curve and the answers of evaluation.json, and exports the chosen rank. Exports lie in the folder
    that the command is started in.

    Example: matryoshka play runs/demo/adapter
    """
    if importlib.util.find_spec("gradio") is None:
        raise MatryoshkaError(
            "the page needs Gradio, which is not installed: install matryoshka-lora with its extra, from its "
            "repository with pip install -e '.[play]'"
        )
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws a bar for each of its steps at each rank
    from matryoshka_lora.play.server import address, gated, is_loopback, listen, run
    from matryoshka_lora.play.session import open_session

    with listen(host, port) as listening:
        typer.echo(f"Loading {adapter} and its base model", err=True)
        if tasks is None:
            session = open_session(adapter, model=model, revision=revision, dtype=dtype.value)
        else:
            from matryoshka_lora.evaluation.evaluate import bar

            session = open_session(
                adapter, tasks, items=items, model=model, revision=revision, dtype=dtype.value, progress=bar
            )
        from matryoshka_lora.play.page import page

        app = gated(page(session), only_here=is_loopback(host))
        if not is_loopback(host):
            typer.echo(
                f"Warning: whoever can reach {host} can use this page, ask the model and export into {Path.cwd()}",
                err=True,
            )
        typer.echo(f"Open {address(listening)} in a browser. Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            run(app, listening)
        typer.echo("Stopped.", err=True)
