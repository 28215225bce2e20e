"""Send an adapter to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi

from matryoshka_lora.formats.card import CARD_NAME, write_card
from matryoshka_lora.formats.directions import DIRECTIONS_NAME
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, PICTURE_NAME, SPECTRA_NAME

# Checkpoints, optimizer states and logs beside the adapter stay at home.
_FILES = (
    CARD_NAME,
    "adapter_config.json",
    "adapter_model*.safetensors",
    "adapter_model.safetensors.index.json",
    DIRECTIONS_NAME,
    SPECTRA_NAME,
    "nesting.json",
    f"{EVALUATION_FOLDER}/{EVALUATION_NAME}",
    f"{EVALUATION_FOLDER}/{PICTURE_NAME}",
)


def push_adapter(
    adapter: str | os.PathLike[str], repository: str, private: bool = True, endpoint: str | None = None
) -> str:
    """Upload an adapter, its card (of a nested one written anew) and its evaluation, through huggingface_hub.

    Args:
        adapter: Its directory.
        repository: ``owner/name``; made if it does not exist.
        private: Whether a repository that is made is private.
        endpoint: Of the hub; None means huggingface_hub's own.

    Returns:
        The address of the commit.

    Raises:
        MatryoshkaError: The adapter is damaged, or the hub refuses; the message says why.
    """
    opened = open_adapter(adapter)
    if opened.state is not None:  # what is not nested may be anybody's, and has a card of its own or none
        write_card(Path(adapter), opened.config, opened.state)
    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(adapter),
            allow_patterns=list(_FILES),
            commit_message="Upload a LoRA adapter for every rank",
        )
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses
        reason = " ".join(str(error).split())
        raise MatryoshkaError(
            f"cannot push to {repository!r}: {reason:.500} Log in with `hf auth login`; write owner/name"
        ) from error
    return str(commit.commit_url)
