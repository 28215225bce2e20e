"""``matryoshka reorder``."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.cli.options import Dtype, Force, Model, Revision


class By(StrEnum):
    """The values of `matryoshka_lora.state.By`."""

    svd = "svd"
    activations = "activations"
    loss = "loss"
    learned = "learned"
    trained = "trained"


def reorder(
    adapter: Annotated[
        Path, typer.Argument(help="A folder with any LoRA adapter that PEFT has written.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    by: Annotated[By, typer.Option(help="In what sense each prefix is good; see above.")] = By.svd,
    data: Annotated[
        str | None,
        typer.Option(help="For all but svd: a built-in task, a file, or a hub dataset.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="How many rows of it.", show_default="128; 480 for learned, 6400 for trained"),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    force: Force = False,
) -> None:
    """Make any LoRA adapter nested: the function stays, and every prefix becomes a good adapter of its rank.

    svd is the best of each rank in every layer by itself; it needs no data and no base model. activations changes each
    layer's outputs least, and loss the training loss. learned takes a few training steps by the loss of the prefixes
    themselves. trained gives each rank a training of its own, and changes the function a little. These four run the
    base model over some rows of the training data, or of data like it.

    Example: matryoshka reorder runs/some-lora -o nested --by learned --data my.jsonl
    """
    from tqdm import tqdm

    from matryoshka_lora.serving.reorder import reorder as run

    # How many layers there are is known when the adapter has been read.
    with tqdm(desc="reordering", unit=" layers", disable=True if data else None) as bar:
        spectra = run(
            adapter,
            out,
            by.value,
            data,
            rows=rows,
            model=model,
            revision=revision,
            dtype=dtype.value,
            overwrite=force,
            on_layer=bar.update,
        )
    largest = max(len(values) for values in spectra.values())
    written, small = shlex.quote(str(out)), shlex.quote(f"{out.name}-small")
    typer.echo(
        f"{out} is nested: PEFT reads it as the adapter that {adapter} is, and any rank from 1 to {largest} may be "
        f"used. Next: matryoshka info {written}, or matryoshka export {written} --budget 0.25 -o {small}"
    )
