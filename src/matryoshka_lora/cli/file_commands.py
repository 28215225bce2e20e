"""The commands that read and write LoRA files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryoshka_lora.cli.arguments import (
    AlphaOption,
    BaseModelOption,
    BaseRevisionOption,
    DropOption,
    DtypeOption,
    ErrorOption,
    FactorDtypeOption,
    ForceOption,
    FormatOption,
    ForVllmOption,
    KeepOption,
    KeyFormatOption,
    LoraArgument,
    MaxBytesOption,
    MaxBytesOrShareOption,
    ModelArgsOption,
    OffloadOption,
    OutputOption,
    PadOption,
    PipelineArgsOption,
    RankOrRanksOption,
    RevisionOption,
    ScaleOption,
    parse_arguments,
    parse_model_args,
    parse_rank_of_sum,
    parse_ranks,
    parse_scale,
    parse_weights,
)
from matryoshka_lora.cli.terminal import (
    print_line,
    print_loading,
    print_next,
    revision_option,
    with_flags,
)
from matryoshka_lora.registry import FORMATS, ImageKeyFormat
from matryoshka_lora.text import with_name

if TYPE_CHECKING:
    from matryoshka_lora.operations.export import ExportOptions, ExportResult
    from matryoshka_lora.operations.info import FolderInfo, LoraInfo


def info(
    lora: LoraArgument,
    layers: Annotated[
        bool, typer.Option("--layers", help="Describe each layer: the rank that it needs.")
    ] = False,
    error: Annotated[
        str | None,
        typer.Option(help="Find the rank of this relative error.", show_default="10% for a folder"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: RevisionOption = None,
) -> None:
    """Print what a LoRA contains, and the size and error of each rank.

    The error of a rank is the norm of what truncation to that rank drops, relative to the norm of
    the whole update. No base model is needed. If LORA is a folder of LoRAs, print a table of them,
    the rank at which each has an error of 10%, and what a server of vLLM needs for them. The exit
    status is 1 if one of them cannot be read.

    Example: matryoshka info runs/demo/adapter

    Example: matryoshka info loras --error 20%
    """
    from matryoshka_lora import info as read_info
    from matryoshka_lora import info_folder
    from matryoshka_lora.formats.open import find_loras

    if find_loras(lora):
        folder_info = info_folder(lora, layers=layers, error=error or "10%")
        if as_json:
            typer.echo(json.dumps(folder_info.to_dict(), indent=2))
        else:
            typer.echo(folder_info)
            _print_next_of_folder(lora, folder_info)
        raise typer.Exit(1 if folder_info.failed else 0)
    result = read_info(lora, layers=layers, error=error, revision=revision)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    typer.echo(with_flags(str(result), {"rank", "error", "keep", "max_bytes"}))
    _print_next_of_info(lora, result, revision)


def _print_next_of_folder(folder: Path, folder_info: FolderInfo) -> None:
    error = f"{100 * folder_info.max_error:.4g}%"
    output = f"{folder.resolve().name}-small"
    plan = folder_info.plan
    has_files = any(value.lora.container == "single" for value in folder_info.loras.values())
    if plan is None or has_files:
        print_next("export", folder, "--error", error, "-o", output)
    elif any(rank < folder_info.loras[name].lora.max_rank for name, rank in plan.ranks.items()):
        print_next("export", folder, "--error", error, "--for-vllm", "-o", output)
    else:  # a smaller rank of vLLM has a larger error
        print_next("serve", folder, *["--skip-bad"] * bool(plan.not_served), "--dry-run")


def _print_next_of_info(lora: Path, result: LoraInfo, revision: str | None) -> None:
    from matryoshka_lora.lora.convert import part_of_pipeline

    ranks = result.lora.nested_ranks
    source = [lora, *revision_option(revision)]
    if result.lora.container == "single":
        small_file = Path(f"{lora.stem}-small.safetensors")
        print_next("export", *source, "--error", "10%", "-o", small_file)
    elif result.lora.max_rank == 1:
        return  # there is no smaller rank
    elif result.lora.order is None and result.lora.deploy != "paper":
        print_next("reorder", *source, "-o", "nested")
    else:
        rank = result.lora.small_rank or ranks[len(ranks) // 2]
        if result.max_error is not None:
            rank = result.rank_for_error(result.max_error)
        suffix = ".safetensors" if part_of_pipeline(result.lora) else ""
        print_next("export", *source, "--rank", rank, "-o", f"rank-{rank}{suffix}")


def reorder(
    lora: LoraArgument,
    output: OutputOption,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Examples of the LoRA's own task, in a .jsonl file with prompt and completion, or "
            "messages. They weight the order.",
        ),
    ] = None,
    max_examples: Annotated[
        int, typer.Option(min=1, help="Number of examples of --data to use.")
    ] = 64,
    base_model: BaseModelOption = None,
    base_revision: BaseRevisionOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    model_args: ModelArgsOption = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Pipeline of diffusers: a folder or a Hub id of an image model. The pictures that "
            "it draws for each --prompt weight the order."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt of the LoRA, with --pipeline. The option may be repeated."),
    ] = None,
    pipeline_args: PipelineArgsOption = None,
    offload: OffloadOption = False,
    force: ForceOption = False,
) -> None:
    """Reorder the components of any LoRA by SVD, so that it can be used at every rank.

    Every rank r becomes the closest rank-r approximation of the LoRA's update, and the largest rank
    is unchanged. It takes seconds, and needs neither data nor the base model.

    With --data, every rank changes the model's outputs on the examples least instead. Nothing is
    trained. The output remembers the weights, and `export --error` uses them. --pipeline does the
    same for an image or video LoRA.

    Example: matryoshka reorder some-lora -o nested

    Example: matryoshka reorder some-lora --data my.jsonl -o nested

    Example: matryoshka reorder x.safetensors --pipeline MODEL --prompt 'a fox' -o y.safetensors
    """
    from matryoshka_lora import reorder as run_reorder

    if data is not None or pipeline is not None:
        print_loading()
    result = run_reorder(
        lora,
        output,
        data,
        max_examples=max_examples,
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        dtype=dtype,
        model_args=parse_model_args(model_args),
        pipeline=pipeline,
        prompts=prompt or (),
        pipeline_args=parse_arguments(pipeline_args),
        offload=offload,
        force=force,
    )
    typer.echo(result)
    print_next("info", output)


def combine(
    loras: Annotated[
        list[Path],
        typer.Argument(metavar="LORA...", help="PEFT folders, or .safetensors files."),
    ],
    output: OutputOption,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weight of each LoRA, such as 1,0.5, or mean. A negative weight subtracts.",
            show_default="1 for each",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the output, or sum, for the exact sum.",
            show_default="the largest of the LoRAs",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Add LoRAs of the same base model, with weights.

    Every rank r of the output is the closest rank-r approximation of the sum. The LoRAs may have
    different ranks, scales and layers, and the files different key formats: the output has that of
    the first one.

    Example: matryoshka combine style-a style-b --weights 1,0.5 -o sum

    Example: matryoshka combine a.safetensors b.safetensors --rank sum -o both.safetensors
    """
    from matryoshka_lora import combine as run_combine

    result = run_combine(
        loras, output, parse_weights(weights), parse_rank_of_sum(rank), force=force
    )
    typer.echo(with_flags(str(result), {"rank"}))
    print_next("info", output)


