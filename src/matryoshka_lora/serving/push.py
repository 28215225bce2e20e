"""Send an adapter to the Hugging Face hub: a list of files, and none of them with a secret in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.files import (
    EVALUATION_FILES,
    EVALUATION_FOLDER,
    EVALUATION_NAME,
    PICTURE_NAME,
    SPECTRA_NAME,
    TRAINED_NAME,
)
from matryoshka_lora.formats.beside import check_measured
from matryoshka_lora.formats.card import CARD_NAME, HUB_ID, hub_name, write_card
from matryoshka_lora.formats.config import CONFIG_NAME, AdapterConfig
from matryoshka_lora.formats.directions import DIRECTIONS_NAME
from matryoshka_lora.formats.opened import INDEX_NAME, WEIGHTS_NAME, OpenedAdapter, open_adapter
from matryoshka_lora.formats.sidecar import SIDECAR_NAME
from matryoshka_lora.privacy import find_private

# Checkpoints, configs, examples and logs beside the adapter stay at home.
_BESIDES = (
    CARD_NAME,
    CONFIG_NAME,
    SIDECAR_NAME,
    SPECTRA_NAME,
    f"{EVALUATION_FOLDER}/{EVALUATION_NAME}",
    f"{EVALUATION_FOLDER}/{PICTURE_NAME}",
)
# Of an adapter that was pushed before, these are not left beside another one's.
_OURS = {
    *(WEIGHTS_NAME, INDEX_NAME, "adapter_model.bin", DIRECTIONS_NAME, SIDECAR_NAME, SPECTRA_NAME, TRAINED_NAME),
    *(f"{EVALUATION_FOLDER}/{name}" for name in EVALUATION_FILES),
}
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
_MOST_NAMED = 5
_MOST_HEADER = 1 << 26
_TEXT = re.compile(rb"[\x20-\x7e]{16,}")
"""In a file that is no text: fewer letters in a row stand there by chance."""


def push(
    adapter: str | os.PathLike[str],
    repository: str,
    private: bool = True,
    endpoint: str | None = None,
    base_model: str | None = None,
) -> str:
    """Upload an adapter, its card (of a nested one written anew) and its evaluation, through huggingface_hub.

    What the repository has of another adapter goes in the same commit: its weights, nesting and evaluation, by their
    names. All other files there stay.

    Args:
        adapter: Its directory.
        repository: ``owner/name``; made if it does not exist.
        private: Whether a repository that is made is private.
        endpoint: Of the hub; None means huggingface_hub's own.
        base_model: The base model's id on the hub, for an adapter that names a folder of this machine. The files here
            keep the folder.

    Returns:
        The address of the commit.

    Raises:
        MatryoshkaError: The adapter is damaged, names a folder as its base model, or has an evaluation of other
            weights, or a file holds what looks like a token or an absolute path: nothing has been sent then. Or the hub
            refuses, or does not say what the repository holds; the message says why.
    """
    opened = open_adapter(adapter)
    check_measured(Path(opened.name) / EVALUATION_FOLDER / EVALUATION_NAME, opened)
    config = _with_base(opened, base_model)
    if opened.state is not None:  # what is not nested may be anybody's, and has a card of its own or none
        write_card(Path(opened.name), config, opened.state, measured=True)
    operations = _files_to_send(opened, config)
    _check_private(operations)
    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id=made.repo_id,
            operations=[*operations, *_deletions(_listed(api, made.repo_id), operations)],
            commit_message="Upload a LoRA adapter for every rank",
        )
    except MatryoshkaError:
        raise
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses
        raise MatryoshkaError(
            f"cannot push to {repository!r}: {one_line(error)[:500]} Log in with `hf auth login`; write owner/name"
        ) from error
    return str(commit.commit_url)


def _listed(api: HfApi, repository: str) -> list[str]:
    """The files of a repository.

    Raises:
        MatryoshkaError: The hub does not list them.
    """
    try:
        return list(api.list_repo_files(repository))
    except Exception as error:  # as in `push`
        raise MatryoshkaError(
            f"nothing was sent, because the files of {repository!r} cannot be listed, and those of an adapter that is "
            f"there would pass for this one's: {one_line(error)[:500]} Push again, with a token that may read it, or "
            "into another repository"
        ) from error


def _deletions(there: Iterable[str], sent: Sequence[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """What goes of a repository's files: those with the names of an adapter's that are not sent anew."""
    new = {each.path_in_repo for each in sent}
    gone = sorted(name for name in there if name in _OURS or _SHARD.fullmatch(name))
    return [CommitOperationDelete(name, is_folder=False) for name in gone if name not in new]


def _files_to_send(adapter: OpenedAdapter, config: AdapterConfig) -> list[CommitOperationAdd]:
    """What is sent of an adapter: its own files, each by its name, and no other file of its folder.

    Texts are read here: what is looked through is what is sent.

    Args:
        adapter: That was opened.
        config: As it is sent.
    """
    folder, found = Path(adapter.name), []
    for name in _BESIDES:
        file = folder / name
        if name == CONFIG_NAME:
            text = json.dumps(dict(config.data), indent=2, sort_keys=True)
            found.append(CommitOperationAdd(name, text.encode()))
        elif file.is_file():
            found.append(CommitOperationAdd(name, file if name == SPECTRA_NAME else file.read_bytes()))
    if adapter.weights[0].name not in (WEIGHTS_NAME, DIRECTIONS_NAME):
        found.append(CommitOperationAdd(INDEX_NAME, (folder / INDEX_NAME).read_bytes()))
    return found + [CommitOperationAdd(file.name, file) for file in adapter.weights]


def _with_base(adapter: OpenedAdapter, base_model: str | None) -> AdapterConfig:
    """The adapter's config, with a base model that others know."""
    named = adapter.config.base_model
    if base_model is not None:
        if not HUB_ID.fullmatch(base_model):
            raise MatryoshkaError(f"{base_model!r} is no id of a model on the hub: write owner/name")
        return adapter.config.changed(base_model_name_or_path=base_model)
    if named and not hub_name(named):
        raise MatryoshkaError(
            f"{Path(adapter.name) / CONFIG_NAME} names its base model by a folder of this machine, where nobody else "
            "finds it: say what it is called on the hub, with --base-model owner/name"
        )
    return adapter.config


def _check_private(operations: Sequence[CommitOperationAdd]) -> None:
    found = [f"{each.path_in_repo}, {place}: {what}" for each in operations for place, what in _private_parts(each)]
    if found:
        more = f", and {len(found) - _MOST_NAMED} places more" if len(found) > _MOST_NAMED else ""
        raise MatryoshkaError(
            f"nothing was sent, because of {'; '.join(found[:_MOST_NAMED])}{more}. Take it out of the file, or write "
            "the file anew: `matryoshka eval` an evaluation; and push again"
        )


def _private_parts(operation: CommitOperationAdd) -> Iterator[tuple[str, str]]:
    """Where a file holds a token or a path, and which of the two."""
    content = operation.path_or_fileobj
    if not isinstance(content, bytes):  # tensors: the header has all of their words
        with operation.as_file() as file:
            content = file.read(min(int.from_bytes(file.read(8), "little"), _MOST_HEADER))
    try:
        content.decode()
    except UnicodeDecodeError:
        for run in _TEXT.finditer(content):
            yield from ((f"byte {run.start() + start}", what) for start, what in find_private(run[0]))
    else:
        for start, what in find_private(content):
            yield f"line {content.count(10, 0, start) + 1}", what
