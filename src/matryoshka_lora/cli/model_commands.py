"""The commands that train, evaluate, select, preview and serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from matryoshka_lora.cli.arguments import (
    AdapterArgument,
    BaseModelOption,
    BaseRevisionOption,
    DtypeOption,
    ExamplesOption,
    ForceOption,
    LoraArgument,
    ModelArgsOption,
    OffloadOption,
    OutputOption,
    PipelineArgsOption,
    RanksOption,
    RevisionOption,
    parse_arguments,
    parse_model_args,
    parse_ranks,
)
from matryoshka_lora.cli.terminal import (
    is_main_process,
    print_line,
    print_loading,
    print_next,
    revision_option,
    with_flags,
)
from matryoshka_lora.errors import MatryoshkaError, optional_imports
from matryoshka_lora.registry import DtypeName


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Path of a new folder.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train a small adapter on a table, see how much of it each rank knows, and query it.

    The base model comes with a package, so no network is needed. Takes a few minutes on
    two CPU cores.

    Example: matryoshka demo
    """
    if output.exists():
        raise MatryoshkaError(
            f"{output} already exists. Delete it, or pass another path with --output."
        )
    print_loading()
    with optional_imports("demo"):
        from matryoshka_lora.demo import demo as run_demo

        run_demo(output)
    print_next("info", output / "adapter")


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", exists=True, help="A YAML file, see above.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace those of the file."),
    ] = None,
) -> None:
    """Train one adapter for every rank.

    The YAML file names the data. It may set every field of TRL's SFTConfig, fields of PEFT's
    LoraConfig under lora:, and ranks, scaling, rule, deploy, seed and train_ranks under nesting:.
    Re-run the same command to resume an interrupted run.

    After training, the ranks are trained briefly, on half as many examples as the run.
    nesting.train_ranks=false reorders by SVD only, which takes seconds.

    Example: matryoshka train config.yaml data=my.jsonl lora.r=8 learning_rate=1e-3
    """
    print_loading()
    with optional_imports("train"):
        from matryoshka_lora import sft

        result = sft.train(sft.read_config(config, overrides or []))
    if not is_main_process():
        return
    typer.echo(str(result))
    print_next("eval", result.path, "--data", "held-out.jsonl")


def train_ranks(
    adapter: AdapterArgument,
    data: ExamplesOption,
    output: OutputOption,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Examples to validate on, in a .jsonl file like that of --data.",
            show_default="training examples",
        ),
    ] = None,
    max_examples: Annotated[
        int,
        typer.Option(
            min=1, help="Number of examples to train on. They repeat if the data has fewer."
        ),
    ] = 3200,
    base_model: BaseModelOption = None,
    base_revision: BaseRevisionOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    model_args: ModelArgsOption = None,
    force: ForceOption = False,
) -> None:
    """Train the low ranks of an adapter, in a small adapter of their own. Rank R stays the same.

    The adapter is reordered by SVD if it is not yet. Trained ranks are kept only if they lower the
    loss on validation examples. Pass examples that are in no training data with --eval-data, if you
    can.

    Example: matryoshka train-ranks some-lora --data my.jsonl --eval-data more.jsonl -o nested
    """
    from matryoshka_lora import train_ranks as run_train_ranks

    print_loading()
    print_line(f"Training on {max_examples} examples, see --max-examples", err=True)
    result = run_train_ranks(
        adapter,
        output,
        data,
        eval_data=eval_data,
        max_examples=max_examples,
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        dtype=dtype,
        model_args=parse_model_args(model_args),
        force=force,
    )
    typer.echo(str(result))
    print_next("info", output)


