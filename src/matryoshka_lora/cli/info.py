"""``matryoshka info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def info(
    adapter: Annotated[Path, typer.Argument(help="A folder with a LoRA adapter, nested or not.", show_default=False)],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the singular values of every layer, as .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Say what an adapter is: ranks, scales, its size at each rank, and how fast its directions lose weight.

    No base model is loaded.

    Example: matryoshka info runs/demo/adapter --plot decay.png
    """
    from matryoshka_lora.files import replace_file
    from matryoshka_lora.serving.info import describe
    from matryoshka_lora.serving.info import plot as draw

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot is {plot}; give it a name that ends in .png, .svg or .pdf")
    description = describe(adapter)
    for line in description.lines():
        typer.echo(line)
    if plot is not None:
        with replace_file(plot) as file, open(file, "xb") as picture:
            draw(description, picture, plot.suffix[1:])
        typer.echo(f"\nThe picture is {plot}")
    state = description.adapter.state
    if state is None or not state.reordered:
        typer.echo(f"\nNext: matryoshka reorder {adapter} -o nested")
    else:
        typer.echo(
            f"\nNext: matryoshka export {adapter} --rank {state.nesting.ranks[len(state.nesting.ranks) // 2]} -o small"
        )
