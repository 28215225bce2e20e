"""Arguments and options that several commands share, and the parsing of lists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from matryoshka_lora.errors import short
from matryoshka_lora.registry import FORMATS, DtypeName, FormatName, KeyFormat

LoraArgument = Annotated[
    Path,
    typer.Argument(
        metavar="LORA",
        help="A folder of PEFT or mlx-lm, a .safetensors file, or owner/name on the Hugging Face "
        "Hub.",
    ),
]
AdapterArgument = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="A PEFT folder, or owner/name on the Hugging Face Hub."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Path of the folder or file to write.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier output.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Revision of a LoRA on the Hub: a branch, tag or commit.")
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        help="For a single file that does not contain its alpha, such as adapter_model.safetensors "
        "without its adapter_config.json."
    ),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        help="Base model: a folder or a Hub id.", show_default="the one that the adapter names"
    ),
]
BaseRevisionOption = Annotated[
    str | None,
    typer.Option(
        help="Revision of the base model on the Hub.", show_default="the one that the adapter names"
    ),
]
DtypeOption = Annotated[
    DtypeName | None,
    typer.Option(help="Dtype of the model.", show_default="bf16 if the hardware supports it"),
]
ModelArgsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,...",
        help="More arguments of from_pretrained for the base model, as in lm-eval: "
        "device_map=auto, load_in_4bit=True, attn_implementation=eager.",
    ),
]
PipelineArgsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=VALUE,...",
        help="Arguments of the pipeline: num_inference_steps=20,height=512,guidance_scale=3.5.",
    ),
]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="Keep only the part that computes on the GPU.")
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        help="Share of the squared singular values to keep, such as 95%. Each layer gets the "
        "smallest rank that keeps it. 95% is a relative error of about 22%, 99% of 10%."
    ),
]
ErrorOption = Annotated[
    str | None,
    typer.Option(
        help="Maximum relative error over all layers, such as 10%. The layers get the ranks that "
        "reach it with a small file. After `reorder` with --data or --pipeline, it is "
        "the weighted error."
    ),
]
MaxBytesOption = Annotated[
    str | None,
    typer.Option(
        help="Maximum output size, such as 50MB; layer ranks are chosen to minimize the total "
        "error."
    ),
]
MaxBytesOrShareOption = Annotated[
    str | None,
    typer.Option(
        help="Maximum output size, such as 50MB, or 25% of the source; layer ranks are chosen to "
        "minimize the total error."
    ),
]
ForVllmOption = Annotated[
    bool,
    typer.Option(
        "--for-vllm",
        help="With --error, give all layers one rank, rounded up to one of vLLM's --max-lora-rank.",
    ),
]
PadOption = Annotated[
    bool,
    typer.Option(
        "--pad",
        help="Write a larger --rank to train on: the same update, with new components that learn.",
    ),
]
FactorDtypeOption = Annotated[
    DtypeName | None, typer.Option(help="Dtype of the factors.", show_default="that of the source")
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave out the layers whose names match, such as `lora_te*`. The option may be "
        "repeated.",
    ),
]
ScaleOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=FACTOR",
        help="Multiply the update of the layers whose names match, such as `*_blocks_1_*=0.5`. "
        "The option may be repeated; the last pattern that matches a layer counts.",
    ),
]
RankOrRanksOption = Annotated[
    str | None,
    typer.Option(
        help="Rank; with --keep, --error or --max-bytes, an upper bound; a ladder accepts several: "
        "1,4,8."
    ),
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option(
        help=f"Format of the output: {', '.join(FORMATS)}.",
        show_default="gguf if the output ends in .gguf, otherwise that of the source",
    ),
]
KeyFormatOption = Annotated[
    KeyFormat | None,
    typer.Option(
        help="For image models: write one file with keys in this format. peft writes a folder.",
        show_default="the keys of the source; kohya or diffusers if a PEFT folder is written as "
        ".safetensors",
    ),
]
RanksOption = Annotated[
    str | None, typer.Option(help="Ranks such as 1,2,4.", show_default="the nested ranks")
]
ExamplesOption = Annotated[
    Path,
    typer.Option(
        exists=True, help="A .jsonl file of examples with prompt and completion, or messages."
    ),
]


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """Return arguments such as ``"height=512,negative_prompt=dark, blurry"``."""
    if text is None:
        return None
    arguments: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+=)", text):  # a value may contain other commas
        name, separator, value = part.strip().partition("=")
        if not (separator and name):
            raise typer.BadParameter(f"{short(part)} is not NAME=VALUE.")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = {"true": True, "false": False}.get(value, value)
    return arguments


def parse_model_args(text: str | None) -> dict[str, Any] | None:
    """Return arguments in lm-eval's format, such as ``"device_map=auto,load_in_4bit=True"``."""
    arguments = parse_arguments(text)
    for name in ("name", "revision", "device", "trust_remote_code"):
        if arguments and name in arguments:
            raise typer.BadParameter(f"{name} cannot be set with --model-args.")
    return arguments


def parse_ranks(text: str | None) -> list[int] | None:
    """Return ranks such as ``"1,2,4"``."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{short(text)} is not a rank such as 8, or 1,2,4.") from error


def parse_weights(text: str | None) -> list[float] | Literal["mean"] | None:
    """Return weights such as ``"1,0.5"``, or ``"mean"``."""
    if text is None:
        return None
    if text == "mean":
        return "mean"
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{short(text)} is not a list of weights such as 1,0.5."
        ) from error


def parse_scale(texts: list[str] | None) -> dict[str, float]:
    """Return the factor of each pattern, from ``"PATTERN=0.5"``."""
    factors: dict[str, float] = {}
    for text in texts or []:
        pattern, separator, factor = text.rpartition("=")
        try:
            if not separator:
                raise ValueError
            # The last one of a repeated pattern counts, and its place is the last one too.
            factors.pop(pattern, None)
            factors[pattern] = float(factor)
        except ValueError as error:
            raise typer.BadParameter(f"{short(text)} is not PATTERN=0.5.") from error
    return factors


def parse_rank_of_sum(text: str | None) -> int | Literal["sum"] | None:
    """Return the rank of a sum, from ``"16"`` or ``"sum"``."""
    if text is None:
        return None
    if text == "sum":
        return "sum"
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{short(text)} is neither a rank such as 16 nor sum.") from error
