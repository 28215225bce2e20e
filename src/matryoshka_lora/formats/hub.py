"""Resolve a path, or the id of a repository on the Hugging Face Hub, to a local path."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path, PurePath
from typing import NamedTuple

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError

TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*_tokens*",
    "vocab.*",
    "merges.*",
    "*.model",
)
"""The files of a tokenizer."""

COMPANION_FILES = (*TOKENIZER_FILES, "*processor_config.json", "value_head.*")
"""Files that trainers save next to an adapter: tokenizer, processor, a reward model's head."""

CARD_NAME = "README.md"
"""The model card."""

LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
"""The licenses of a repository."""

SMALL_FOLDER = "small"
"""The subfolder of a nested adapter that holds its small adapter."""

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",  # of mlx-lm
    f"{SMALL_FOLDER}/adapter_config.json",
    f"{SMALL_FOLDER}/adapter_model.safetensors",
    CARD_NAME,
    *LICENSE_FILES,
    *COMPANION_FILES,
)
"""The files of an adapter's repository."""

MODEL_FILES = (
    "config.json",
    "model*.safetensors*",
    "diffusion_pytorch_model*.safetensors*",
)
"""The files of a model's repository, without its tokenizer."""

TUNED_FILES = ("*config.json", *MODEL_FILES[1:], "adapter_model.safetensors")
"""The files of a model's or an adapter's repository, without its tokenizer."""

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+\.safetensors))?")


def copy_companion_files(
    folder: Path, output_folder: Path, patterns: tuple[str, ...] = COMPANION_FILES
) -> None:
    """Copy the companion files of an adapter. Symbolic links out of its folder are not followed."""
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if not is_foreign_link(file, folder) and file.is_file():
                output_file = output_folder / file.relative_to(folder)
                output_file.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, output_file)


def is_foreign_link(file: Path, folder: Path) -> bool:
    """Return whether a file leads out of a folder, after a warning: its target may be private."""
    is_foreign = leads_out_of_folder(file, folder)
    if is_foreign:
        warnings.warn(
            f"{file} is a symbolic link to another folder and is not used. Replace it by a copy, "
            "if you trust it.",
            stacklevel=3,
        )
    return is_foreign


def leads_out_of_folder(file: Path, folder: Path) -> bool:
    """Return whether symbolic links lead a file out of a folder, other than the Hub cache's."""
    folder = folder.resolve()
    target = file.resolve()
    # A repository in the cache has its files in blobs/, and links to them in snapshots/COMMIT/,
    # also in subfolders.
    cache_folders = [
        parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"
    ]
    return not target.is_relative_to(folder) and target.parent not in cache_folders


class HubId(NamedTuple):
    """A repository on the Hugging Face Hub, and a file in it or None."""

    repo_id: str
    filename: str | None


def split_hub_id(path: PathLike) -> HubId | None:
    """Return the parts of ``owner/name`` or ``owner/name/file.safetensors``, or None for a path.

    If a folder ``owner`` exists, ``owner/name`` is treated as a path, even if that does not exist:
    it is more likely a typo than a repository.
    """
    # On Windows, the path of an id has a backslash.
    name = path.as_posix() if isinstance(path, PurePath) else str(path)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        return None
    if Path(name.partition("/")[0]).exists():
        return None
    return HubId(match[1], match[2])


def local_path(
    path: PathLike, patterns: tuple[str, ...] = ADAPTER_FILES, revision: str | None = None
) -> Path:
    """Return a local path, after downloading a repository or file into the Hub's cache.

    Args:
        path: A path, ``owner/name`` or ``owner/name/file.safetensors``.
        patterns: The files to download. The repository must contain the first one.
        revision: Branch, tag or commit on the Hub; ignored for a path.

    Raises:
        MatryoshkaError: The Hub has no such repository or file, or cannot be reached.
    """
    hub_id = split_hub_id(path)
    if hub_id is None:
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, filename = hub_id
    if filename:
        patterns = (filename,)
    try:
        snapshot = snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0].removeprefix("Got: ").rstrip(".") if lines else type(error).__name__
        raise MatryoshkaError(
            f"{path} is neither a path nor available on the Hugging Face Hub ({reason}). A "
            "private repository needs `hf auth login`. Offline, only what has been downloaded "
            "before can be used."
        ) from error
    folder = Path(snapshot)
    if filename:
        return folder / filename
    if not any(folder.glob(patterns[0])):
        raise MatryoshkaError(
            f"{path} on the Hugging Face Hub has no {patterns[0]}. Pass a file of it, such as "
            f"{repo_id}/FILE.safetensors."
        )
    return folder