def extract(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE", help="The model before fine-tuning: a folder, a file or a Hub id."
        ),
    ],
    tuned: Annotated[
        Path,
        typer.Argument(
            metavar="TUNED", help="The model after fine-tuning, or a DoRA of the base model."
        ),
    ],
    output: OutputOption,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank; with --keep, --error or --max-bytes, an upper bound."),
    ] = None,
    keep: KeepOption = None,
    error: ErrorOption = None,
    max_bytes: MaxBytesOption = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a module to save in full, such as lm_head. The option may be repeated."
        ),
    ] = None,
    key_format: Annotated[
        ImageKeyFormat | None,
        typer.Option(help="For image models: write one file with keys in this format."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="Revision of the base model on the Hub.")
    ] = None,
    tuned_revision: Annotated[
        str | None, typer.Option(help="Revision of the tuned model on the Hub.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Extract a LoRA from a fine-tuned model: the closest one to the change of its weights.

    Re-run the same command to resume an interrupted run.

    Example: matryoshka extract base-model tuned-model --rank 64 -o lora
    """
    from matryoshka_lora import extract as run_extract

    result = run_extract(
        base,
        tuned,
        output,
        rank,
        keep=keep,
        error=error,
        max_bytes=max_bytes,
        modules_to_save=modules_to_save or (),
        key_format=key_format,
        base_revision=base_revision,
        tuned_revision=tuned_revision,
        force=force,
    )
    typer.echo(with_flags(str(result), {"modules_to_save"}))
    print_next("info", output)


def export(
    lora: LoraArgument,
    output: OutputOption,
    rank: RankOrRanksOption = None,
    keep: KeepOption = None,
    error: ErrorOption = None,
    max_bytes: MaxBytesOrShareOption = None,
    for_vllm: ForVllmOption = False,
    pad: PadOption = False,
    dtype: FactorDtypeOption = None,
    drop: DropOption = None,
    scale: ScaleOption = None,
    format: FormatOption = None,
    key_format: KeyFormatOption = None,
    base_model: BaseModelOption = None,
    base_revision: BaseRevisionOption = None,
    revision: RevisionOption = None,
    alpha: AlphaOption = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="For a folder: exit with status 0 even if a LoRA was not exported."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Write a LoRA at a smaller rank, or in the format of another program.

    A LoRA that was never reordered is reordered by SVD. A single .safetensors file produces a
    single file with the same keys. If LORA is a folder of LoRAs, each of them is exported. The
    formats of a PEFT folder:

    - peft: an ordinary LoRA adapter
    - merged: the base model with the adapter merged into its weights
    - ladder: one PEFT folder for each rank, to serve them all
    - gguf: a file for llama.cpp
    - mlx: a folder for mlx-lm

    Example: matryoshka export flux.safetensors --error 10% -o small.safetensors

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4

    Example: matryoshka export sdxl.safetensors --drop 'lora_te*' --dtype fp16 -o unet.safetensors
    """
    from matryoshka_lora import export as run_export
    from matryoshka_lora import export_folder
    from matryoshka_lora.formats.open import find_loras

    ranks = parse_ranks(rank)
    rank_or_ranks = ranks[0] if ranks and len(ranks) == 1 else ranks
    options: ExportOptions = {
        "keep": keep,
        "error": error,
        "max_bytes": max_bytes,
        "for_vllm": for_vllm,
        "pad": pad,
        "dtype": dtype,
        "drop": drop or (),
        "scale": parse_scale(scale),
        "key_format": key_format,
        "base_model": base_model,
        "base_revision": base_revision,
        "force": force,
    }
    if alpha is None and find_loras(lora):
        folder_result = export_folder(lora, output, rank_or_ranks, format, **options)
        typer.echo(folder_result)
        for name, reason in folder_result.failed.items():
            print_line(f"error: Not exported: {with_name(name, reason)}", err=True)
        raise typer.Exit(1 if folder_result.failed and not skip_bad else 0)
    result = run_export(
        lora, output, rank_or_ranks, format, revision=revision, alpha=alpha, **options
    )
    typer.echo(with_flags(str(result), {"rank"}))
    print_line(f"Next: {_how_to_load(result)}")


def _how_to_load(result: ExportResult) -> str:
    """Return how another program loads an exported LoRA."""
    path = shlex.quote(str(result.path))
    readers = {"kohya": "ComfyUI, or diffusers for a U-Net", "diffusers": "diffusers"}
    if result.key_format in readers:
        return f"load {path} with {readers[result.key_format]}"
    if result.format == "peft":  # Python, and not a command
        path = repr(str(result.path))
    return FORMATS[result.format].load.format(path=path)