def evaluate(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="A PEFT folder, a folder of them, or owner/name on the Hugging Face Hub.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness or YAML files, separated by commas."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="Instead of tasks, a .jsonl file of examples, as for training. For a folder of "
            "adapters, a file for all, or a folder with NAME.jsonl for each.",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="Ranks such as 1,2,4, or all.", show_default="the nested ranks"),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of few-shot examples.", show_default="by task")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of questions of a task.")
    ] = None,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(
            help="What computes the answers. vllm computes one rank after the other, and "
            "--model-args are arguments of its engine."
        ),
    ] = "transformers",
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens in a batch, over all its rows and ranks.",
            show_default="32768",
        ),
    ] = None,
    base_model: BaseModelOption = None,
    base_revision: BaseRevisionOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    model_args: ModelArgsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Path of the folder to write.", show_default="ADAPTER-evaluation"
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="For a folder: leave out the adapters that cannot be evaluated."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Evaluate an adapter of a causal language model at several ranks, and the model without it.

    Prompts and scoring come from lm-evaluation-harness. Prints a table, and writes the numbers, the
    answers and a plot. If ADAPTER is a folder of adapters, each of them is evaluated, and the table
    has their ranks.

    Example: matryoshka eval runs/my/adapter --tasks arc_easy,hellaswag --limit 200

    Example: matryoshka eval loras --data held-out
    """
    from matryoshka_lora import evaluate as run_evaluate
    from matryoshka_lora import evaluate_folder
    from matryoshka_lora.evaluation.evaluate import default_output
    from matryoshka_lora.formats.open import find_loras

    rank_list: Sequence[int] | Literal["all"] | None
    rank_list = "all" if ranks == "all" else parse_ranks(ranks)
    options: dict[str, Any] = {
        "base_model": base_model,
        "base_revision": base_revision,
        "dtype": dtype,
        "model_args": parse_model_args(model_args),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "max_batch_tokens": max_batch_tokens,
        "force": force,
    }
    print_loading()
    if find_loras(adapter):
        if backend != "transformers":
            raise typer.BadParameter(f"--backend {backend} needs an adapter, not a folder of them.")
        result = evaluate_folder(
            adapter, tasks, data, rank_list, output=output, skip_bad=skip_bad, **options
        )
        if is_main_process():
            typer.echo(with_flags(str(result), {"force", "metric"}))
            needed = result.selected_ranks.values()  # none: the table says why
            largest = max((value.ranks[-1] for value in result.evaluations.values()), default=0)
            if needed and (rank := max(needed)) < largest:  # a server has one rank for all
                output = Path(f"{adapter.resolve().name}-{rank}")
                print_next("export", adapter, "--rank", rank, "-o", output)
            elif needed:
                print_next("serve", adapter, *["--skip-bad"] * bool(result.failed), "--dry-run")
        return
    output = output or default_output(adapter)
    evaluation = run_evaluate(
        adapter,
        tasks,
        data,
        rank_list,
        backend=backend,
        output=output,
        revision=revision,
        **options,
    )
    if not is_main_process():
        return
    typer.echo(str(evaluation))
    print_line(
        f"Written to {output}: evaluation.json, examples.jsonl with the answers, and curve.png"
    )
    print_next("select", output, "--within", "1%")


def select(
    evaluation: Annotated[
        Path,
        typer.Argument(
            metavar="EVALUATION", exists=True, help="The folder that `matryoshka eval` wrote."
        ),
    ],
    within: Annotated[
        str | None,
        typer.Option(help="How far below the best rank's value the rank may be, such as 1%."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Largest size of the exported adapter, such as 50MB.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task to choose by.", show_default="the only one")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric, such as loss.", show_default="the one that eval names"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Choose the smallest rank that is good enough, or with --max-bytes alone the best that fits.

    Prints whether the questions are enough to claim that no larger rank is better by more than
    --within.

    Example: matryoshka select runs/my/adapter-evaluation --within 1%
    """
    from matryoshka_lora import select as run_select

    selection = run_select(evaluation, within, max_bytes, task=task, metric=metric)
    if as_json:
        typer.echo(json.dumps(selection.to_dict(), indent=2))
        return
    typer.echo(str(selection))
    settings = selection.evaluation.settings
    if settings["adapter"]:  # empty for an adapter in memory
        source = [settings["adapter"], *revision_option(settings.get("revision"))]
        print_next("export", *source, "--rank", selection.rank, "-o", f"rank-{selection.rank}")


