"""Find what a name stands for: a path, or else a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.output import PathLike

# What trainers save beside an adapter: the tokenizer or processor, and a reward model's head.
BESIDE = (
    *("tokenizer*", "chat_template*", "*_tokens*", "vocab.*", "merges.*", "*.model"),
    *("*processor_config.json", "value_head.*"),
)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *BESIDE)
MODEL = ("config.json", *(f"{x}model*.safetensors*" for x in ("", "diffusion_pytorch_")))

# owner/name, then @revision, then /FILE.safetensors
_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+?))?(?:/([\w./-]+\.safetensors))?")


def hub_parts(path: PathLike) -> tuple[str, str | None, str | None] | None:
    """Return repository, revision and file of a name of the hub; None for a path."""
    found = _NAME.fullmatch(str(path))
    # runs/typo is no repository where there is a folder runs.
    if found is None or Path(*Path(path).parts[:1]).exists():
        return None
    return found[1], found[2], found[3]


def local(path: PathLike, patterns: tuple[str, ...] = ADAPTER) -> Path:
    """Return a path on this machine; what the hub has is downloaded into its cache once.

    Args:
        path: A path, or ``owner/name``, ``owner/name@revision``, ``owner/name/file.safetensors``.
        patterns: The files that are needed.

    Raises:
        MatryoshkaError: The hub has no such repository or file, or cannot be reached.
    """
    parts = hub_parts(path)
    if parts is None:
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, revision, file = parts
    wanted = [file] if file else list(patterns)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MatryoshkaError(
            f"there is no path {path} here, and the hub gives none ({reason:.200}). A private "
            "repository needs `hf auth login`; offline, only what was downloaded before is read"
        ) from error
    if not file and not (folder / patterns[0]).is_file():
        raise MatryoshkaError(
            f"{path} on the hub holds no {patterns[0]}: name a file, as {name}/FILE.safetensors"
        )
    return folder / file if file else folder
