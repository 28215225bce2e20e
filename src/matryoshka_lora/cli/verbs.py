"""The verbs that train, describe, reorder, export and push, and what several verbs take."""

from __future__ import annotations

import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryoshka_lora.cli.bar import progress_bar
from matryoshka_lora.cli.outputs import Out

if TYPE_CHECKING:
    from matryoshka_lora.serving.export import Exported


class Dtype(StrEnum):
    """The names of `matryoshka_lora.models.DTYPES`, which is slow to import."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


class By(StrEnum):
    """The values of `matryoshka_lora.state.By`."""

    svd = "svd"
    activations = "activations"
    loss = "loss"
    learned = "learned"
    trained = "trained"


class Format(StrEnum):
    """What `matryoshka_lora.export` can write; that module is slow to import."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    mlx = "mlx"
    ladder = "ladder"
    gguf_ladder = "gguf-ladder"
    directions = "directions"


class Style(StrEnum):
    """The values of `matryoshka_lora.formats.styles.Style`."""

    kohya = "kohya"
    diffusers = "diffusers"
    peft = "peft"


Model = Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter was trained on")]
Revision = Annotated[
    str | None,
    typer.Option(help="Of the base model on the hub.", show_default="the one that the adapter was trained on"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter, a model or an evaluation that is there.")]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Instead of what the file says.", show_default=False),
    ] = None,
) -> None:
    """Train one adapter for every rank.

    The file names the data, and may set any field of TRL's SFTConfig, any of PEFT's LoraConfig under lora:, and how
    ranks are made under nesting:. The same command goes on where a killed run stopped.

    After the run each low rank is trained too, on half as many rows again. nesting.reorder=svd takes seconds instead.

    Example: matryoshka train config.yaml lora.r=8 learning_rate=1e-3
    """
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.training import load_config
    from matryoshka_lora.training import train as run
    from matryoshka_lora.training.processes import leave

    checked = load_config(config, overrides or [])
    try:
        run(checked)
        leave()
    except KeyboardInterrupt as error:
        raise MatryoshkaError("stopped; the same command goes on from the newest checkpoint") from error
    if os.environ.get("RANK", "0") == "0":
        if "task" in checked.data:
            held_out = f"--task {checked.data['task']}"
        else:
            held_out = f"--data {checked.data.get('path') or checked.data['dataset']} (better: rows held out from it)"
        typer.echo(f"Next: matryoshka eval {checked.output_dir} {held_out}")


