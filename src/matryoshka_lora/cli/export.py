"""``matryoshka export``."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matryoshka_lora.cli.options import Force, Model, Revision

if TYPE_CHECKING:
    from matryoshka_lora.serving.export import Exported


class Format(StrEnum):
    """What `matryoshka_lora.export` can write; that module is slow to import."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    ladder = "ladder"
    directions = "directions"


def export(
    adapter: Annotated[Path, typer.Argument(help="A folder with a LoRA adapter, nested or not.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="The rank of every layer.", show_default=False)] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead: the share of the parameters; layers get ranks of their own.", show_default=False),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="With --budget: fill up to one rank, for engines that know one.")
    ] = False,
    format: Annotated[Format, typer.Option(help="See above.")] = Format.peft,
    model: Model = None,
    revision: Revision = None,
    verify: Annotated[bool, typer.Option(help="Compare logits, if the base model is on this machine.")] = True,
    force: Force = False,
) -> None:
    """Write a rank of an adapter in the format that a device or an engine takes.

    peft: an ordinary LoRA adapter. merged: the base model with the adapter in its weights. gguf: a file for
    llama.cpp's --lora. ladder: one adapter for each rank, with the vllm command that serves them all. directions: one
    file of which a device reads only the ranks it needs. Each is loaded again and compared with the adapter before it
    is put in place. An adapter that is not nested is reordered by SVD on the way.

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4
    """
    from matryoshka_lora.serving.export import export as write

    made = write(
        adapter,
        out,
        rank,
        format.value,
        budget=budget,
        pad=pad,
        model=model,
        revision=revision,
        verify=verify,
        overwrite=force,
    )
    typer.echo(_logits(made, verify, format))
    typer.echo(f"{out} is {_what(made)} of {adapter}, as {format.value}. Next: {_following(made, format)}")


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


def _following(made: Exported, format: Format) -> str:
    out = str(made.path)
    following = {
        Format.peft: f'PeftModel.from_pretrained(base_model, "{out}")',
        Format.merged: f'AutoModelForCausalLM.from_pretrained("{out}")',
        Format.gguf: f"llama-cli -m BASE.gguf --lora {shlex.quote(out)}",
        Format.ladder: f"see {made.path / 'README.md'}",
        Format.directions: f'load(base_model, "{out}", max_rank=4)',
    }
    return following[format]


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
