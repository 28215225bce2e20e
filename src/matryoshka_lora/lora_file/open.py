"""Open a LoRA of either kind: a PEFT folder or a single file."""

from __future__ import annotations

from numbers import Real
from pathlib import Path

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora_file.atomic import PathLike
from matryoshka_lora.lora_file.hub import local_path
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.peft_folder import CONFIG_NAME, PeftFolder, open_peft_folder
from matryoshka_lora.lora_file.single_file import open_single_file
from matryoshka_lora.nesting import is_valid_scale


def open_lora(path: PathLike, revision: str | None = None, alpha: float | None = None) -> LoraFile:
    """Open a LoRA.

    Args:
        path: A folder that PEFT has saved, a single ``.safetensors`` file, or the id of
            either on the Hugging Face Hub:
            ``owner/name`` or ``owner/name/file.safetensors``.
        revision: Branch, tag or commit on the Hub; ignored for a path.
        alpha: The alpha of each layer, for a single file that does not contain it.

    Returns:
        A `PeftFolder` or a `SingleFile`.

    Raises:
        MatryoshkaError: The path is not a LoRA, is damaged, or is a variant that cannot be
            truncated; or an alpha is passed, and it contains its own.
    """
    if alpha is not None and not (isinstance(alpha, Real) and is_valid_scale(alpha)):
        raise MatryoshkaError(f"`alpha` must be a positive number, got {alpha!r:.80}.")
    resolved = local_path(path, revision=revision)
    if resolved.is_dir():
        if alpha is not None:
            raise MatryoshkaError(f"{path} is a folder, whose config has the alpha. Omit `alpha`.")
        return open_peft_folder(resolved, name=str(path))
    return open_single_file(resolved, alpha)


def open_adapter(path: PathLike, revision: str | None = None) -> PeftFolder:
    """Open a LoRA in PEFT's format. See `open_lora` for arguments and errors.

    Raises:
        MatryoshkaError: The LoRA is a single file.
    """
    lora = open_lora(path, revision)
    if not isinstance(lora, PeftFolder):
        raise MatryoshkaError(
            f"{lora.name} is a single file, which names no base model. Pass a folder that PEFT has "
            "saved."
        )
    return lora


def find_loras(folder: PathLike) -> list[Path]:
    """Return the LoRAs in a folder, sorted by name; none if the folder itself is one."""
    path = Path(folder)
    if not path.is_dir() or (path / CONFIG_NAME).exists():
        return []
    return [entry for entry in sorted(path.iterdir()) if _looks_like_lora(entry)]


def _looks_like_lora(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors" or (path / CONFIG_NAME).is_file()
