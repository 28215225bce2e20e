"""``matryoshka reorder``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from matryoshka_lora.cli.eval import Dtype, base_model


class MetricName(StrEnum):
    """The names of `matryoshka_lora.formats.spectra.Metric`, which is slow to import."""

    frobenius = "frobenius"
    activations = "activations"
    loss = "loss"
    learned = "learned"


def reorder(
    adapter: Annotated[
        Path, typer.Argument(help="A folder with any LoRA adapter that PEFT has written.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    metric: Annotated[
        MetricName, typer.Option(help="In what sense each prefix is the best of its rank.")
    ] = MetricName.frobenius,
    data: Annotated[
        str | None,
        typer.Option(help="For all but frobenius: a task, a file, or a hub dataset.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows of it.", show_default="128; 480 for learned")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter names")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of the base model on the hub.", show_default="what the adapter names")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an adapter, a model or an evaluation that is there.")
    ] = False,
) -> None:
    """Make any LoRA adapter nested: the function stays, and every prefix becomes the best adapter of its rank.

    frobenius needs no data and no base model. activations changes each layer's outputs least, and loss the training
    loss; learned descends the loss of the prefixes themselves for a few steps. These three run the base model over some
    rows of the training data, or of data like it.

    Example: matryoshka reorder runs/some-lora -o nested --metric learned --data my.jsonl
    """
    if (metric is MetricName.frobenius) != (data is None):
        raise typer.BadParameter(
            f"--metric {metric.value} needs --data, for example --data my.jsonl"
            if data is None
            else "--data is for --metric activations, loss and learned; name one of them"
        )

    import torch
    from tqdm import tqdm

    from matryoshka_lora.formats.opened import open_adapter
    from matryoshka_lora.adapter.storage import check_apart
    from matryoshka_lora.serving.reorder import reorder_adapter
    from matryoshka_lora.files import check_free, check_writable

    opened = open_adapter(adapter)
    check_writable(out)
    check_apart(adapter, out)
    check_free(out, force)
    if data is None:
        with tqdm(total=len(opened.layers), desc="reordering", unit=" layers", disable=None) as bar:
            reorder_adapter(adapter, out, on_layer=bar.update, overwrite=force)
    else:
        from matryoshka_lora.adapter import order
        from matryoshka_lora.serving.calibrate import ROWS, calibration_rows, reorder_with_data
        from matryoshka_lora.models import DTYPES, load_model, load_tokenizer

        questions = calibration_rows(data, rows or ROWS[metric.value])
        name, revision = base_model(model, revision, opened.config, adapter)
        base = load_model(name, DTYPES[dtype.value], revision=revision)
        tokenizer = load_tokenizer(name, revision=revision)
        if torch.accelerator.is_available():
            base.to(torch.accelerator.current_accelerator())
        taken = order.STEPS * order.ROWS if metric is MetricName.learned else len(questions)
        with tqdm(total=taken, desc="calibrating", unit=" rows", disable=None) as bar:
            reorder_with_data(
                adapter, out, metric.value, base, tokenizer, questions, on_batch=bar.update, overwrite=force
            )
    typer.echo(
        f"{out} is nested: PEFT reads it as the adapter that {adapter} is, and any rank from 1 to {opened.rank} may be "
        f"used. Next: matryoshka info {out}, or matryoshka export {out} --budget 0.25 -o small"
    )
