"""``matryoshka export``."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """What `matryoshka export` can write."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    ladder = "ladder"
    directions = "directions"


def export(
    adapter: Annotated[Path, typer.Argument(help="A folder with a nested adapter.", show_default=False)],
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
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter names")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of the base model on the hub.", show_default="what the adapter names")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare logits, if the base model is on this machine.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an adapter, a model or an evaluation that is there.")
    ] = False,
) -> None:
    """Write a rank of a nested adapter in the format that a device or an engine takes.

    peft: an ordinary LoRA adapter. merged: the base model with the adapter in its weights. gguf: a file for
    llama.cpp's --lora. ladder: one adapter for each rank, with the vllm command that serves them all. directions: one
    file of which a device reads only the ranks it needs. Each is loaded again and compared with the adapter before it
    is put in place.

    Example: matryoshka export runs/demo/adapter --rank 4 -o rank-4
    """
    from matryoshka_lora.adapter import read_adapter
    from matryoshka_lora.adapter.storage import check_apart
    from matryoshka_lora.serving import export as exports
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.files import check_free, check_writable
    from matryoshka_lora.models import base_of

    whole = format in (Format.ladder, Format.directions)
    if (rank is None) == (budget is None) and not (whole and budget is None):
        raise typer.BadParameter("give either --rank, for example 8, or --budget, for example 0.25")
    if budget is not None and whole:
        raise typer.BadParameter(f"--format {format.value} has whole ranks: give --rank, or leave --budget out")
    if pad and budget is None:
        raise typer.BadParameter("--pad belongs to --budget: with --rank all layers have one rank anyway")

    state, config, _ = read_adapter(adapter)
    check_writable(out.parent if format is Format.gguf else out)
    check_apart(adapter, out)
    check_free(out, force)
    if budget is not None:
        choice = _choose(adapter, budget)
        ranks, what = choice.ranks, f"{choice.parameters:,} of {choice.total:,} parameters"
        used = sorted(ranks.values())
        typer.echo(f"Ranks from {used[0]} to {used[-1]}, {sum(r == 0 for r in used)} of {len(used)} layers left out")
    else:
        ranks = state.nesting.max_rank if rank is None else rank
        what = f"rank {ranks}"
    cut = exports.cut(adapter, ranks, pad)
    name, revision = base_of(config, model, revision)
    base = _base(name, revision)
    if base is None and format in (Format.merged, Format.gguf):
        raise MatryoshkaError(
            f"--format {format.value} needs the base model, and {name or 'none'} is not on this machine: give its "
            "folder with --model"
        )

    verified: Any = None
    checked_on = base if verify else None
    if format is Format.peft:
        verified = exports.export_peft(cut, out, checked_on, overwrite=force)
        following = f'PeftModel.from_pretrained(base_model, "{out}")'
    elif format is Format.merged and base is not None:
        from matryoshka_lora.models import load_tokenizer

        tokenizer = load_tokenizer(str(name), revision=revision)
        verified = exports.export_merged(cut, out, base, tokenizer, verify, overwrite=force)
        following = f'AutoModelForCausalLM.from_pretrained("{out}")'
    elif format is Format.gguf:
        from matryoshka_lora.models import load_config

        base_config = load_config(str(name), revision=revision)
        verified = exports.export_gguf(cut, out, checked_on, base_config, overwrite=force)
        following = f"llama-cli -m BASE.gguf --lora {out}"
    elif format is Format.ladder:
        below = (r for r in state.nesting.ranks if r < cut.rank and r in state.ranks)
        ladder = (*below, cut.rank)
        found = exports.export_ladder(cut, ladder, out, checked_on, overwrite=force)
        verified, what = (
            max(found.values(), key=lambda v: v.difference if v else -1),
            f"ranks {', '.join(map(str, found))}",
        )
        following = f"see {out / 'README.md'}"
    else:
        exports.export_directions(cut, out, overwrite=force)
        following = f'load(base_model, "{out}", max_rank=4)'
    typer.echo(_report(verified, name, verify, format))
    typer.echo(f"{out} is {what} of {adapter}, as {format.value}. Next: {following}")


def _choose(adapter: Path, budget: float) -> Any:
    from matryoshka_lora.formats.opened import open_adapter
    from matryoshka_lora.serving.budget import choose_ranks
    from matryoshka_lora.formats.spectra import read_spectra

    opened = open_adapter(adapter)
    return choose_ranks(opened.layers, read_spectra(opened), budget)


def _base(name: str | None, revision: str | None) -> Callable[[Any], Any] | None:
    """Loads a base model that is on this machine; None if it is not."""
    from matryoshka_lora.errors import MatryoshkaError
    from matryoshka_lora.models import load_config, load_model

    if not name:
        return None
    try:
        load_config(name, revision=revision, local_files_only=True)
    except MatryoshkaError:
        return None
    return lambda dtype: load_model(name, dtype or "auto", revision=revision, local_files_only=True)


def _report(verified: Any, name: str | None, verify: bool, format: Format) -> str:
    if format is Format.directions:
        return "Verified: read back, every number is the same."
    if verified is not None:
        return f"Verified: on {name}, {verified}."
    if not verify:
        return "Logits were not compared, as you asked."
    return f"No logits were compared: the base model {name or ''} is not on this machine. Give its folder with --model"
