"""`matryoshka`: each verb calls one public function and says what comes next."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from matryoshka_lora.errors import MatryoshkaError

START = """Train one LoRA adapter, deploy it at any rank. What do you have?

  nothing yet     matryoshka demo                         learn a table, see what each rank holds
  data            matryoshka train CONFIG.yaml            train an adapter for every rank
  a LoRA file     matryoshka export LORA.safetensors --keep 99% -o small.safetensors
  a LoRA folder   matryoshka info FOLDER                  see what its ranks are worth
                  matryoshka reorder FOLDER -o nested     every rank in one adapter
  several         matryoshka combine A B -o both          their sum, at every rank
  a tuned model   matryoshka extract BASE TUNED --rank 64 -o lora

matryoshka --help lists the other verbs, matryoshka VERB --help explains one."""

app = typer.Typer(
    name="matryoshka",
    help="Train one LoRA adapter, deploy it at any rank.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


Dtype = Literal["bf16", "fp32", "fp16"]
Format = Literal["peft", "merged", "ladder", "gguf", "mlx"]
Style = Literal["kohya", "diffusers", "peft"]
By = Literal["svd", "trained"]


def _option(help: str, *names: str, default: str | None = None, **more: Any) -> Any:
    """Return an option whose default is told in words, or not at all."""
    return typer.Option(*names, help=help, show_default=default or False, **more)


def _existing(help: str, **more: Any) -> Any:
    return typer.Argument(help=help, exists=True, **more)


def _named(help: str) -> Any:
    return typer.Argument(help=f"{help} Or owner/name on the hub.")


Lora = Annotated[Path, _named("A folder with a LoRA; or a .safetensors file.")]
Nested = Annotated[Path, _named("The folder of an adapter.")]
Out = Annotated[Path, _option("The folder or file to write.", "--out", "-o")]
Model = Annotated[str | None, _option("The base model.", default="what the adapter names")]
Revision = Annotated[str | None, _option("Its revision.", default="what the adapter names")]
OfBase = Annotated[Dtype | None, _option("Its dtype.", default="bf16 if this machine has it")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there, whole.")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train one LoRA adapter, deploy it at any rank."""
    if version:
        from matryoshka_lora import __version__

        typer.echo(f"matryoshka-lora {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(START)


@app.command()
def train(
    config: Annotated[Path, _existing("A YAML file, see below.", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Instead of what the file says."),
    ] = None,
) -> None:
    """Train one adapter for every rank.

    The file names the data, and may set any field of TRL's SFTConfig, any of PEFT's LoraConfig
    under lora:, and under nesting: ranks, scaling, rule, deploy, seed and reorder. The same command
    goes on where a killed run stopped. After the run come steps that train a rank each, on at most
    half as many rows again; nesting.reorder=svd takes seconds instead.

    Example: matryoshka train config.yaml data=my.jsonl lora.r=8 learning_rate=1e-3
    """
    typer.echo("Loading libraries and model", err=True)
    from matryoshka_lora.train import read_config
    from matryoshka_lora.train import train as run

    folder = run(read_config(config, overrides or []))
    if os.environ.get("RANK", "0") != "0":
        return
    from matryoshka_lora.files.peft import open_adapter

    if open_adapter(folder).order is None:
        _next("reorder", folder, "-o", folder.with_name("nested"))
    else:
        _next("eval", folder, "--data", "held-out.jsonl")


@app.command()
def info(adapter: Lora) -> None:
    """Say what an adapter is, and what each of its ranks would weigh and lose.

    Example: matryoshka info runs/demo/adapter
    """
    from matryoshka_lora.info import describe

    description = describe(adapter)
    _tell(description.lines())
    if description.adapter.is_single:
        _next("export", adapter, "--keep", "99%", "-o", f"{adapter.stem}-small.safetensors")
    elif description.adapter.order is None:
        _next("reorder", adapter, "-o", "nested")
    else:
        ranks = description.adapter.ranks
        _next("export", adapter, "--rank", ranks[len(ranks) // 2], "-o", "small")


@app.command()
def reorder(
    adapter: Lora,
    out: Out,
    by: Annotated[By, typer.Option(metavar="ORDER", help="What makes a prefix good.")] = "svd",
    data: Annotated[Path | None, _option("A .jsonl of prompt and completion.", exists=True)] = None,
    rows: Annotated[int | None, _option("Rows to train on.", min=1, default="by need")] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: OfBase = None,
    force: Force = False,
) -> None:
    """Make any LoRA nested: every rank from 1 on can be cut out of it.

    The orders:

    - svd: each rank is the closest one to the adapter's update, and the largest rank computes what
      it did; seconds, without data or base model
    - trained: training lowers the loss of every rank, on at most 3,200 rows

    Example: matryoshka reorder some-lora -o nested --by trained --data my.jsonl
    """
    from matryoshka_lora.convert import reorder as run

    base: Any = {"model": model, "revision": revision, "dtype": dtype}
    run(adapter, out, by, data, rows=rows, force=force, **base)
    typer.echo(f"{out} holds every rank of {adapter}")
    _next("info", out)


@app.command()
def combine(
    adapters: Annotated[list[Path], _named("Folders with LoRAs, or .safetensors files.")],
    out: Out,
    weights: Annotated[
        str | None, _option("One for each, as 1,0.5; a negative one subtracts.", default="1")
    ] = None,
    rank: Annotated[int | None, _option("Its rank.", min=1, default="the largest given")] = None,
    force: Force = False,
) -> None:
    """Add LoRAs of one base model up: every rank of the output is the closest one to the sum.

    Ranks, scales and layers may differ. With the sum of the ranks as --rank, nothing is left out.

    Example: matryoshka combine style-a style-b --weights 1,0.5 -o both
    """
    from matryoshka_lora.combining import combine as run

    made = run(adapters, out, _numbers(weights, float), rank, force=force)
    _tell(made.lines())
    _next("info", out)


@app.command()
def extract(
    base: Annotated[Path, _named("The model before: a folder, or a .safetensors file.")],
    tuned: Annotated[Path, _named("The model after.")],
    out: Out,
    rank: Annotated[int | None, _option("The rank, or the most of a layer.", min=1)] = None,
    keep: Annotated[str | None, _option("A rank for each layer, by what it keeps: 90%.")] = None,
    max_bytes: Annotated[str | None, _option("The largest size of the file: 50MB.")] = None,
    whole: Annotated[
        list[str] | None, _option("A module that is kept as it is, such as lm_head. Repeat it.")
    ] = None,
    style: Annotated[
        Literal["kohya", "diffusers"] | None, _option("For image models: one file, in its keys.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn a fine-tuned model into a LoRA: the closest one to what the tuning changed.

    The same command goes on where a killed run stopped.

    Example: matryoshka extract base-model tuned-model --rank 64 -o lora
    """
    from matryoshka_lora.extracting import extract as run

    size: Any = {"keep": keep, "max_bytes": max_bytes}
    made = run(base, tuned, out, rank, **size, whole=whole or (), style=style, force=force)
    _tell(made.lines())
    _next("info", out)


@app.command()
def export(
    adapter: Lora,
    out: Out,
    rank: Annotated[str | None, _option("The rank; with --keep the most. A ladder: 1,4,8.")] = None,
    keep: Annotated[
        str | None,
        _option(
            "A rank for each layer, by the share of squared singular values that it keeps: 95% is "
            "an error of 22 % of the norm."
        ),
    ] = None,
    max_bytes: Annotated[str | None, _option("The largest size of the file: 50MB.")] = None,
    style: Annotated[Style | None, _option("In a single file: the spelling of its keys.")] = None,
    format: Annotated[Format | None, _option("See above.", default="by the name of --out")] = None,
    model: Model = None,
    revision: Revision = None,
    force: Force = False,
) -> None:
    """Make a LoRA smaller: write a rank of it, nested or not, for a device or an engine.

    A single .safetensors file becomes such a file, with the keys that it had. In a folder of
    adapters, each one is exported. The formats for a folder:

    - peft: an ordinary LoRA adapter
    - merged: the base model with the adapter in its weights
    - ladder: an adapter for each rank to serve
    - gguf: a file for llama.cpp's --lora
    - mlx: a folder for mlx-lm

    Example: matryoshka export flux.safetensors --keep 99% -o small.safetensors

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4
    """
    from matryoshka_lora.convert import adapters_in, export_all
    from matryoshka_lora.convert import export as write

    size: Any = {"keep": keep, "max_bytes": max_bytes, "style": style}
    base: Any = {"model": model, "revision": revision}
    ranks = _ranks(rank)
    one = ranks[0] if ranks and len(ranks) == 1 else ranks
    if adapters_in(adapter):
        _tell(export_all(adapter, out, one, format=format, **size, **base, force=force))
        return
    made = write(adapter, out, one, format, **size, **base, force=force)
    _tell(made.lines())
    place = shlex.quote(str(out))
    using = {
        "single": f"load {out} as you loaded {adapter}",
        "peft": f"PeftModel.from_pretrained(base_model, {str(out)!r})",
        "merged": f"vllm serve {place}",
        "ladder": f"matryoshka serve {place} --print",
        "gguf": f"llama-server -m BASE.gguf --lora {place}",
        "mlx": f"mlx_lm.generate --model BASE --adapter-path {place} --prompt Hello",
    }
    typer.echo(f"Next: {using[made.format]}")


@app.command("eval")
def evaluate(
    adapter: Nested,
    tasks: Annotated[str | None, _option("The harness's tasks or YAML files, by commas.")] = None,
    data: Annotated[Path | None, _option("Or a .jsonl: rows as for train.", exists=True)] = None,
    ranks: Annotated[str | None, _option("As 1,2,4, or all.", default="the nested ones")] = None,
    num_fewshot: Annotated[int | None, _option("Examples.", min=0, default="as the task")] = None,
    limit: Annotated[int | None, _option("The most questions of a task.", min=1)] = None,
    batch_size: Annotated[int | None, _option("Tokens of a batch.", min=1)] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: OfBase = None,
    out: Annotated[
        Path | None, _option("Folder to write.", "--out", "-o", default="ADAPTER-evaluation")
    ] = None,
    force: Force = False,
) -> None:
    """Measure an adapter at its nested ranks, and the base model without it.

    lm-evaluation-harness asks and judges. Prints a table; writes numbers, answers and a picture.

    Example: matryoshka eval runs/my/adapter --tasks arc_easy,hellaswag --limit 200
    """
    from matryoshka_lora.evaluation.evaluate import evaluate as run
    from matryoshka_lora.evaluation.evaluate import folder_for

    asked: Any = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
    given: Any = {"model": model, "revision": revision, "dtype": dtype}
    folder = out or folder_for(adapter)
    typer.echo("Loading libraries and model", err=True)
    given |= {"out": folder, "force": force}
    evaluation = run(adapter, tasks, data, _ranks(ranks), **asked, **given)
    _tell(evaluation.lines())
    typer.echo(f"Written to {folder}")
    _next("select", folder, "--within", "1%")


@app.command()
def select(
    evaluation: Annotated[Path, _existing("The folder that `matryoshka eval` wrote.")],
    within: Annotated[str | None, _option("How far below the best rank: 1% of its value.")] = None,
    max_bytes: Annotated[str | None, _option("The largest adapter to take: 50MB.")] = None,
    task: Annotated[str | None, _option("The task to choose by.", default="the only one")] = None,
    metric: Annotated[str | None, _option("Such as loss.", default="the first")] = None,
) -> None:
    """Choose the smallest rank that is good enough, or with --max-bytes alone the best that fits.

    Example: matryoshka select runs/my/adapter-evaluation --within 1%
    """
    from matryoshka_lora.evaluation.select import select as choose

    choice = choose(evaluation, within, max_bytes, task, metric)
    _tell(choice.lines())
    if adapter := choice.evaluation.about["adapter"]:  # none if it was in memory
        _next("export", adapter, "--rank", choice.rank, "-o", f"rank-{choice.rank}")


@app.command()
def serve(
    adapter: Annotated[Path, _existing("The folder of an adapter, or a ladder.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Options of vLLM's server, after --."),
    ] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Only print the commands.")] = False,
    ranks: Annotated[str | None, _option("As 1,2,4.", default="the nested ones")] = None,
    model: Model = None,
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The server's port.")] = 8000,
) -> None:
    """Serve ranks of an adapter, or a ladder, with vLLM: NAME@4 is rank 4 of the adapter NAME.

    vLLM pads every adapter to the largest rank that it serves: a small rank is cheap only in a
    server without large ones. Options of vLLM stand after --.

    Example: matryoshka serve runs/my/adapter --ranks 1,4,8 -- --max-model-len 2048
    """
    from matryoshka_lora.serve import serve as run

    base: Any = {"model": model, "revision": revision, "ranks": _ranks(ranks)}
    at: Any = {"host": host, "port": port, "more": more or (), "only_print": only_print}
    raise typer.Exit(run(adapter, **base, **at))


@app.command()
def play(
    adapter: Nested,
    model: Model = None,
    revision: Revision = None,
    dtype: OfBase = None,
    port: Annotated[int | None, _option("The page's port.", default="a free one from 7860")] = None,
) -> None:
    """Open a page on this machine where two ranks and the base model answer side by side.

    Example: matryoshka play runs/my/adapter
    """
    import gradio  # noqa: F401  (before the model is loaded, which takes longer)

    from matryoshka_lora.play import open_session
    from matryoshka_lora.play import play as show

    typer.echo(f"Loading {adapter} and its base model; Ctrl-C ends the page", err=True)
    show(open_session(adapter, model, revision, dtype), port)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")] = Path("runs/demo"),
) -> None:
    """Teach a small model a table, see how much of it each rank holds, and look entries up.

    The model comes inside a package: no network is needed. Takes minutes on two cores.

    Example: matryoshka demo
    """
    if out.exists():
        raise MatryoshkaError(f"{out} exists already: delete it, or name another with --out")
    typer.echo("Loading libraries and model", err=True)
    from matryoshka_lora.demo import demo as run

    run(out)
    _next("info", out / "adapter")


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 an explained error, 2 wrong usage."""
    # transformers' and TRL's warnings are about their own next versions.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Else torch's threads spin while they wait, and take five times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for the embedded model on the hub.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config")
    try:
        app()
    except (MatryoshkaError, OSError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"this needs {error.name}: in the clone, pip install '.[all]'")
    except SystemExit as end:
        if end.code == 130:  # typer's, for Ctrl-C
            print("stopped", file=sys.stderr)
        raise


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _tell(lines: Iterable[str]) -> None:
    typer.echo("\n".join(lines))


def _next(*words: object) -> None:
    typer.echo(f"Next: {shlex.join(['matryoshka', *map(str, words)])}")


def _ranks(text: str | None) -> Any:
    return text if text == "all" else _numbers(text, int)


def _numbers(text: str | None, kind: type[int] | type[float]) -> Any:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "rank: write 8, or 1,2,4" if kind is int else "list of weights: write 1,0.5"
        raise typer.BadParameter(f"{text!r} is no {what}") from error