def preview(
    lora: LoraArgument,
    model: Annotated[
        str, typer.Option(help="Pipeline of diffusers: a folder or a Hub id of an image model.")
    ],
    prompt: Annotated[list[str], typer.Option(help="Prompt. The option may be repeated.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="PNG file to write. The numbers are in a JSON file next to it."
        ),
    ],
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks such as 1,2,4.", show_default="the nested ranks, or none with --errors"
        ),
    ] = None,
    errors: Annotated[
        str | None, typer.Option(help="Errors such as 10%,20%, as in `export --error`.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed for each prompt. The option may be repeated.", show_default="0"),
    ] = None,
    within: Annotated[
        str, typer.Option(help="Largest distance of a setting that is suggested.")
    ] = "20%",
    pipeline_args: PipelineArgsOption = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            help="Dtype of the pipeline.", show_default="bf16 if a GPU supports it, otherwise fp32"
        ),
    ] = None,
    offload: OffloadOption = False,
    revision: RevisionOption = None,
    force: ForceOption = False,
) -> None:
    """Draw the same pictures with an image or video LoRA at several ranks, on one sheet.

    Each column is a rank or an error, between no LoRA and the whole LoRA. Prints the size of each
    file, and how far its pictures are from those of the whole LoRA. Nothing is exported.

    Example: matryoshka preview lora.safetensors --model MODEL --prompt 'a red fox' -o sheet.png
    """
    from matryoshka_lora import preview as run_preview

    print_loading()
    result = run_preview(
        lora,
        model,
        prompt,
        parse_ranks(ranks),
        errors=errors.split(",") if errors else (),
        seeds=seed or [0],
        within=within,
        pipeline_args=parse_arguments(pipeline_args),
        dtype=dtype,
        offload=offload,
        revision=revision,
        output=output,
        force=force,
    )
    typer.echo(str(result))
    print_line(f"Written to {output} and {output.with_suffix('.json')}")
    if result.suggestion is not None:
        ((option, value),) = result.suggestion.options.items()
        source = [lora, *revision_option(revision)]
        small_file = Path(f"{lora.stem}-small.safetensors")
        print_next("export", *source, f"--{option}", value, "-o", small_file)


def serve(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTERS",
            help="A folder of PEFT folders, such as a ladder; or an adapter: a PEFT folder, or "
            "owner/name on the Hugging Face Hub.",
        ),
    ],
    vllm_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Options of vLLM's server, after --."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and run nothing.")
    ] = False,
    ranks: RanksOption = None,
    base_model: BaseModelOption = None,
    base_revision: BaseRevisionOption = None,
    revision: RevisionOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="For a folder: leave out the adapters that cannot be served."
        ),
    ] = False,
) -> None:
    """Serve a folder of adapters, or several ranks of one adapter, with vLLM.

    A request for the model NAME is answered by the adapter in the folder NAME, and one for NAME@4
    by rank 4 of the adapter NAME. vLLM pads every adapter to the largest rank that it serves, so
    small ranks save memory only on a server without large ones.

    Example: matryoshka serve runs/my/adapter --ranks 1,4,8 -- --max-model-len 2048

    Example: matryoshka serve loras --dry-run
    """
    from matryoshka_lora.serve import serve as run_serve

    result = run_serve(
        adapter,
        ranks=parse_ranks(ranks),
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        host=host,
        port=port,
        vllm_options=vllm_options or (),
        skip_bad=skip_bad,
        dry_run=dry_run,
    )
    if dry_run:
        for command in result.commands:
            print_line(command)
    raise typer.Exit(result.exit_status or 0)
