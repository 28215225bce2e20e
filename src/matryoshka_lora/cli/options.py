"""What several verbs take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Dtype(StrEnum):
    """The names of `matryoshka_lora.models.DTYPES`, which is slow to import."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


Model = Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter was trained on")]
Revision = Annotated[
    str | None,
    typer.Option(help="Of the base model on the hub.", show_default="the one that the adapter was trained on"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter, a model or an evaluation that is there.")]