def info(
    adapter: Annotated[
        Path,
        typer.Argument(help="A folder with a LoRA adapter, nested or not; or a .safetensors file.", show_default=False),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the singular values of every layer, as .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Say what an adapter is: ranks, scales, its size at each rank, and what each rank keeps.

    Prints what `export` would give with each --rank, --keep and --max-bytes. No base model is loaded.

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
    if adapter.is_file():
        typer.echo(f"\nNext: matryoshka export {adapter} --keep 95% -o small.safetensors")
    elif state is None or not state.reordered:
        typer.echo(f"\nNext: matryoshka reorder {adapter} -o nested")
    else:
        typer.echo(
            f"\nNext: matryoshka export {adapter} --rank {state.nesting.ranks[len(state.nesting.ranks) // 2]} -o small"
        )


def reorder(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A folder with any LoRA adapter that PEFT has written; or a .safetensors file.", show_default=False
        ),
    ],
    out: Out,
    by: Annotated[By, typer.Option(metavar="WAY", help="In what sense each prefix is good; see above.")] = By.svd,
    data: Annotated[
        str | None,
        typer.Option(help="For all but svd: a built-in task, a file, or a hub dataset.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="How many rows of it.", show_default="128; 480 for learned, 3200 for trained"),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model.")] = Dtype.bf16,
    force: Force = False,
) -> None:
    """Make any LoRA adapter nested: every prefix becomes a good adapter of its rank.

    What a good prefix is, --by says. At the largest rank the adapter computes what it did, but for trained. All but
    svd run the base model over some rows of the training data, or of data like it. A single file takes svd alone.

    - svd: its update is the nearest of its rank to the layer's; needs no data and no base model
    - activations: it changes each layer's outputs least
    - loss: it changes the training loss least
    - learned: a few training steps by the loss of the prefixes themselves
    - trained: each rank gets a training of its own, which changes the largest rank too

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
    if adapter.is_file():
        typer.echo(
            f"{out} computes what {adapter} does, and its directions are in order: the first ones of each layer are "
            f"its best.\nNext: matryoshka export {shlex.quote(str(out))} --keep 95% -o small.safetensors"
        )
        return
    largest = max(len(values) for values in spectra.values())
    nearly = " but for a little more training" if by is By.trained else ""
    typer.echo(
        f"{out} holds every rank from 1 to {largest}. PEFT reads it at rank {largest}, which computes what {adapter} "
        f"does{nearly}.\nNext: matryoshka info {shlex.quote(str(out))}"
    )


def export(
    adapter: Annotated[
        Path,
        typer.Argument(help="A folder with a LoRA adapter, nested or not; or a .safetensors file.", show_default=False),
    ],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The rank of every layer.", show_default=False)] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead: a share of the parameters; each layer gets a rank.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Instead: 95% of each layer's squared singular values; or kohya's sv_fro=0.95, sv_ratio=20.",
            show_default=False,
        ),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Instead: the most that the file may have, as 50MB.", show_default=False)
    ] = None,
    conv_rank: Annotated[
        int | None, typer.Option(help="Of a single file: the rank of its convolutions.", show_default="the rank")
    ] = None,
    style: Annotated[
        Style | None,
        typer.Option(
            metavar="STYLE",
            help="Of a single file: the spelling of its keys, kohya, diffusers or peft.",
            show_default="as they are",
        ),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="With --budget: fill up to one rank, for engines that know one.")
    ] = False,
    format: Annotated[Format, typer.Option(metavar="FORMAT", help="See above.")] = Format.peft,
    model: Model = None,
    revision: Revision = None,
    verify: Annotated[bool, typer.Option(help="Compare logits, if the base model is on this machine.")] = True,
    force: Force = False,
) -> None:
    """Write a rank of an adapter in the format that a device or an engine takes.

    An adapter that is not nested is reordered by SVD on the way. What is written is loaded again and compared with the
    adapter before it is put in place. A LoRA in one .safetensors file, as image and video models have it, becomes such
    a file, with the keys that it had. The formats:

    - peft: an ordinary LoRA adapter
    - merged: the base model with the adapter in its weights
    - gguf: a file for llama.cpp's --lora
    - mlx: a folder for mlx-lm
    - ladder: one adapter for each rank, with the vllm command that serves them all
    - gguf-ladder: a GGUF file for each rank, with the llama-server command
    - directions: one file of which a device reads only the ranks it needs

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4

    Example: matryoshka export flux.safetensors --keep 95% -o small.safetensors
    """
    from matryoshka_lora.serving.export import export as write
    from matryoshka_lora.serving.export import following

    with progress_bar("writing") as show:
        made = write(
            adapter,
            out,
            rank,
            format.value,
            budget=budget,
            keep=keep,
            max_bytes=max_bytes,
            conv_rank=conv_rank,
            style=None if style is None else style.value,
            pad=pad,
            model=model,
            revision=revision,
            verify=verify,
            overwrite=force,
            on_progress=show,
        )
    if made.error is not None and made.chosen is not None:
        typer.echo(
            f"{out} is {_what(made)} of {adapter}. It keeps {100 * made.chosen.kept:.2f} % of the squared singular "
            f"values; the error is {100 * made.error:.3g} % of the update's norm"
        )
        return
    typer.echo(_logits(made, verify, format))
    kept = "" if made.kept is None else f" It keeps {100 * made.kept:.1f} % of the squared singular values."
    typer.echo(
        f"{out} is {_what(made)} of {adapter}, in the format {format.value}.{kept}\n"
        f"Next: {following(made.path, format.value)}"
    )


def _what(made: Exported) -> str:
    if made.chosen is not None:
        used = sorted(made.chosen.ranks.values())
        left_out = sum(rank == 0 for rank in used)
        return (
            f"{made.chosen.parameters:,} of {made.chosen.total:,} parameters (ranks from {used[0]} to {used[-1]}, "
            f"{left_out} of {len(used)} layers left out)"
        )
    if isinstance(made.ranks, int):
        return f"rank {made.ranks}"
    return f"ranks {', '.join(map(str, made.ranks))}"


def _logits(made: Exported, verify: bool, format: Format) -> str:
    if format is Format.directions:
        return "Verified: read back, every number is the same."
    if made.verified is not None:
        return f"Verified: on {made.base}, {made.verified}."
    if not verify:
        return "Verified: the layers. Logits were not compared, as you asked."
    return (
        f"Verified: the layers. No logits were compared: the base model {made.base or ''} is not on this machine. Give "
        "its folder with --model"
    )


def push(
    adapter: Annotated[Path, typer.Argument(help="A folder with a LoRA adapter.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.", show_default=False)],
    base_model: Annotated[
        str | None,
        typer.Option(
            help="owner/name of the base model, for an adapter that names a folder.",
            show_default="what the adapter names",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository that is made.")] = False,
) -> None:
    """Upload an adapter with its model card and evaluation to the Hugging Face hub.

    Checkpoints and logs beside it are not sent, and nothing is sent while a file holds what looks like a token or an
    absolute path.

    Example: matryoshka push runs/demo/adapter me/family-any-rank
    """
    from matryoshka_lora.serving.push import push as send

    address = send(adapter, repository, private=not public, base_model=base_model)
    typer.echo(f"Uploaded: {address}")
