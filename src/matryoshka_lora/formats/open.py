"""Open a LoRA: a folder of PEFT or of mlx-lm, or a single file."""

from __future__ import annotations

from numbers import Real
from pathlib import Path

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.formats import mlx, peft_folder, single_file
from matryoshka_lora.formats.hub import local_path
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, FOR_LANGUAGE_MODELS
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.nesting import is_valid_scale


def open_lora(path: PathLike, *, revision: str | None = None, alpha: float | None = None) -> Lora:
    """Open a LoRA. Its factors are read when they are used.

    Args:
        path: A folder that PEFT or mlx-lm has saved, a single ``.safetensors`` file, or the id of
            either on the Hugging Face Hub: ``owner/name`` or ``owner/name/file.safetensors``.
        revision: Branch, tag or commit on the Hub; ignored for a path.
        alpha: The alpha of each layer, for a single file that does not contain it.

    Raises:
        MatryoshkaError: The path is not a LoRA, is damaged, or is a variant that cannot be
            truncated; or an alpha is passed for a LoRA that contains its own.
    """
    if alpha is not None and not (isinstance(alpha, Real) and is_valid_scale(alpha)):
        raise MatryoshkaError(f"`alpha` must be a positive number, got {short(alpha)}.")
    resolved = local_path(path, revision=revision)
    if not resolved.is_dir():
        return single_file.read(resolved, alpha)
    if alpha is not None:
        raise MatryoshkaError(f"{path} is a folder, whose config has the alpha. Omit `alpha`.")
    is_of_peft = (resolved / peft_folder.WEIGHTS_NAME).exists()
    if not is_of_peft and (resolved / mlx.WEIGHTS_NAME).is_file():
        return mlx.read(resolved, name=str(path))
    return peft_folder.read(resolved, name=str(path))


def open_adapter(path: PathLike, revision: str | None = None) -> Lora:
    """Open a LoRA in PEFT's format, for a causal language model. See `open_lora` for arguments."""
    lora = open_lora(path, revision=revision)
    if lora.container == "single":
        raise MatryoshkaError(
            f"{lora.name} is a single file, as for image models. {FOR_LANGUAGE_MODELS} Pass a "
            "folder that PEFT has saved."
        )
    return lora


def find_loras(folder: PathLike) -> list[Path]:
    """Return the LoRAs in a folder, sorted by name; none if the folder is a LoRA or a model.

    Hidden files are not LoRAs: they may be unfinished outputs.
    """
    path = Path(folder)
    if not path.is_dir() or (path / CONFIG_NAME).exists() or (path / "config.json").is_file():
        return []
    return [
        entry
        for entry in sorted(path.iterdir())
        if not entry.name.startswith(".")
        and (entry.suffix.lower() == ".safetensors" or (entry / CONFIG_NAME).is_file())
    ]


open = open_lora
"""The public name, `matryoshka_lora.open`."""
